"""The value of one parameter: a number or word, a gradient over the layers, or filters by tensor name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from fastinterp.errors import RecipeError
from fastinterp.messages import clipped, shown, suggestion
from fastinterp.methods import Parameter
from fastinterp.recipe import blocks
from fastinterp.recipe.blocks import BlockFilter, ForeignBlock
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.layers import LayerPosition

Filter = str | BlockFilter  # a part of tensor names, or the block of a U-Net that a tensor is in


def matches(pattern: Filter | None, tensor: str) -> bool:
    """Whether the filter covers a tensor; None covers all."""
    if isinstance(pattern, BlockFilter):
        return pattern.matches(tensor)
    return pattern is None or pattern in tensor


class Value(msgspec.Struct, frozen=True):
    """The value of a parameter in a recipe, checked.

    cases  (filter, value): the first counts whose filter matches the tensor's name; None matches all names. A value
           is what the method takes, or a tuple of numbers: a gradient
    path   where it stands in the recipe
    paths  where each of the cases does
    """

    cases: tuple[tuple[Filter | None, Any], ...]
    path: str
    paths: tuple[str, ...]

    @property
    def matches_all(self) -> bool:
        return self.cases[-1][0] is None

    @property
    def is_constant(self) -> bool:
        """Whether it is the same for all tensors."""
        return self.cases[0][0] is None and not isinstance(self.cases[0][1], tuple)

    def case(self, name: str) -> int | None:
        """The index of the case that the tensor of this name gets; None, if none matches."""
        return next((i for i, (pattern, _) in enumerate(self.cases) if matches(pattern, name)), None)

    def refusal(self, case: int) -> str:
        """Why a tensor must not get the value of this case; empty, if it may."""
        pattern = self.cases[case][0]
        return pattern.message if isinstance(pattern, ForeignBlock) else ""

    def pick(self, case: int, position: LayerPosition | None) -> Any:
        """The value of the case for a tensor there; one in no layer (None) gets a gradient's first number."""
        value = self.cases[case][1]
        return between(value, position) if isinstance(value, tuple) else value


def between(numbers: Sequence[float], position: LayerPosition | None) -> float:
    """Linear between the numbers, which are spread evenly from the first layer to the last. A lone layer gets the last.

    With t = index / (layers - 1) and L numbers it is number t * (L - 1), counted from 0.
    """
    if position is None:
        return numbers[0]
    index, layers = position
    if layers == 1:
        return numbers[-1]
    low, rest = divmod(index * (len(numbers) - 1), layers - 1)
    if rest == 0 or numbers[low] == numbers[low + 1]:
        return numbers[low]
    share = rest / (layers - 1)
    return numbers[low] * (1.0 - share) + numbers[low + 1] * share


def parse(document: Document, parameter: Parameter, raw: Any, path: str, collector: ErrorCollector) -> Value | None:
    """The value at `path`, checked against the parameter's declaration; None, if errors of its items were collected.

    Raises: RecipeError with path and line.
    """
    items: list[Any]
    if isinstance(raw, dict) and parameter.key is None:
        items, paths = [raw], [path]
    elif isinstance(raw, list):
        items, paths = raw, [f"{path}[{i}]" for i in range(len(raw))]
    else:
        return Value(((None, _one(document, parameter, raw, path)),), path, (path,))
    if not items:
        raise document.error(f"`{parameter.name}` has an empty list", path)
    if not any(isinstance(item, dict) and not _is_word(parameter, item) for item in items):
        numbers = _gradient(document, parameter, items, paths, path, collector)
        return None if numbers is None else Value(((None, numbers),), path, (path,))
    cases: list[tuple[Filter | None, Any, str]] = []
    before = len(collector.errors)
    for item, at in zip(items, paths, strict=True):
        with collector:
            if isinstance(item, dict) and list(item) == [blocks.KEY]:
                cases += _of_blocks(document, parameter, item[blocks.KEY], at)
            elif (case := _case(document, parameter, item, at, collector)) is not None:
                cases.append((*case, at))
    if len(collector.errors) > before:
        return None
    for i, (pattern, _, at) in enumerate(cases[:-1]):
        if pattern is None:
            message = f"what follows is never used: {at} matches every tensor. Put it last"
            raise document.error(message, cases[i + 1][2])
    return Value(tuple(case[:2] for case in cases), path, tuple(case[2] for case in cases))


