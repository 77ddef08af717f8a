"""The plan of a merge of adapters with each other: which products become which, from headers alone."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora import LoraAdapter, LowRankModule, parse
from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, MethodError, ShapeError
from fastinterp.messages import counted, shown
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.plan.models import Model, model_of
from fastinterp.recipe.load import Recipe
from fastinterp.recipe.references import UNCHANGED
from fastinterp.recipe.targets import Assembly, Target

_SUM = 1e-6  # by which weights may miss a sum of 1
_COPY = ".base_layer."  # in the names of tensors of a layer that an adapter changes: the base's own, or trained


@dataclass(frozen=True, slots=True)
class Source:
    """One model of the recipe: an adapter; or None for the base, whose change of itself is zero."""

    name: str
    adapter: LoraAdapter | None
    model: Model | None


@dataclass(frozen=True, slots=True)
class PlannedProduct:
    """A weight that the output changes.

    name          of the weight in the base
    target        its inputs and parameters, as the recipe resolves them
    products      of each of the target's inputs, None where an adapter does not change the weight
    coefficients  of each product, if the method is a weighted sum: without the adapters' own scales; else None
    """

    name: str
    target: Target
    products: tuple[LowRankModule | None, ...]
    coefficients: tuple[float, ...] | None

    @property
    def label(self) -> str:
        """The module, as messages and configurations name it; of a parameter that is no `weight` that."""
        return self.name if self.first.parameters else self.first.module

    @property
    def first(self) -> LowRankModule:
        return next(product for product in self.products if product is not None)

    @property
    def rank(self) -> int:
        """The sum of the ranks of what is used."""
        used = self.coefficients or (1.0,) * len(self.products)
        return sum(p.rank for p, c in zip(self.products, used, strict=True) if p is not None and c)

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of b @ a, of one expert."""
        return self.first.b.shape[0], math.prod(self.first.a.shape[1:])


