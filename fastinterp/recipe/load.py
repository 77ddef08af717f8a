"""`load_recipe` and `load_recipes`: recipes, checked against their methods, ready to be planned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastinterp.errors import MethodError, RecipeError
from fastinterp.messages import clipped, shown, suggestion
from fastinterp.methods import Method
from fastinterp.ops.combine import LARGEST, Combine, Tensor
from fastinterp.ops.dtypes import DTYPE_NAMES, DType, parse_stored
from fastinterp.recipe.build import Builder
from fastinterp.recipe.document import Document, ErrorCollector, RecipeSource, Source, read, read_all
from fastinterp.recipe.gradients import gradient_warnings
from fastinterp.recipe.merge_groups import MergeGroup, Section, sidecar_paths
from fastinterp.recipe.mergekit_options import other_file
from fastinterp.recipe.parameters import Resolver
from fastinterp.recipe.references import (
    UNCHANGED,
    ModelRef,
    check_names,
    close_reference,
    in_order,
    model_ref,
    references,
)
from fastinterp.recipe.schema import RawRecipe, guessed_method, method_of, raw_recipe

if TYPE_CHECKING:
    from fastinterp.recipe.renaming import ShownNames
    from fastinterp.recipe.tokenizer import ChatTemplate, TokenizerSpec

__all__ = ["Recipe", "load_recipe", "load_recipes"]

CHOICES = {
    "rounding": ("nearest", "stochastic"),
    "fp8_overflow": ("saturate", "nonfinite"),
    "missing": ("error", "base", "skip"),
    "channels": ("same", "first"),
    "quantize": ("none", "same"),
    "out": ("model", "lora"),
}

NEAREST_CODES = (
    "`quantize: same` rounds codes to nearest: `rounding: stochastic` is not defined for it. Leave out one of the two"
)
# Keys about whole models, which say nothing of adapters.
_NOT_OF_ADAPTERS = ("slices", "modules", "missing", "channels", "quantize", "integers", "tokenizer", "tokenizer_source",
                    "chat_template")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A recipe: the models of a merge, its method and parameters, and how the output is stored.

    models        every model that is merged, once, in the order in which the method sees them where they are merged
                  whole; its base, if it uses one, is the first
    base          index of the recipe's base in `models`, or None
    origin        the model that config and tokenizer come from: base_model, else the first model listed; never an
                  earlier document, but what its config comes from
    parameters    arguments of the method, if they are the same for every tensor: name -> one value, or a tuple with one
                  per model other than the base; else None: see targets.py
    dtype         as mergekit's: dtype of the output, unless `out_dtype` says otherwise; None keeps each tensor's own,
                  or the one that holds those of all models
    rounding      "nearest" or "stochastic"
    seed          0 .. 2**64 - 1
    fp8_overflow  "saturate" or "nonfinite": what becomes of values beyond the range of an fp8 output
    missing       what becomes of tensors that not all models have in one shape: "error"; "base": they are copied from
                  the base, see `base_index`; "skip": the output has none of them
    channels      "same"; or "first": convolutions may have different numbers of input channels: see docs/RECIPES.md
    truncate_embeddings  whether embeddings are cut to the rows that all models have
    quantize      "none"; or "same": tensors that are quantised in `origin` are quantised anew, in the same format
    integers      the one of `models` whose integer tensors are taken where the models differ, or None: they must agree
    text          the recipe for receipts: the user's own text, or YAML of the mapping that was given
    file          what messages call the source, or None
    coefficients  the sum that the method returned, if that is the same for every tensor and known without reading any;
                  else None; read it through `combine`
    sections      what is put together of what
    base_model    as the recipe has it, whether the method uses it or not
    earlier       models, base_model and side-cars that are documents above this one: name -> index among them
    sidecars      further checkpoints that parameters name, each once
    tokenizer     what is wanted of the vocabulary; None: the tokenizer of `origin` as it is
    chat_template what is wanted of the chat template; None: that of `origin` as it is
    name          of a document that others build on, or None
    warnings      values that nothing uses
    document      where messages about it point to
    out           "model"; or "lora": the models are adapters, and so is the output
    rank          of an adapter that is written; None: exact where that is possible, else the sum of the ranks
    private       receipts and model cards name no model
    names         how they name models, if that is not as `shown_names` has it
    """

    method: Method
    models: tuple[ModelRef, ...]
    base: int | None
    origin: ModelRef
    parameters: Mapping[str, Any] | None
    dtype: DType | None
    out_dtype: DType | None
    rounding: str
    seed: int
    fp8_overflow: str
    missing: str
    channels: str
    truncate_embeddings: bool
    quantize: str
    integers: ModelRef | None
    text: str
    file: str | None
    coefficients: Combine | None
    sections: tuple[Section, ...] = field(repr=False)
    base_model: ModelRef | None
    earlier: Mapping[str, int]
    sidecars: tuple[ModelRef, ...]
    tokenizer: TokenizerSpec | None
    chat_template: ChatTemplate | None
    name: str | None
    warnings: tuple[RecipeError, ...] = field(repr=False, compare=False)
    document: Document = field(repr=False, compare=False)
    out: str = "model"
    rank: int | None = None
    private: bool = False
    names: ShownNames | None = None

    @property
    def groups(self) -> tuple[MergeGroup, ...]:
        return tuple(group for section in self.sections for group in section.groups)

    @cached_property
    def base_index(self) -> int:
        """Index in `models` of the one whose tensors count where they cannot be merged: base_model, else the first."""
        return self.models.index(self.base_model) if self.base_model in self.models else 0

    def made_by(self, model: ModelRef) -> int | None:
        """Index of the document above that makes a model. By its very name: `./mix` is a folder beside `mix`."""
        return self.earlier.get(str(model))

    @property
    def filters(self) -> bool:
        """Whether any value is for some tensors only."""
        levels = (level for group in self.groups for level in group.all_levels)
        return any(pattern is not None for level in levels for value in level.values() for pattern, _ in value.cases)

    def combine(self, tensor: str) -> Combine:
        """The sum that the method returns for the tensor of this name, where that is the same for every tensor.

        Raises: ValueError, if it is not.
        """
        if self.coefficients is None:
            raise ValueError("the sum of the method is not the same for every tensor")
        return self.coefficients

    def path_of(self, model: ModelRef) -> str:
        """The path at which the recipe names a model, or a side-car: `$.models[0].model`; `$`, if it does not."""
        # The long form has the path by itself.
        found = [self._written[known] for known in (model, ModelRef(model.path)) if known in self._written]
        return min(found)[1] if found else "$"

    @cached_property
    def _written(self) -> dict[ModelRef, tuple[int, str]]:
        """The models and side-cars that are named -> the first place: its number among all, and its path."""
        written = [(ModelRef.of(text), path) for text, path in references(self.document.value, "$")]
        written += sidecar_paths(self.method, self.sections).items()
        first: dict[ModelRef, tuple[int, str]] = {}
        for number, (model, path) in enumerate(written):
            first.setdefault(model, (number, path))
        return first

    def formula(self) -> str:
        """The merge in one line, then which model each symbol stands for; for people.

        out = x0 + 0.6*(x1 - x0) - 0.3*(x2 - x0)
        x0 = models/base
        ...

        Where the coefficients are not known beforehand, or differ by tensor, it is the method's own formula.
        """
        if self.coefficients is None:
            out = (
                self.method.doc.partition("out = ")[2].partition("\n")[0].partition("  ")[0]
                or f"{self.method.name}(x0, x1, ...)"
            )
            return "\n".join([f"out = {out}", *(f"x{i} = {name}" for i, name in enumerate(self.models))])
        weights, base = self.coefficients.weights, self.coefficients.base
        terms = [(w, f"x{i}" if base is None else f"(x{i} - x{base})") for i, w in enumerate(weights) if w != 0.0]
        if base is not None:
            terms.insert(0, (1.0, f"x{base}"))
        signed = "".join(
            f" {'-' if w < 0 else '+'} {'' if abs(w) == 1.0 else f'{abs(w):.9g}*'}{symbol}" for w, symbol in terms
        )
        unread = [i for i, w in enumerate(weights) if w == 0.0 and i != base]
        legend = [
            f"x{i} = {name}{' (weight 0: not read)' if i in unread else ''}" for i, name in enumerate(self.models)
        ]
        out = signed.removeprefix(" + ") if not signed.startswith(" - ") else "-" + signed.removeprefix(" - ")
        return "\n".join([f"out = {out}", *legend])


