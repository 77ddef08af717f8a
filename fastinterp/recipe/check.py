"""Everything that is wrong with a recipe, at once, and what is suspicious about it. Reads no tensor data."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.errors import CheckpointError, FastinterpError, RecipeError
from fastinterp.methods import shown, suggestion
from fastinterp.recipe.document import Source, read_all
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.load import Recipe, build_all, run_to_first_request
from fastinterp.recipe.parts import Part
from fastinterp.recipe.references import ModelRef
from fastinterp.recipe.targets import Assembly
from fastinterp.recipe.values import Value

Names = Callable[[str], Collection[str]]  # the tensors of a model, by its text form

_CANCEL = 0.1  # weights whose sum is below this share of their magnitudes are scaled up tenfold and more


@dataclass(frozen=True)
class Findings:
    """What `inspect` found, in the order of the recipe's lines.

    wrong    errors: the merge would end with the first of them
    odd      what is allowed, but hardly meant; never raised
    recipes  the documents of the recipe, if nothing is wrong in them
    """

    wrong: tuple[FastinterpError, ...]
    odd: tuple[RecipeError, ...]
    recipes: tuple[Recipe, ...]


def inspect(
    source: Source | Sequence[Mapping[str, Any]], *, file: str | None = None, names: Names | None = None
) -> Findings:
    """Look at all of a recipe.

    source, file  as those of load_recipes
    names         gives the names of a model's tensors, and may raise CheckpointError; None: what depends on them is
                  not looked at
    """
    faults = Faults(gather=True)
    recipes: tuple[Recipe, ...] = ()
    with faults:
        recipes = build_all(read_all(source, file), faults)
    if faults.found:
        return Findings(ordered(faults.found), (), ())
    odd: list[RecipeError] = [finding for recipe in recipes for finding in suspicions(recipe)]
    made: list[Collection[str]] = []
    for recipe in recipes:
        if names is None:
            break
        try:
            found, own = against(recipe, [_names(recipe, model, names, made) for model in recipe.models], faults)
        except CheckpointError as error:
            return Findings((error,), ordered(odd), recipes)
        odd += found
        if own is None:
            break
        made.append(own)
    return Findings(ordered(faults.found), ordered(odd), recipes)


def against(
    recipe: Recipe, names: Sequence[Collection[str]], faults: Faults
) -> tuple[list[RecipeError], list[str] | None]:
    """What is odd about a recipe for these tensors, and the names of those that it makes: None, if faults were found.

    names  of each of Recipe.models, those of its tensors
    Raises: ShapeError and RecipeError, as targets.py; MethodError, if the method refuses its parameters.
    """
    before = len(faults.found)
    assembly = Assembly(recipe, names, faults)
    for resolver in assembly.resolvers:
        for parameters in resolver.resolved() if recipe.method.generator and not resolver.part.copies else ():
            with faults:
                run_to_first_request(recipe.document, recipe.method, resolver.part, parameters)
    if len(faults.found) > before:
        return [], None
    odd = [*unmatched(recipe, assembly), *_without_layers(recipe, assembly), *_by_tensor(recipe, assembly)]
    return odd, [target.name for target in assembly.targets]


def suspicions(recipe: Recipe) -> list[RecipeError]:
    """What is odd about a recipe's values, whatever the tensors."""
    found: list[RecipeError] = []
    for part in recipe.parts:
        if not part.copies:
            found += _idle(recipe, part)
    if recipe.parameters is not None:
        what = _odd_weights(recipe, {p.keyword: recipe.parameters[p.name] for p in recipe.method.parameters})
        found += [recipe.document.error(what, recipe.parts[0].path)] if what else []
        found += _lone(recipe, recipe.parameters)
    return [*found, *_unused(recipe)]


def _lone(recipe: Recipe, parameters: Mapping[str, Any]) -> Iterator[RecipeError]:
    """A weight that is divided by itself."""
    (part, *_) = recipe.parts
    lone = len(part.sources) - part.has_base == 1
    given = [level["weight"] for level in (part.sources[-1].own, *part.levels) if "weight" in level]
    if lone and given and parameters.get("normalize") is True and not _only(given[0], 1.0):
        message = "`weight` changes nothing: there is one model, and `normalize` divides by its weight"
        remedy = ". Write `normalize: false`" + (", or use `lambda`" if "lambda" in parameters else "")
        yield recipe.document.error(message + remedy, given[0].path)


def _unused(recipe: Recipe) -> Iterator[RecipeError]:
    """Settings that nothing of this merge looks at."""
    given = recipe.document.value
    if "seed" in given and recipe.rounding == "nearest" and not recipe.method.draws:
        message = f"`seed` changes nothing: {recipe.method.name} draws nothing, and rounding is to nearest"
        yield recipe.document.error(message, "$.seed")
    stored = recipe.out_dtype or recipe.dtype
    if "fp8_overflow" in given and stored is not None and not stored.name.startswith("F8"):
        yield recipe.document.error(f"`fp8_overflow` changes nothing: {stored} is stored", "$.fp8_overflow")
    for level in (level for part in recipe.parts for level in (*(s.own for s in part.sources), *part.levels)):
        if "int8_mask" in level:
            message = "`int8_mask` changes nothing: masks take no memory here"
            yield recipe.document.error(message, level["int8_mask"].path)