def _of_blocks(
    document: Document, parameter: Parameter, raw: Any, path: str
) -> list[tuple[BlockFilter | None, Any, str]]:
    """The cases of `{blocks: [...]}`. Raises: RecipeError."""
    found = blocks.expanded(document, raw, path)
    if not parameter.varies:
        raise document.error(f"`{parameter.name}` is no number, so it has no `blocks`. Use filters", path)
    return [(pattern, _one(document, parameter, number, at), at) for pattern, number, at in found]


def _is_word(parameter: Parameter, item: dict[str, Any]) -> bool:
    return parameter.key is not None and list(item) == [parameter.key]


def _case(
    document: Document, parameter: Parameter, item: Any, path: str, collector: ErrorCollector
) -> tuple[str | None, Any] | None:
    """One `{filter, value}`; None, if errors of it were collected."""
    if not isinstance(item, dict):
        message = (
            f"numbers and filters do not mix in one list: expected `{{filter: ..., value: ...}}`, got {shown(item)}"
        )
        raise document.error(message, path)
    before = len(collector.errors)
    for key in item:
        if key not in ("filter", "value"):
            with collector:
                known = suggestion(key, ("filter", "value"))
                raise document.error(f"unknown key `{clipped(key)}`{known}", path, at=f"{path}.{key}")
    pattern = item.get("filter")
    if pattern is not None and (not isinstance(pattern, str) or not pattern):
        with collector:
            message = f"`filter` must be text, a part of tensor names, got {shown(pattern)}"
            raise document.error(message, f"{path}.filter")
    if "value" not in item:
        raise document.error("the key `value` is missing", path)
    raw, at = item["value"], f"{path}.value"
    if isinstance(raw, list) and raw:
        paths = [f"{at}[{i}]" for i in range(len(raw))]
        value: Any = _gradient(document, parameter, raw, paths, at, collector)
    else:
        value = _one(document, parameter, raw, at)
    return None if len(collector.errors) > before else (None if pattern == "*" else pattern, value)


def _gradient(
    document: Document,
    parameter: Parameter,
    items: list[Any],
    paths: Sequence[str],
    path: str,
    collector: ErrorCollector,
) -> tuple[float, ...] | None:
    """The numbers of a gradient; None, if errors of them were collected."""
    if not parameter.varies:
        raise document.error(
            f"`{parameter.name}` cannot have a gradient (a list of numbers): there is nothing between its values. Give "
            f"one value, {'one under each model, ' if parameter.each else ''}or filters (`filter`, `value`)",
            path,
        )
    numbers: list[float] = []
    for item, at in zip(items, paths, strict=True):
        with collector:
            if item is None:  # a parameter may be nothing, but there is no way from nothing to a number
                raise document.error(f"a gradient consists of numbers, got {shown(item)}", at)
            numbers.append(_one(document, parameter, item, at))
    return tuple(numbers) if len(numbers) == len(items) else None


def _one(document: Document, parameter: Parameter, raw: Any, path: str) -> Any:
    try:
        return parameter.value(_from_text(parameter, raw))
    except ValueError as error:
        raise document.error(f"{error}{_hint_for_text(raw)}", path) from None


def _from_text(parameter: Parameter, raw: Any) -> Any:
    """The number or truth value that a text stands for, where the parameter is one; else `raw` itself.

    YAML 1.1 reads `1e-5` as text, and everything in quotes.
    """
    if not isinstance(raw, str) or not (parameter.kind is bool or parameter.kind in (int, float)):
        return raw
    if parameter.kind is bool:
        return {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}.get(raw.lower(), raw)
    try:
        return float(raw)
    except ValueError:
        return raw


def _hint_for_text(raw: Any) -> str:
    """What may be meant by a text that is no number."""
    if not isinstance(raw, str):
        return ""
    if raw.endswith("%") and raw[:-1].replace(".", "", 1).isdecimal():
        return f". A fraction? Write {float(raw[:-1]) / 100:g}"
    try:
        number = float(raw.replace(",", ".", 1))
    except ValueError:
        return ""
    if "," in raw:
        return f". A decimal comma? Write {number:g}"
    return "" if math.isfinite(number) else ". It must be finite"


def missing(document: Document, name: str, tensor: str, value: Value | None) -> RecipeError:
    """The error of a parameter without a default whose filters all miss a tensor."""
    return document.error(
        f"`{name}` has no value for the tensor {shown(tensor)}: no filter matches it. Add `- value: ...` as the last "
        "item",
        value.path if value else "$.parameters",
    )