def load_recipe(source: RecipeSource, *, file: str | None = None) -> Recipe:
    """Read and check a recipe. Touches no checkpoint.

    source  path of a .yml, .yaml or .json file, YAML text (a str with a newline in it), or a mapping
    file    what messages call the source, if it is not a path
    Raises: RecipeError with path, file and line; MethodError (one of them), if models or parameters do not suit the
    method.
    """
    recipe = build(read(source, file), (), ErrorCollector())
    assert recipe is not None  # every error was raised
    return recipe


def load_recipes(source: Source, *, file: str | None = None) -> tuple[Recipe, ...]:
    """Read and check a recipe of one or more documents, which may use others by their `name`, as a model or base_model.

    In an order in which each uses those before it; the last is what is written: the one without a name, or the last one
    that no other uses.

    source  as that of `load_recipe`, or a list of mappings
    Raises: what load_recipe raises, and RecipeError, if a document has no name, one that is taken, or is never used.
    """
    return build_all(read_all(source, file), ErrorCollector())


def build_all(documents: Sequence[Document], collector: ErrorCollector) -> tuple[Recipe, ...]:
    """The recipes of a source; fewer than it has documents, if errors were collected."""
    if len(documents) > 1:
        documents = in_order(documents)
        check_names(documents, collector)
    recipes: list[Recipe] = []
    for document in documents:
        recipe = build(document, recipes, collector)
        if recipe is not None:
            recipes.append(recipe)
    if len(recipes) == len(documents) > 1:
        _check_used(recipes, collector)
    return tuple(recipes)