def unmatched(recipe: Recipe, assembly: Assembly) -> list[RecipeError]:
    """Filters that no tensor got its value from."""
    hits = {path for resolver in assembly.resolvers for path in resolver.reached()}
    names = [name for target in assembly.targets for name in (target.name, *(n for _, n in target.inputs))]
    found = []
    for value in _values(recipe):
        for (part, _), path in zip(value.cases, value.paths, strict=True):
            if part is None:
                continue
            if path not in hits:
                matching = sum(part in name for name in names)
                first = "a filter above it, or a value nearer to the model, comes first"
                why = first if matching else f"no tensor's name has it{_near(part, names)}"
                found.append(recipe.document.error(f"the filter {shown(part)} matches nothing: {why}", path))
            elif part[-1].isdecimal() and (more := _longer_numbers(part, names)):
                message = f"the filter {shown(part)} also matches {more}. Write {shown(part + '.')} for that one"
                found.append(recipe.document.error(message, path))
    return found


def _near(part: str, names: Sequence[str]) -> str:
    """The part of a name that was meant, if one is close."""
    if "." in part.strip("."):
        return ""
    known = suggestion(part.strip("."), sorted({piece for name in names for piece in name.split(".")}))
    return known if known.startswith(", did") else ""


def _longer_numbers(part: str, names: Sequence[str]) -> str:
    """What `layers.1` finds beside itself: layers.10, if there is one."""
    for name in names:
        _, at, behind = name.partition(part)
        if at and behind[:1].isdecimal():
            return part + behind.partition(".")[0]
    return ""


def _without_layers(recipe: Recipe, assembly: Assembly) -> list[RecipeError]:
    if any(target.layer is not None for target in assembly.targets):
        return []
    return [
        recipe.document.error("a gradient, but the models have no layers: its first number is used for all", path)
        for value in _values(recipe)
        for (_, given), path in zip(value.cases, value.paths, strict=True)
        if isinstance(given, tuple)
    ]


def _by_tensor(recipe: Recipe, assembly: Assembly) -> list[RecipeError]:
    """Weights that are odd for some tensors: the first of them is named."""
    if recipe.parameters is not None:
        return []
    seen: set[int] = set()
    for target in assembly.targets:
        if target.copies or id(target.parameters) in seen:
            continue
        seen.add(id(target.parameters))
        if what := _odd_weights(recipe, target.parameters):
            return [recipe.document.error(f"{what}, in {target.name} for example", recipe.parts[0].path)]
    return []


def _odd_weights(recipe: Recipe, parameters: Mapping[str, Any]) -> str:
    """What is odd about the weights of one tensor, or nothing."""
    weights = parameters.get("weight")
    if not isinstance(weights, tuple) or len(weights) < 2 or not all(isinstance(w, float) for w in weights):
        return ""
    total, size = math.fsum(weights), math.fsum(map(abs, weights))
    listed = ", ".join(f"{w:g}" for w in weights[:8]) + (", ..." if len(weights) > 8 else "")
    if parameters.get("normalize") is True and abs(total) < _CANCEL * size:
        return f"the weights {listed} nearly cancel: divided by their sum, {total:g}, they become large"
    if recipe.base is None and parameters.get("normalize") is False and abs(total - 1.0) > 1e-6:
        return f"the weights {listed} sum to {total:g}, and `normalize: false` does not divide by it"
    return ""


def _idle(recipe: Recipe, part: Part) -> Iterator[RecipeError]:
    """Parameters that do nothing."""
    for source in part.sources:
        for name, value in source.own.items():
            if _only(value, 0.0) and name == "weight":
                yield recipe.document.error(f"{shown(str(source.ref))} adds nothing: its weight is 0", value.path)
            if _only(value, 1.0) and name == "scale":
                yield recipe.document.error("`scale` 1 changes nothing", value.path)
    for value in (value for level in part.levels for name, value in level.items() if name in ("t", "lambda")):
        name = value.path.rpartition(".")[2]
        if _only(value, 0.0):
            yield recipe.document.error(f"`{name}` 0 leaves {shown(str(part.sources[0].ref))} as it is", value.path)
        if _only(value, 1.0) and name == "t" and len(part.sources) == 2 and recipe.method.walks:
            yield recipe.document.error(f"`t` 1 gives {shown(str(part.sources[1].ref))} as it is", value.path)
    yield from _dropping(recipe, part)


def _dropping(recipe: Recipe, part: Part) -> Iterator[RecipeError]:
    method, levels = recipe.method, (*(source.own for source in part.sources), *part.levels)
    given = [level["density"] for level in levels if "density" in level]
    for value in given:
        if _only(value, 0.0):
            yield recipe.document.error("`density` 0 drops everything", value.path)
        if _only(value, 1.0) and method.drops and (method.draws or not method.elects):
            message = f"`density` 1 drops nothing, and dropping is what {method.name} is for"
            yield recipe.document.error(message, value.path)
    by_default = any(p.name == "density" and p.default == 1.0 for p in method.parameters)
    if not given and method.drops and by_default:
        message = f"without a `density`, {method.name} drops nothing: its default is 1"
        yield recipe.document.error(message, at="$.merge_method")


def _only(value: Value, number: float) -> bool:
    """Whether a value is this number for all tensors."""
    return value.cases[0][0] is None and value.cases[0][1] in (number, (number,))


def _values(recipe: Recipe) -> list[Value]:
    """All that a recipe gives, each once."""
    found: dict[str, Value] = {}
    for part in recipe.parts:
        for level in (*(source.own for source in part.sources), *part.levels):
            found |= {value.path: value for value in level.values()}
    return list(found.values())


def _names(recipe: Recipe, model: ModelRef, names: Names, made: Sequence[Collection[str]]) -> Collection[str]:
    above = recipe.made_by(model)
    return names(str(model)) if above is None else made[above]


def ordered(found: Sequence[Any]) -> tuple[Any, ...]:
    """Each once, by line; those without a line last."""
    unique = list({str(error): error for error in found}.values())
    return tuple(sorted(unique, key=lambda error: getattr(error, "line", None) or math.inf))
