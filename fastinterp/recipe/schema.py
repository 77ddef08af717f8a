"""The shape of a recipe: mergekit's YAML schema as far as it is supported, and what fastinterp adds to it."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import Method, clipped, find, names, suggestion
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults

T = TypeVar("T")


class Place(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{path, revision}` of a model reference; the form for paths that hold an `@` or `+`."""

    path: str
    revision: str | None = None


class Reference(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{model: ...}`: the long form of a model's name."""

    model: str | Place


class Entry(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of `models`."""

    model: str | Reference
    parameters: dict[str, Any] | None = None


class Layers(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of the `sources` of a slice."""

    model: str | Reference
    layer_range: list[int]
    parameters: dict[str, Any] | None = None


class Slice(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of `slices`."""

    sources: list[Layers]
    base_model: str | Reference | None = None
    parameters: dict[str, Any] | None = None


class Module(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of `modules`."""

    models: list[Entry] | None = None
    slices: list[Slice] | None = None
    parameters: dict[str, Any] | None = None


class Wish(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole recipe, every key of it in the right place and of the right type; values not yet judged.

    modules     name -> what `converted` makes a Module
    tokenizer   what tokenizer.py makes sense of
    """

    merge_method: str
    models: list[Entry] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Any] | None = None
    base_model: str | Reference | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    fp8_overflow: str = "saturate"
    integers: str | Reference | None = None
    tokenizer: dict[str, Any] | None = None
    tokenizer_source: str | Reference | None = None
    chat_template: str | None = None
    name: str | None = None


# Keys of mergekit's that are refused, and what can be done instead.
_REFUSED = {
    "lora": "is not supported yet. Merge the LoRA into its model first",
    "override_architecture": "is not supported yet. Leave it out; no architecture is needed",
    "residual_weight": "does nothing, in mergekit neither. Remove it",
}

_INSIDE = {"models[]": Entry, "slices[]": Slice, "slices[].sources[]": Layers}  # of a Wish or Module
_OF_PARAMETERS = (Wish, Entry, Layers, Slice, Module)  # with `parameters` beside the other keys

_PLAIN = {"object": "a mapping", "array": "a list", "str": "text", "int": "a whole number", "float": "a number",
          "bool": "true or false", "null": "nothing"}  # fmt: skip

# What a mapping at these places looks like.
_EXPECTED = {
    Wish: ". A recipe starts with `merge_method: ...`",
    Entry: ". Write `- model: NAME`",
    Layers: ". Write `- {model: NAME, layer_range: [0, 16]}`",
    Slice: ". Write `- sources: ...`",
}


def check(document: Document, faults: Faults | None = None) -> Wish | None:
    """The document as a Wish; None, if that cannot be and the faults are gathered.

    Raises: RecipeError with path and line, if a key is unknown, missing or of the wrong type. MethodError before that,
    if there is no such method: its recipes have other keys.
    """
    name = document.value.get("merge_method") if isinstance(document.value, dict) else None

    def no_such_method() -> None:
        if isinstance(name, str):
            method_of(document, name)

    return converted(document, document.value, Wish, "$", faults or Faults(), no_such_method)


def converted(
    document: Document, value: Any, kind: type[T], prefix: str, faults: Faults, before: Any = lambda: None
) -> T | None:
    """What stands at `prefix` as a `kind`. Gathering, it goes on without what is wrong, and is None if that was needed.

    before  called before an error is told; it may raise a better one
    Raises: RecipeError with path and line.
    """
    removed = False
    while True:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            what, path = _split(str(error))
            if removed and "missing required" in what:
                return None
            with faults:
                before()
                raise _explained(document, what, prefix + path[1:], _struct_at(kind, path)) from None
            value = _without(value, what, path)
            removed = True
            if value is None:
                return None


def method_of(document: Document, name: str) -> Method:
    """The method that the recipe names.

    Raises: MethodError with path and line, if there is none.
    """
    try:
        return find(name)
    except MethodError as error:
        raise document.error(error.message, "$.merge_method", kind=MethodError) from None


def _split(message: str) -> tuple[str, str]:
    """msgspec's message: it ends in the path, unless that is the root."""
    what, _, path = message.partition(" - at `")
    return what, path.removesuffix("`") or "$"


def _without(value: Any, what: str, path: str) -> Any:
    """A copy of `value` without what is wrong, or None if nothing would be left."""
    keys: list[Any] = [int(k[1:-1]) if k[0] == "[" else k[1:] for k in re.findall(r"\.[^.\[]+|\[\d+\]", path)]
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        keys.append(found[1])
    if not keys:
        return None

    def cut(node: Any, rest: list[Any]) -> Any:
        copy = node.copy()
        if len(rest) == 1:
            del copy[rest[0]]
        else:
            copy[rest[0]] = cut(copy[rest[0]], rest[1:])
        return copy

    return cut(value, keys)


def _struct_at(kind: Any, path: str) -> Any:
    """What a mapping at `path` inside a `kind` would be converted to."""
    shape = re.sub(r"\[\d+\]", "[]", path)[2:]
    if shape in _INSIDE or not shape:
        return _INSIDE.get(shape, kind)
    return Place if re.search(r"(model|integers|tokenizer_source)\.model$", shape) else Reference


def _explained(document: Document, what: str, path: str, struct: Any) -> RecipeError:
    """msgspec's message in our words."""
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return _unknown(document, found[1], path, struct)
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return document.error(f"the key `{found[1]}` is missing", path)
    if found := re.fullmatch(r"Expected `(.*)`, got `(.*)`", what):
        expected = " or ".join(_PLAIN.get(kind, kind) for kind in found[1].split(" | ") if kind != "null")
        hint = _EXPECTED.get(struct, "") if found[1] == "object" else ""
        return document.error(f"expected {expected}, got {_PLAIN.get(found[2], found[2])}{hint}", path)
    return document.error(what, path)


def _unknown(document: Document, key: str, path: str, struct: Any) -> RecipeError:
    at = f"{path}.{key}"
    if key in _REFUSED:
        return document.error(f"`{key}` {_REFUSED[key]}", path, at=at)
    known: tuple[str, ...] = struct.__struct_fields__
    if struct in _OF_PARAMETERS:
        parameters = _parameter_names(document)
        if key in parameters:
            return document.error(f"unknown key `{key}`: what a method takes goes under `parameters`", path, at=at)
        known += parameters if struct is not Wish else ()
    return document.error(f"unknown key `{clipped(key)}`{suggestion(key, known)}", path, at=at)


def _parameter_names(document: Document) -> tuple[str, ...]:
    """What the recipe's method takes, as far as the unchecked document names one."""
    name = document.value.get("merge_method")
    return tuple(p.name for p in find(name).parameters) if name in names() else ()