@dataclass(frozen=True, slots=True)
class PlannedWhole:
    """A tensor that replaces one of the base: the weighted sum of those of the adapters, whose weights add up to 1.

    name     in the output's file
    entries  (number of the source, tensor, weight)
    equal    they must have the same bytes, which are copied: weights do not add up to 1
    """

    name: str
    entries: tuple[tuple[int, Entry, float], ...]
    equal: bool = False


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What is merged.

    sources   in the order of Recipe.models
    products  in the order of the adapters
    """

    recipe: Recipe
    sources: tuple[Source, ...]
    products: tuple[PlannedProduct, ...]
    whole: tuple[PlannedWhole, ...]
    tokens: Any  # `trainable_token_indices`, or None
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def adapters(self) -> list[LoraAdapter]:
        return [source.adapter for source in self.sources if source.adapter is not None]

    @property
    def style(self) -> str:
        return self.adapters[0].style


def plan_adapters(recipe: Recipe) -> AdapterPlan:
    """The plan of a recipe with `out: lora`.

    Raises: CheckpointError, if a model is no adapter of low-rank products, or adapters are not of one base; ShapeError;
    MethodError.
    """
    if recipe.sidecars:
        raise recipe.document.error("side-cars belong to whole models, not to adapters (`out: lora`)", "$.parameters")
    sources = tuple(_source(recipe, i) for i in range(len(recipe.models)))
    adapters = [source for source in sources if source.adapter is not None]
    warnings = [*map(str, recipe.warnings), *_check_alike(adapters)]
    products = [{} if s.adapter is None else _by_weight(s.adapter) for s in sources]
    whole = [{} if s.adapter is None else dict(s.adapter.replaced) for s in sources]
    rows = [{} if s.adapter is None else {r.module: r for r in s.adapter.rows} for s in sources]
    weights = dict.fromkeys(name for of_one in products for name in of_one)
    others = dict.fromkeys(name for of_one in whole for name in of_one)
    tables = dict.fromkeys(f"{module}.weight" for of_one in rows for module in of_one)
    names = [*weights, *(name for name in {**others, **tables} if name not in weights)]
    targets = {target.name: target for target in Assembly(recipe, [names] * len(sources)).targets}
    for name in weights:
        if any(name in one and _COPY not in one[name].name for one in whole):
            raise _unmerged(f"{quote(name)} is changed by a product in one adapter and replaced as a whole in another")
    planned = [_product(recipe, targets[name], name, products, sources) for name in weights]
    kept = [product for product in planned if product.coefficients is None or any(_used(product))]
    made = [_replaced(recipe, targets[name], name, whole, sources) for name in others]
    made += [_rows(recipe, targets[f"{module}.weight"], module, rows, sources) for module in _modules(rows)]
    if not kept and not made:
        raise recipe.document.error("all weights are 0: the adapter would have no tensor", "$", kind=MethodError)
    remarks = []
    if len(kept) < len(planned):
        remarks.append(f"{counted(len(planned) - len(kept), 'module')} left out: their weights are 0")
    tokens = next(
        (a.config.get("trainable_token_indices") for a in (s.adapter for s in adapters) if a and a.rows), None
    )
    return AdapterPlan(recipe, sources, tuple(kept), tuple(made), tokens, tuple(warnings), tuple(remarks))


def _used(product: PlannedProduct) -> list[float]:
    assert product.coefficients is not None
    return [c for p, c in zip(product.products, product.coefficients, strict=True) if p is not None]


def _modules(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(module for of_one in rows for module in of_one))


def _source(recipe: Recipe, index: int) -> Source:
    ref = recipe.models[index]
    if ref is UNCHANGED:
        return Source(str(ref), None, None)
    if ref.adapters:
        raise recipe.document.error(
            f"{shown(str(ref))} has adapters behind `+`, which are added to a model. Of adapters (`out: lora`) list "
            "each as a model of its own",
            recipe.path_of(ref),
        )
    checkpoint = open_checkpoint(str(ref))
    if checkpoint.adapter is None or checkpoint.adapter.whole:
        if index == recipe.base and recipe.method.sums_deltas:
            return Source(str(ref), None, None)  # the model that the adapters change
        raise CheckpointError(
            f"this is a model, and `out: lora` merges adapters. Write an adapter of what it changed in its base first: "
            f"`fastinterp extract-lora {checkpoint.name} --base BASE --rank 32 -o NEW`; then name NEW",
            file=checkpoint.name,
        )
    return Source(str(ref), parse(checkpoint), model_of(checkpoint))


def _by_weight(adapter: LoraAdapter) -> dict[str, LowRankModule]:
    """Its products by the weights that they change."""
    found: dict[str, LowRankModule] = {}
    for module in adapter.modules:
        name = module.weight
        if name in found:
            raise CheckpointError(f"there are two products for {quote(name)}", file=adapter.checkpoint.name)
        if module.magnitude is not None:
            raise CheckpointError(
                f"it is of DoRA ({quote(module.magnitude.name)}): its changes are no sums of products, but depend on "
                "its base. Merge it into that (`model: BASE+ADAPTER`)",
                file=adapter.checkpoint.name,
                tensor=module.magnitude.name,
            )
        found[name] = module
    return found


def _check_alike(sources: Sequence[Source]) -> list[str]:
    """Warnings about adapters that may be of different bases. Raises: CheckpointError, if they cannot be of one."""
    first, *others = [source.adapter for source in sources if source.adapter is not None]
    warnings = []
    for other in others:
        name = other.checkpoint.name
        if other.style != first.style:
            raise CheckpointError(
                f"it has the names of {other.style}, but {quote(first.checkpoint.name)} those of {first.style}. "
                "Convert one with the program that loads both",
                file=name,
            )
        if other.fan_in_fan_out != first.fan_in_fan_out:
            raise CheckpointError(
                f"its `fan_in_fan_out` is {shown(other.fan_in_fan_out)}, that of {quote(first.checkpoint.name)} "
                f"{shown(first.fan_in_fan_out)}: their bases store weights in different layouts",
                file=name,
            )
        bases = [adapter.config.get("base_model_name_or_path") for adapter in (first, other)]
        if all(bases) and bases[0] != bases[1]:
            warnings.append(
                f"{name} was made for {shown(bases[1])}, {first.checkpoint.name} for {shown(bases[0])}: the sum of "
                "adapters of different models means nothing, unless these are copies of one"
            )
    return warnings


def _product(
    recipe: Recipe,
    target: Target,
    name: str,
    products: Sequence[Mapping[str, LowRankModule]],
    sources: Sequence[Source],
) -> PlannedProduct:
    mine = tuple(products[model].get(name) for model, _ in target.inputs)
    there = [(model, p) for (model, _), p in zip(target.inputs, mine, strict=True) if p is not None]
    (lead, first), *others = there
    for model, other in others:
        shapes = [(p.kind, p.a.shape[1:], p.b.shape[0], p.b.shape[2:]) for p in (first, other)]
        if shapes[0] != shapes[1] or first.a.shape[0] // first.rank != other.a.shape[0] // other.rank:
            raise ShapeError(
                f"the products for {quote(name)} do not fit each other: {list(first.b.shape)} x {list(first.a.shape)} "
                f"in {quote(sources[lead].name)}, {list(other.b.shape)} x {list(other.a.shape)} in "
                f"{quote(sources[model].name)}. The adapters are of different models",
                tensor=name,
            )
    shape = (first.b.shape[0], *first.a.shape[1:])
    return PlannedProduct(name, target, mine, _coefficients(recipe, target, shape))


def _coefficients(recipe: Recipe, target: Target, shape: tuple[int, ...]) -> tuple[float, ...] | None:
    """The weight of each input, if the method is a weighted sum whatever the tensors are; else None."""
    method = recipe.method
    if target.copies:
        return (1.0,)
    if method.generator:
        return None
    tensor = Tensor(target.name, shape, target.layer, target.layers, math.prod(shape))
    total = method(len(target.inputs), tensor, **target.parameters)
    if not isinstance(total, Combine):
        return None
    weights = list(total.weights)
    if total.base is not None:
        weights[total.base] = 1.0 - math.fsum(weights)
    return tuple(weights)


def _whole_weights(
    recipe: Recipe, target: Target, name: str, there: Collection[int], sources: Sequence[Source], *, copies: bool
) -> list[float] | None:
    """The weights of the sources that have a tensor, in the order of the target; None, if they must be equal instead.

    copies  they may be copies of the base's
    Raises: CheckpointError, if the base would have to be known.
    """
    weights = _coefficients(recipe, target, (1,))
    have = [sources[i].name for i in sorted(there)]
    what = f"{quote(name)} is not changed by a product, but replaced as a whole, in {listing(have)}"
    if weights is None:
        if copies:
            return None
        raise _unmerged(f"{what}, and `{recipe.method.name}` needs the base's for that. Use `linear`")
    used = [w for (model, _), w in zip(target.inputs, weights, strict=True) if model in there]
    if abs(math.fsum(used) - 1.0) > _SUM:
        if copies:
            return None
        raise _unmerged(
            f"{what}. Their weights add up to {math.fsum(used):g}, and only with 1 is the result known without the base"
        )
    return used


def _replaced(
    recipe: Recipe, target: Target, name: str, whole: Sequence[Mapping[str, Entry]], sources: Sequence[Source]
) -> PlannedWhole:
    there = [(model, whole[model][name]) for model, _ in target.inputs if name in whole[model]]
    if any(entry.shape != there[0][1].shape for _, entry in there):
        shapes = " and ".join(f"{list(entry.shape)} in {quote(sources[model].name)}" for model, entry in there[:2])
        raise ShapeError(f"{quote(name)} is {shapes}: the adapters are of different models", tensor=name)
    copies = all(_COPY in entry.name for _, entry in there)
    weights = _whole_weights(recipe, target, name, [model for model, _ in there], sources, copies=copies)
    if weights is None:
        return PlannedWhole(there[0][1].name, tuple((model, entry, 1.0) for model, entry in there), equal=True)
    entries = tuple((model, entry, w) for (model, entry), w in zip(there, weights, strict=True) if w)
    return PlannedWhole(_plain_name(entries[0][1].name), entries)


def _rows(
    recipe: Recipe, target: Target, module: str, rows: Sequence[Mapping[str, Any]], sources: Sequence[Source]
) -> PlannedWhole:
    there = [(model, rows[model][module]) for model, _ in target.inputs if module in rows[model]]
    if any(one.tokens != there[0][1].tokens or one.rows.shape != there[0][1].rows.shape for _, one in there):
        raise _unmerged(f"adapters replace rows of different tokens of {quote(module)} (`trainable_token_indices`)")
    models = [model for model, _ in there]
    weights = _whole_weights(recipe, target, f"{module}.weight", models, sources, copies=False) or []
    entries = tuple((model, one.rows, w) for (model, one), w in zip(there, weights, strict=True) if w)
    return PlannedWhole(re.sub(r"(trainable_tokens_delta)\.[^.]+$", r"\1", entries[0][1].name), entries)


def _plain_name(stored: str) -> str:
    """The name of a tensor as peft stores it, without that of the adapter."""
    return re.sub(r"\.modules_to_save(?:\.[^.]+)?(\.[^.]+)$", r"\1", stored)


def _unmerged(message: str) -> CheckpointError:
    return CheckpointError(f"{message}. Or merge the adapters into their base (`model: BASE+ADAPTER`), and that")
