"""All errors of a recipe at once, and warnings about values that are allowed but hardly meant. Reads no tensor data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.errors import CheckpointError, FastinterpError, RecipeError
from fastinterp.messages import listed, shown, suggestion
from fastinterp.recipe.blocks import BlockFilter, ForeignBlock
from fastinterp.recipe.document import Document, ErrorCollector, Source, read_all
from fastinterp.recipe.load import Recipe, build_all, run_to_first_request
from fastinterp.recipe.merge_groups import MergeGroup
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.targets import Assembly
from fastinterp.recipe.values import Value

TensorNames = Callable[[str], Collection[str]]  # the tensors of a model, by its text form

_CANCEL = 0.1  # weights whose sum is below this share of their magnitudes are scaled up tenfold and more


@dataclass(frozen=True)
class Findings:
    """The findings of `check_recipe`, in the order of the recipe's lines.

    errors    the merge would end with one of them
    warnings  about what is allowed, but hardly meant; never raised
    recipes   the documents of the recipe, if they have no error
    """

    errors: tuple[FastinterpError, ...]
    warnings: tuple[RecipeError, ...]
    recipes: tuple[Recipe, ...]


def check_recipe(source: Source, *, file: str | None = None, names: TensorNames | None = None) -> Findings:
    """All errors and warnings of a recipe.

    source, file  as those of load_recipes
    names         gives the names of a model's tensors, and may raise CheckpointError; None: what depends on them is
                  not checked
    """
    collector = ErrorCollector(collect=True)
    documents: tuple[Document, ...] = ()
    with collector:
        documents = read_all(source, file)
    if collector.errors:
        return Findings(ordered(collector.errors), (), ())
    return check_documents(documents, names)


def check_documents(documents: Sequence[Document], names: TensorNames | None = None) -> Findings:
    """`check_recipe` of documents that were read."""
    collector = ErrorCollector(collect=True)
    recipes: tuple[Recipe, ...] = ()
    with collector:
        recipes = build_all(documents, collector)
    if collector.errors:
        return Findings(ordered(collector.errors), (), ())
    warnings = [warning for recipe in recipes for warning in value_warnings(recipe)]
    made: list[Collection[str]] = []
    for recipe in recipes:
        if names is None:
            break
        try:
            tensors = [_tensors(recipe, model, names, made) for model in recipe.models]
        except CheckpointError as error:
            return Findings((error,), ordered(warnings), recipes)
        about_tensors, outputs = check_tensors(recipe, tensors, collector)
        warnings += about_tensors
        if outputs is None:
            break
        made.append(outputs)
    return Findings(ordered(collector.errors), ordered(warnings), recipes)


def check_tensors(
    recipe: Recipe, names: Sequence[Collection[str]], collector: ErrorCollector, **known: Any
) -> tuple[list[RecipeError], list[str] | None]:
    """Warnings about a recipe for these tensors, and the names of those that it makes; None, if errors were collected.

    names  of each of Recipe.models, those of its tensors
    known  what else Assembly takes: shapes, copied tensors, notes
    Raises: ShapeError and RecipeError, as targets.py; MethodError, if the method refuses its parameters.
    """
    before = len(collector.errors)
    assembly = Assembly(recipe, names, collector, **known)
    for resolver in assembly.resolvers:
        for parameters in resolver.resolved() if recipe.method.generator and not resolver.group.copies else ():
            with collector:
                run_to_first_request(recipe.document, recipe.method, resolver.group, parameters)
    if len(collector.errors) > before:
        return [], None
    warnings = [*filter_warnings(recipe, assembly), *_without_layers(recipe, assembly), *_by_tensor(recipe, assembly)]
    return warnings, [target.name for target in assembly.targets]


def value_warnings(recipe: Recipe) -> list[RecipeError]:
    """Warnings about a recipe's values, whatever the tensors."""
    warnings = list(recipe.warnings)
    for group in recipe.groups:
        if not group.copies:
            warnings += _without_effect(recipe, group)
    if recipe.parameters is not None:
        message = _about_weights(recipe, {p.keyword: recipe.parameters[p.name] for p in recipe.method.parameters})
        warnings += [recipe.document.error(message, recipe.groups[0].path)] if message else []
        warnings += _lone_weight(recipe, recipe.parameters)
    return [*warnings, *_unused_settings(recipe)]


