"""The value of one parameter: a number or word, a gradient over the layers, or filters by tensor name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

from fastinterp.errors import RecipeError
from fastinterp.methods import Parameter, clipped, shown, suggestion
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults

Place = tuple[int, int]  # index of a layer and how many there are: where a gradient is read


class Value(msgspec.Struct, frozen=True):
    """What a recipe gives for a parameter, checked.

    cases  (filter, value), the first whose filter is a part of the tensor's name counts; a filter of None matches all.
           A value is what the method takes, or a tuple of numbers: a gradient
    path   where it stands in the recipe
    paths  where each of the cases does
    """

    cases: tuple[tuple[str | None, Any], ...]
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
        """Which of the cases the tensor of this name gets; None, if none matches."""
        return next((i for i, (part, _) in enumerate(self.cases) if part is None or part in name), None)

    def pick(self, case: int, place: Place | None) -> Any:
        """What the case gives a tensor in that place; one in no layer (None) gets a gradient's first number."""
        value = self.cases[case][1]
        return between(value, place) if isinstance(value, tuple) else value


def between(numbers: Sequence[float], place: Place | None) -> float:
    """Linear between the numbers, which are spread evenly from the first layer to the last. A lone layer gets the last.

    With t = index / (layers - 1) and L numbers it is number t * (L - 1), counted from 0.
    """
    if place is None:
        return numbers[0]
    index, layers = place
    if layers == 1:
        return numbers[-1]
    low, rest = divmod(index * (len(numbers) - 1), layers - 1)
    if rest == 0 or numbers[low] == numbers[low + 1]:
        return numbers[low]
    share = rest / (layers - 1)
    return numbers[low] * (1.0 - share) + numbers[low + 1] * share


def parse(document: Document, parameter: Parameter, given: Any, path: str, faults: Faults) -> Value | None:
    """What stands at `path`, checked against what the parameter may be; None, if faults of its items were gathered.

    Raises: RecipeError with path and line.
    """
    if isinstance(given, dict) and parameter.key is None:
        given, paths = [given], [path]
    elif isinstance(given, list):
        paths = [f"{path}[{i}]" for i in range(len(given))]
    else:
        return Value(((None, _one(document, parameter, given, path)),), path, (path,))
    if not given:
        raise document.error(f"`{parameter.name}` has an empty list", path)
    if not any(isinstance(item, dict) and not _is_word(parameter, item) for item in given):
        numbers = _gradient(document, parameter, given, paths, path, faults)
        return None if numbers is None else Value(((None, numbers),), path, (path,))
    cases = []
    for item, at in zip(given, paths, strict=True):
        with faults:
            case = _case(document, parameter, item, at, faults)
            cases += [] if case is None else [case]
    if len(cases) < len(given):
        return None
    for i, (part, _) in enumerate(cases[:-1]):
        if part is None:
            message = f"what follows is never used: {paths[i]} matches every tensor. Put it last"
            raise document.error(message, paths[i + 1])
    return Value(tuple(cases), path, tuple(paths))


def _is_word(parameter: Parameter, item: dict[str, Any]) -> bool:
    return parameter.key is not None and list(item) == [parameter.key]


def _case(
    document: Document, parameter: Parameter, item: Any, path: str, faults: Faults
) -> tuple[str | None, Any] | None:
    """One `{filter, value}`; None, if faults of it were gathered."""
    if not isinstance(item, dict):
        message = (
            f"numbers and filters do not mix in one list: expected `{{filter: ..., value: ...}}`, got {shown(item)}"
        )
        raise document.error(message, path)
    before = len(faults.found)
    for key in item:
        if key not in ("filter", "value"):
            with faults:
                known = suggestion(key, ("filter", "value"))
                raise document.error(f"unknown key `{clipped(key)}`{known}", path, at=f"{path}.{key}")
    part = item.get("filter")
    if part is not None and (not isinstance(part, str) or not part):
        with faults:
            raise document.error(f"`filter` must be text, a part of tensor names, got {shown(part)}", f"{path}.filter")
    if "value" not in item:
        raise document.error("the key `value` is missing", path)
    value, at = item["value"], f"{path}.value"
    if isinstance(value, list) and value:
        paths = [f"{at}[{i}]" for i in range(len(value))]
        found: Any = _gradient(document, parameter, value, paths, at, faults)
    else:
        found = _one(document, parameter, value, at)
    return None if len(faults.found) > before else (None if part == "*" else part, found)


def _gradient(
    document: Document, parameter: Parameter, given: list[Any], paths: Sequence[str], path: str, faults: Faults
) -> tuple[float, ...] | None:
    """None, if faults of its numbers were gathered."""
    if not parameter.varies:
        raise document.error(
            f"`{parameter.name}` cannot have a gradient (a list of numbers): there is nothing between its values. Give "
            "one value, or filters (`filter`, `value`)",
            path,
        )
    numbers: list[float] = []
    for item, at in zip(given, paths, strict=True):
        with faults:
            if item is None:  # a parameter may be nothing, but there is no way from nothing to a number
                raise document.error(f"a gradient consists of numbers, got {shown(item)}", at)
            numbers.append(_one(document, parameter, item, at))
    return tuple(numbers) if len(numbers) == len(given) else None


def _one(document: Document, parameter: Parameter, given: Any, path: str) -> Any:
    try:
        return parameter.value(given)
    except ValueError as error:
        raise document.error(f"{error}{_read_as_text(given)}", path) from None


def _read_as_text(given: Any) -> str:
    """YAML 1.1 takes 1e-3 for text: a number with an exponent needs a point, and a sign after the e."""
    if not isinstance(given, str):
        return ""
    if given.endswith("%") and given[:-1].replace(".", "", 1).isdecimal():
        return f". A fraction? Write {float(given[:-1]) / 100:g}"
    try:
        number = float(given.replace(",", ".", 1))
    except ValueError:
        return ""
    if "," in given:
        return f". A decimal comma? Write {number:g}"
    if not math.isfinite(number):
        return ". It must be finite"
    if "e" not in given.lower():
        return f". Quoted it is text: write {number:g}, without quotes"
    return f". YAML reads it as text: write a point and a sign ({number:.1e}), and no quotes"


def missing(document: Document, name: str, tensor: str, value: Value | None) -> RecipeError:
    """The error of a parameter without a default whose filters all miss a tensor."""
    return document.error(
        f"`{name}` has no value for the tensor {shown(tensor)}: no filter matches it. Add `- value: ...` as the last "
        "item",
        value.path if value else "$.parameters",
    )
