"""Which tensors a recipe makes, of which inputs each, and with which parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastinterp.errors import ShapeError
from fastinterp.recipe.load import Recipe

_SHOWN = 5  # names that a message lists before it only counts them


@dataclass(frozen=True, slots=True)
class Target:
    """One output tensor.

    inputs         (index in Recipe.models, name of the tensor there), in the order in which the method sees them
    parameters     keyword -> what the method is given: one value, or a tuple with one per input other than the base
    layer, layers  as in Tensor
    copies         the method is not asked: the one input is copied
    has_base       the first input is the method's base
    """

    name: str
    inputs: tuple[tuple[int, str], ...]
    parameters: Mapping[str, Any]
    layer: int | None = None
    layers: int = 0
    copies: bool = False
    has_base: bool = False


def targets(recipe: Recipe, names: Sequence[Collection[str]]) -> list[Target]:
    """The tensors of whole models, in the order of the lead model: the base, else the first.

    names  of each of Recipe.models, those of its tensors
    Raises: ShapeError, if the models have different tensors.
    """
    lead = recipe.base or 0
    for i, found in enumerate(names):
        _check_same(recipe.models[lead], names[lead], recipe.models[i], found)
    parameters = {p.keyword: recipe.parameters[p.name] for p in recipe.method.parameters}
    inputs = range(len(names))
    based = recipe.base is not None
    return [Target(name, tuple((i, name) for i in inputs), parameters, has_base=based) for name in names[lead]]


def _check_same(lead: str, ours: Collection[str], other: str, theirs: Collection[str]) -> None:
    only = {lead: [n for n in ours if n not in theirs], other: [n for n in theirs if n not in ours]}
    if any(only.values()):
        found = [f"{model} alone has {_listed(names)}" for model, names in only.items() if names]
        raise ShapeError(
            f"the models have different tensors: {'; '.join(found)}. Only models of one architecture merge"
        )


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