def _check_used(recipes: Sequence[Recipe], collector: ErrorCollector) -> None:
    used = {i for recipe in recipes for i in recipe.earlier.values()}
    for i, recipe in enumerate(recipes[:-1]):
        if recipe.quantize != "none":
            with collector:
                raise recipe.document.error(
                    "`quantize` is about what is written: it belongs into the last document", "$.quantize"
                )
        if i not in used and recipe.name is not None:
            with collector:
                message = f"{shown(recipe.name)} is never used by another document"
                meant = close_reference(recipe.name, [r.document for r in recipes[i + 1 :]])
                raise recipe.document.error(
                    f"{message}{meant or '. Only one is written: that without a name, or the last'}", "$.name"
                )


def build(document: Document, above: Sequence[Recipe], collector: ErrorCollector) -> Recipe | None:
    """The recipe of one document; None, if errors were collected that leave nothing to build.

    above   those of the documents above it
    """
    raw, method, guessed = _raw_recipe(document, collector)
    if raw is None:
        return None
    names = {recipe.name: i for i, recipe in enumerate(above) if recipe.name is not None}
    builder = Builder(document, raw, method, tuple(names), collector, guessed=guessed)
    sections = builder.sections()
    settings = _settings(document, raw, builder, collector)
    if not builder.models or guessed:
        return None
    parameters, coefficients = None, None
    gradients: list[RecipeError] = []
    if not collector.errors:
        with collector:
            parameters, coefficients = _constants(document, method, sections)
        gradients = list(gradient_warnings(document, method, sections))
    origin = builder.base_model or next(model for model in builder.models if model is not UNCHANGED)
    sidecars = tuple(sidecar_paths(method, sections))
    used = (*builder.models, *([] if builder.base_model is None else [builder.base_model]), *sidecars)
    return Recipe(
        method=method,
        models=tuple(builder.models),
        base=None if builder.base is None else 0,
        origin=above[names[str(origin)]].origin if str(origin) in names else origin,
        parameters=parameters,
        rounding=raw.rounding,
        seed=raw.seed,
        fp8_overflow=raw.fp8_overflow,
        missing=raw.missing,
        channels=raw.channels,
        truncate_embeddings=raw.truncate_embeddings,
        quantize=raw.quantize,
        text=document.text,
        file=document.file,
        coefficients=coefficients,
        sections=sections,
        base_model=builder.base_model,
        earlier={str(model): names[str(model)] for model in used if str(model) in names},
        sidecars=sidecars,
        name=raw.name,
        warnings=(*builder.levels.warnings, *gradients),
        document=document,
        out=raw.out,
        rank=raw.rank,
        **settings,
    )


