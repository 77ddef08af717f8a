"""A recipe's parameters, matched with what its method declares: nothing unknown, nothing unused, nothing missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import Method, Parameter, clipped, shown, suggestion
from fastinterp.recipe.document import Document
from fastinterp.recipe.schema import Wish

_TOP = "$.parameters"


def resolve(
    document: Document, wish: Wish, method: Method, listed: tuple[str, ...], places: Sequence[int]
) -> Mapping[str, Any]:
    """Name -> value, or a tuple with one value per model other than the base. A model's own value goes before the
    top-level one, and that before the default.

    listed  the names of `wish.models`
    places  which of them are not the method's base
    Raises: RecipeError, if a parameter is unknown, not usable where it stands, never used, missing, or of a wrong type.
    """
    declared = {p.name: p for p in method.parameters}
    top = wish.parameters or {}
    for name in top:
        if name not in declared:
            raise _unknown(document, method, name, _TOP)
    for i, entry in enumerate(wish.models):
        for name in entry.parameters or {}:
            path = f"$.models[{i}].parameters"
            at = f"{path}.{name}"
            if name not in declared:
                raise _unknown(document, method, name, path)
            if not declared[name].each:
                raise document.error(f"`{name}` is one value for the whole merge. Write it in {_TOP}", path, at=at)
            if i not in places:
                message = f"`{name}` is never used here: {shown(listed[i])} is the base of the merge. Remove it"
                raise document.error(message, path, at=at)
    return {p.name: _each(document, wish, method, p, listed, places) if p.each else _one(document, method, p, top)
            for p in method.parameters}  # fmt: skip


def _one(document: Document, method: Method, parameter: Parameter, top: Mapping[str, Any]) -> Any:
    if parameter.name in top:
        return _value(document, parameter, top[parameter.name], _TOP)
    if parameter.required:
        message = f"`{method.name}` needs the parameter `{parameter.name}`. Write it in {_TOP}"
        raise document.error(message, at="$.merge_method", kind=MethodError)
    return parameter.default


def _each(
    document: Document, wish: Wish, method: Method, parameter: Parameter, listed: tuple[str, ...], places: Sequence[int]
) -> tuple[Any, ...]:
    name, top = parameter.name, wish.parameters or {}
    values, top_used = [], False
    for i in places:
        own = wish.models[i].parameters or {}
        if name in own:
            values.append(_value(document, parameter, own[name], f"$.models[{i}].parameters"))
        elif name in top:
            values.append(_value(document, parameter, top[name], _TOP))
            top_used = True
        elif parameter.required:
            message = f"`{method.name}` needs the parameter `{name}`, and {shown(listed[i])} has none"
            raise document.error(message, f"$.models[{i}]", kind=MethodError)
        else:
            values.append(parameter.default)
    if name in top and not top_used:
        message = f"`{name}` is never used here: every model has its own. Remove it"
        raise document.error(message, _TOP, at=f"{_TOP}.{name}")
    return tuple(values)


def _value(document: Document, parameter: Parameter, given: Any, path: str) -> Any:
    at = f"{path}.{parameter.name}"
    if isinstance(given, (list, dict)):
        filters = isinstance(given, dict) or any(isinstance(item, dict) for item in given)
        what = "filters (`filter`, `value`)" if filters else "gradients (a list of values)"
        raise document.error(f"{what} are not supported yet; give `{parameter.name}` one value", at)
    try:
        return parameter.value(given)
    except ValueError as error:
        raise document.error(f"{error}{_read_as_text(given)}", at) from None


def _read_as_text(given: Any) -> str:
    """YAML 1.1 takes 1e-3 for text: a number with an exponent needs a point, and a sign after the e."""
    if not isinstance(given, str):
        return ""
    try:
        number = float(given.replace(",", ".", 1))
    except ValueError:
        return ""
    if "," in given:
        return f". A decimal comma? Write {number:g}"
    return f". YAML reads it as text: write a point and a sign ({number:.1e}), and no quotes"


def _unknown(document: Document, method: Method, name: str, path: str) -> RecipeError:
    known = [p.name for p in method.parameters]
    message = f"unknown parameter `{clipped(name)}` of `{method.name}`{suggestion(name, known)}"
    return document.error(message, path, at=f"{path}.{name}")
