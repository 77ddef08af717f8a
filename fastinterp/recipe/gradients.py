"""Warnings about lists that are read as gradients over the layers, and were hardly meant so: they change nothing, or
have a number for each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from fastinterp.errors import RecipeError
from fastinterp.methods import Method, Parameter
from fastinterp.recipe.document import Document
from fastinterp.recipe.merge_groups import MergeGroup, Section
from fastinterp.recipe.values import Value

_NORMALIZING = ("normalize", "normalize_weights")  # parameters that divide the weights by their sum
_DIVIDED = "weight"

Cases = list[tuple[Any, Any]]  # (filter, value): the first whose filter matches counts


def gradient_warnings(document: Document, method: Method, sections: Sequence[Section]) -> Iterator[RecipeError]:
    """Each value once, at the place where it is written.

    Of a weight that all models have in common and that is divided by the sum of the weights; and of a list of as many
    numbers as there are models, in `parameters` that are not those of one model.
    """
    told: set[str] = set()
    for group in (group for section in sections for group in section.groups if not group.copies):
        for warning in (*_divided_away(document, method, group), *_one_per_model(document, method, group)):
            path = warning.path or "$"
            if not any(path.startswith(known) for known in told):
                told.add(path)
                yield warning


def _divided_away(document: Document, method: Method, group: MergeGroup) -> Iterator[RecipeError]:
    """Weights that differ by layer or tensor, but by the same factor for all models."""
    parameter = next((p for p in method.parameters if p.name == _DIVIDED and p.each), None)
    if parameter is None or not _divides(method, group):
        return
    chains = [_chain(group, parameter, i) for i in range(group.has_base, len(group.sources))]
    values = [value for chain in chains for value in chain]
    varying = [value for value in values if not value.is_constant]
    if not varying or not _in_proportion([_cases(chain, parameter) for chain in chains]):
        return
    value = varying[0]
    what = "a list is a gradient over the layers" if _gradient(value) else "filters choose by tensor"
    by = next((p.name for p in method.parameters if p.name in _NORMALIZING), method.name)
    lone = len(chains) == 1
    same = "and there is one model" if lone else "the same for all models"
    remedy = f"Write `{by}: false`" if lone and by != method.name else _UNDER_EACH
    yield document.error(
        f"`{_DIVIDED}` changes nothing: {what}, {same}, and `{by}` divides it away. {remedy}", value.path
    )


_UNDER_EACH = "Per model, write it under each model: `- {model: NAME, parameters: {weight: 0.3}}`"


def _divides(method: Method, group: MergeGroup) -> bool:
    """Whether only the ratios of the models' weights count, for every tensor."""
    if method.relative:
        return True
    named = [p for p in method.parameters if p.name in _NORMALIZING]
    # Presets of these other than the default divide by a number of models.
    presets = [p for p in method.parameters if p.name == "preset"] if method.elects else []
    return bool(named) and all(_always(group, p, True) for p in named) and all(_always(group, p) for p in presets)


def _always(group: MergeGroup, parameter: Parameter, wanted: Any = None) -> bool:
    """Whether a parameter of the whole merge has this value, or its default, for all tensors."""
    wanted = parameter.default if wanted is None else wanted
    cases = _cases(_chain(group, parameter, None), parameter)
    return all(value == wanted for _, value in cases)


def _chain(group: MergeGroup, parameter: Parameter, i: int | None) -> list[Value]:
    """The values of source i that may be used, the nearest first; the last one, or the default, is for all tensors."""
    chain: list[Value] = []
    for level in group.levels_of(i):
        if parameter.name in level:
            chain.append(level[parameter.name])
            if chain[-1].matches_all:
                break
    return chain


def _cases(chain: Sequence[Value], parameter: Parameter) -> Cases:
    cases: Cases = [case for value in chain for case in value.cases]
    return cases if chain and chain[-1].matches_all else [*cases, (None, parameter.default)]


def _in_proportion(every: Sequence[Cases]) -> bool:
    """Whether the numbers of each differ, but from those of the others by one factor: under the same filters, with one
    sign. A number and a gradient of it are the same.
    """
    first, *others = every
    numbers = [_numbers(value) for _, value in first]
    flat = [x for some in numbers for x in some]
    if len(set(flat)) < 2 or not (min(flat) > 0 or max(flat) < 0):
        return False
    for cases in others:
        if [pattern for pattern, _ in cases] != [pattern for pattern, _ in first]:
            return False
        mine = [_numbers(value) for _, value in cases]
        if [len(some) for some in mine] != [len(some) for some in numbers]:
            return False
        ratios = [y / x for x, y in zip(flat, (y for some in mine for y in some), strict=True)]
        if not ratios[0] > 0 or any(abs(ratio - ratios[0]) > 1e-12 * ratios[0] for ratio in ratios):
            return False
    return True


def _numbers(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    if not isinstance(value, tuple):
        return (value,)
    return value[:1] if len(set(value)) == 1 else value


def _gradient(value: Value) -> bool:
    return any(isinstance(case, tuple) for _, case in value.cases)


def _one_per_model(document: Document, method: Method, group: MergeGroup) -> Iterator[RecipeError]:
    """Gradients with as many numbers as there are models, with the base or without it."""
    counts = {len(group.sources), len(group.sources) - group.has_base} - {0, 1}
    each = {p.name: p.each for p in method.parameters}
    for name, value in (pair for level in group.levels for pair in level.items()):
        for (_, numbers), path in zip(value.cases, value.paths, strict=True):
            if not isinstance(numbers, tuple) or len(numbers) not in counts or len(set(numbers)) == 1:
                continue
            between = [numbers[0], *(x for a, b in pairwise(numbers) for x in ((a + b) / 2, b))]
            whose = "the same for every model" if each[name] else f"and `{name}` is one value for all models"
            under = f"under each model: `- {{model: NAME, parameters: {{{name}: {numbers[0]:g}}}}}`"
            per_model = f"Per model, write it {under}. " if each[name] else ""
            yield document.error(
                f"`{name}` [{_listed(numbers)}] has as many numbers as there are models, but a list is a gradient over "
                f"the layers, {whose}: {numbers[0]:g} in the first layer, {numbers[-1]:g} in the last. {per_model}For "
                f"the gradient, write [{_listed(between)}], which is the same",
                path,
            )


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.6g}" for number in numbers)