def _raw_recipe(document: Document, collector: ErrorCollector) -> tuple[RawRecipe | None, Method, bool]:
    """(the document's keys, its method, whether that is a stand-in for an unknown one, whose error was collected)"""
    name = document.value.get("merge_method") if isinstance(document.value, dict) else None
    method: Method | None = None
    if (other := other_file(document.value)) is not None:
        with collector:
            raise document.error(other[1], f"$.{other[0]}")
        return None, guessed_method(name), True
    if isinstance(name, str):
        with collector:  # before anything else: recipes of other programs have other keys
            method = method_of(document, name)
    raw = raw_recipe(document, collector)
    if raw is None and isinstance(document.value, dict):  # no method is named; the other keys are looked at
        raw = raw_recipe(replace(document, value={**document.value, "merge_method": ""}), collector)
    return raw, method or guessed_method(name), method is None


def _settings(document: Document, raw: RawRecipe, builder: Builder, collector: ErrorCollector) -> dict[str, Any]:
    """The keys that do not say what is merged, as arguments of Recipe."""
    settings: dict[str, Any] = dict.fromkeys(("dtype", "out_dtype", "integers", "tokenizer", "chat_template"))
    with collector:
        settings["dtype"] = _dtype(document, raw.dtype, "$.dtype")
    with collector:
        settings["out_dtype"] = _dtype(document, raw.out_dtype, "$.out_dtype")
    for key in CHOICES:
        with collector:
            _check_choice(document, getattr(raw, key), key)
    with collector:
        _check_seed(document, raw.seed)
    with collector:
        if raw.quantize == "same" and raw.rounding == "stochastic":
            raise document.error(NEAREST_CODES, "$.quantize")
    with collector:
        _check_adapter_keys(document, raw)
    with collector:
        settings["integers"] = _integers(document, raw, builder.models)
    if raw.tokenizer is not None or raw.tokenizer_source is not None:
        from fastinterp.recipe.tokenizer import tokenizer_spec

        settings["tokenizer"] = tokenizer_spec(document, raw, builder.models, builder.base_model, collector)
    if raw.chat_template is not None:
        from fastinterp.recipe.tokenizer import chat_template

        with collector:
            settings["chat_template"] = chat_template(document, raw.chat_template)
    return settings


def _constants(
    document: Document, method: Method, sections: tuple[Section, ...]
) -> tuple[Mapping[str, Any] | None, Combine | None]:
    """(parameters, coefficients) of a recipe that is one group and the same for every tensor; else None each.

    The method of others is run all the same, where that needs no tensor, and a generator up to its first request, to
    find errors of parameters.
    """
    parameters, coefficients = None, None
    groups = [group for section in sections for group in section.groups if not group.copies]
    for group in groups:
        if group.is_constant:
            parameters = Resolver(document, method, group).parameters("", ("",) * len(group.sources), None)
            if method.generator:
                run_to_first_request(document, method, group, parameters)
            elif method.fn.__code__.co_argcount == 1:
                coefficients = _coefficients(document, method, group, parameters)
    if len(groups) != 1 or sections[0].stacked or sections[0].name is not None:
        return None, None
    return {p.name: parameters[p.keyword] for p in method.parameters} if parameters is not None else None, coefficients