def _lone_weight(recipe: Recipe, parameters: Mapping[str, Any]) -> Iterator[RecipeError]:
    """A weight that is divided by itself."""
    group = recipe.groups[0]
    lone = len(group.sources) - group.has_base == 1
    weights = [level["weight"] for level in (group.sources[-1].parameters, *group.levels) if "weight" in level]
    if lone and weights and parameters.get("normalize") is True and not _is_always(weights[0], 1.0):
        message = "`weight` changes nothing: there is one model, and `normalize` divides by its weight"
        remedy = ". Write `normalize: false`" + (", or use `lambda`" if "lambda" in parameters else "")
        yield recipe.document.error(message + remedy, weights[0].path)


def _unused_settings(recipe: Recipe) -> Iterator[RecipeError]:
    """Settings that change nothing of this merge."""
    keys = recipe.document.value
    if "seed" in keys and recipe.rounding == "nearest" and not recipe.method.draws:
        message = f"`seed` changes nothing: {recipe.method.name} draws nothing, and rounding is to nearest"
        yield recipe.document.error(message, "$.seed")
    stored = recipe.out_dtype or recipe.dtype
    if "fp8_overflow" in keys and stored is not None and not stored.name.startswith("F8"):
        yield recipe.document.error(f"`fp8_overflow` changes nothing: {stored} is stored", "$.fp8_overflow")
    for level in (level for group in recipe.groups for level in group.all_levels):
        if "int8_mask" in level:
            message = "`int8_mask` changes nothing: masks take no memory here"
            yield recipe.document.error(message, level["int8_mask"].path)


def filter_warnings(recipe: Recipe, assembly: Assembly) -> list[RecipeError]:
    """Filters that no tensor got its value from, and those that match more than was meant."""
    used = {path for resolver in assembly.resolvers for path in resolver.reached()}
    names = [name for target in assembly.targets for name in (target.name, *(n for _, n in target.inputs))]
    warnings = []
    for value in _values(recipe):
        unused = []
        for (pattern, _), path in zip(value.cases, value.paths, strict=True):
            if pattern is None:
                continue
            if isinstance(pattern, BlockFilter):
                if path not in used and not isinstance(pattern, ForeignBlock):
                    unused.append(pattern.block)
                continue
            if path not in used:
                matching = sum(pattern in name for name in names)
                first = "a filter above it, or a value nearer to the model, comes first"
                why = first if matching else f"no tensor's name has it{_close_part(pattern, names)}"
                warnings.append(recipe.document.error(f"the filter {shown(pattern)} matches nothing: {why}", path))
            elif pattern[-1].isdecimal() and (longer := _longer_numbers(pattern, names)):
                message = (
                    f"the filter {shown(pattern)} also matches {longer}. Write {shown(pattern + '.')} for that one"
                )
                warnings.append(recipe.document.error(message, path))
        if unused:
            message = f"`blocks`: no tensor gets the number of {listed(unused, 3)}: none is in such a block of a U-Net"
            warnings.append(recipe.document.error(message, value.path))
    return warnings


def _close_part(pattern: str, names: Sequence[str]) -> str:
    """The part of a name that was meant, if one is close."""
    if "." in pattern.strip("."):
        return ""
    known = suggestion(pattern.strip("."), sorted({piece for name in names for piece in name.split(".")}))
    return known if known.startswith(", did") else ""


def _longer_numbers(pattern: str, names: Sequence[str]) -> str:
    """The pattern and the digits that follow it in some name: `layers.10` for `layers.1`; empty, if there are none."""
    for name in names:
        _, match, rest = name.partition(pattern)
        if match and rest[:1].isdecimal():
            return pattern + rest.partition(".")[0]
    return ""


def _without_layers(recipe: Recipe, assembly: Assembly) -> list[RecipeError]:
    """Gradients over the layers of models that have none."""
    if any(target.layer is not None for target in assembly.targets):
        return []
    return [
        recipe.document.error("a gradient, but the models have no layers: its first number is used for all", path)
        for value in _values(recipe)
        for (_, case), path in zip(value.cases, value.paths, strict=True)
        if isinstance(case, tuple)
    ]