def _dtype(document: Document, name: str | None, path: str) -> DType | None:
    dtype = None if name is None else parse_stored(name)
    if name is not None and dtype is None:
        raise document.error(f"unknown dtype `{clipped(name)}`{suggestion(name, DTYPE_NAMES)}", path)
    return dtype


def _check_choice(document: Document, word: str, key: str) -> None:
    if word not in CHOICES[key]:
        raise document.error(f"`{key}` must be {' or '.join(CHOICES[key])}, got {shown(word)}", f"$.{key}")


def _check_seed(document: Document, seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise document.error(f"`seed` must be in 0..2**64-1, got {shown(seed)}", "$.seed")


def _check_adapter_keys(document: Document, raw: RawRecipe) -> None:
    """Raises: RecipeError, if `out: lora` stands beside what only whole models have, or `rank` without it."""
    if raw.out != "lora":
        if raw.rank is not None:
            raise document.error("`rank` is that of an adapter: it needs `out: lora`", "$.rank")
        return
    for key in _NOT_OF_ADAPTERS:
        if key in document.value:
            raise document.error(f"`{key}` has no meaning for adapters (`out: lora`). Remove it", f"$.{key}")
    if raw.rank is not None and raw.rank < 1:
        raise document.error(f"`rank` must be at least 1, got {shown(raw.rank)}", "$.rank")


def _integers(document: Document, raw: RawRecipe, models: Sequence[ModelRef]) -> ModelRef | None:
    if raw.integers is None:
        return None
    model = model_ref(document, raw.integers, "$.integers")
    if model not in models:
        raise document.error(f"`integers` must name a model that is merged, got {shown(str(model))}", "$.integers")
    return models[models.index(model)]


def run_to_first_request(document: Document, method: Method, group: MergeGroup, parameters: Mapping[str, Any]) -> None:
    """Run a generator method up to its first request, for a made-up tensor: errors by then are those of parameters.

    Raises: MethodError with path and line.
    """
    try:
        next(method(len(group.sources), Tensor("", (2, 2), model_numel=4), **parameters), None)
    except MethodError as error:
        path = _path_of_parameter(method, group, error.message)
        raise document.error(error.message, path, kind=MethodError) from None


def _path_of_parameter(method: Method, group: MergeGroup, message: str) -> str:
    """Where the parameter that a message names last has its one value; if it has several, where the group stands."""
    named = [p.name for p in method.parameters if f"`{p.name}`" in message]
    for name in sorted(named, key=lambda name: -message.rindex(f"`{name}`")):
        paths = {level[name].path for level in group.all_levels if name in level}
        if paths:
            return paths.pop() if len(paths) == 1 else group.path
    return group.path


def _coefficients(
    document: Document, method: Method, group: MergeGroup, parameters: Mapping[str, Any]
) -> Combine | None:
    """The sum that the method returns, whatever the tensor; None, if that depends on the tensor.

    Raises: MethodError with path and line, also for a coefficient that float32 cannot hold.
    """
    if method.generator or method.fn.__code__.co_argcount > 1:
        return None
    n = len(group.sources)
    try:
        total = method(n, **parameters)
    except MethodError as error:
        raise document.error(error.message, group.path, kind=MethodError) from None
    if not isinstance(total, Combine):
        return None
    row = total.row()
    largest = max([abs(row.total), *(abs(w) for w in total.weights)])
    if not largest <= LARGEST:
        raise document.error(
            f"the parameters make a coefficient of {largest:g}, beyond float32's 3.4e38", group.path, kind=MethodError
        )
    return total