def _by_tensor(recipe: Recipe, assembly: Assembly) -> list[RecipeError]:
    """A warning about the weights of some tensors, where weights differ by tensor: the first of these is named."""
    if recipe.parameters is not None:
        return []
    seen: set[int] = set()
    for target in assembly.targets:
        if target.copies or id(target.parameters) in seen:
            continue
        seen.add(id(target.parameters))
        if message := _about_weights(recipe, target.parameters):
            return [recipe.document.error(f"{message}, in {target.name} for example", recipe.groups[0].path)]
    return []


def _about_weights(recipe: Recipe, parameters: Mapping[str, Any]) -> str:
    """A warning about the weights of one tensor, or nothing."""
    weights = parameters.get("weight")
    if not isinstance(weights, tuple) or len(weights) < 2 or not all(isinstance(w, float) for w in weights):
        return ""
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    shortened = ", ".join(f"{w:g}" for w in weights[:8]) + (", ..." if len(weights) > 8 else "")
    if parameters.get("normalize") is True and abs(total) < _CANCEL * size:
        return f"the weights {shortened} nearly cancel: divided by their sum, {total:g}, they become large"
    scales = recipe.base is None and recipe.out == "model"  # changes that adapters make may have any weights
    if scales and parameters.get("normalize") is False and abs(total - 1.0) > 1e-6:
        return f"the weights {shortened} sum to {total:g}, and `normalize: false` does not divide by it"
    return ""


def _without_effect(recipe: Recipe, group: MergeGroup) -> Iterator[RecipeError]:
    """Parameters that do nothing."""
    for source in group.sources:
        for name, value in source.parameters.items():
            if _is_always(value, 0.0) and name == "weight":
                yield recipe.document.error(f"{shown(str(source.ref))} adds nothing: its weight is 0", value.path)
            if _is_always(value, 1.0) and name == "scale":
                yield recipe.document.error("`scale` 1 changes nothing", value.path)
    for value in (value for level in group.levels for name, value in level.items() if name in ("t", "lambda")):
        name = value.path.rpartition(".")[2]
        if _is_always(value, 0.0):
            yield recipe.document.error(f"`{name}` 0 leaves {shown(str(group.sources[0].ref))} as it is", value.path)
        if _is_always(value, 1.0) and name == "t" and len(group.sources) == 2 and recipe.method.walks:
            yield recipe.document.error(f"`t` 1 gives {shown(str(group.sources[1].ref))} as it is", value.path)
    yield from _densities(recipe, group)


def _densities(recipe: Recipe, group: MergeGroup) -> Iterator[RecipeError]:
    """Densities that drop nothing, or everything."""
    method = recipe.method
    densities = [level["density"] for level in group.all_levels if "density" in level]
    for density in densities:
        if _is_always(density, 0.0):
            yield recipe.document.error("`density` 0 drops everything", density.path)
        if _is_always(density, 1.0) and method.drops and (method.draws or not method.elects):
            message = f"`density` 1 drops nothing, and dropping is what {method.name} is for"
            yield recipe.document.error(message, density.path)
    by_default = any(p.name == "density" and p.default == 1.0 for p in method.parameters)
    if not densities and method.drops and by_default:
        message = f"without a `density`, {method.name} drops nothing: its default is 1"
        yield recipe.document.error(message, at="$.merge_method")


def _is_always(value: Value, number: float) -> bool:
    """Whether a value is this number for all tensors."""
    return value.cases[0][0] is None and value.cases[0][1] in (number, (number,))


def _values(recipe: Recipe) -> list[Value]:
    """All values that a recipe has, each once."""
    values: dict[str, Value] = {}
    for group in recipe.groups:
        for level in group.all_levels:
            values |= {value.path: value for value in level.values()}
    return list(values.values())


def _tensors(
    recipe: Recipe, model: ModelRef, names: TensorNames, made: Sequence[Collection[str]]
) -> Collection[str]:  # fmt: skip
    above = recipe.made_by(model)
    return names(str(model)) if above is None else made[above]


def ordered(errors: Sequence[Any]) -> tuple[Any, ...]:
    """Each once, by line; those without a line last."""
    unique = list({str(error): error for error in errors}.values())
    return tuple(sorted(unique, key=lambda error: getattr(error, "line", None) or math.inf))
