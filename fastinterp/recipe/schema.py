"""The shape of a recipe: mergekit's YAML schema as far as it is supported, and what fastinterp adds to it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, TypeVar

import msgspec

from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import Method, clipped, find, names, suggestion
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults

T = TypeVar("T")


class ModelPath(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{path, revision}` of a model reference; the form for paths that hold an `@` or `+`."""

    path: str
    revision: str | None = None


class Reference(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{model: ...}`: the long form of a model's name."""

    model: str | ModelPath


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
    """One item of `slices`; each of its sources is a Layers."""

    sources: list[Any]
    base_model: str | Reference | None = None
    parameters: dict[str, Any] | None = None


class Module(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of `modules`; its items as in Wish."""

    models: list[Any] | None = None
    slices: list[Any] | None = None
    parameters: dict[str, Any] | None = None


class Wish(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole recipe, its own keys known and of the right type.

    models, slices, modules  `converted` makes each of the items an Entry, a Slice, a Module
    tokenizer                what tokenizer.py makes sense of
    """

    merge_method: str
    models: list[Any] | None = None
    slices: list[Any] | None = None
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

_UNKNOWN = "(?s)Object contains unknown field `(.*)`"
_MISSING = "Object missing required field `(.*)`"
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

    Raises: RecipeError with path and line, if a key is unknown, missing or of the wrong type.
    """
    return converted(document, document.value, Wish, "$", faults or Faults())


def converted(document: Document, value: Any, kind: type[T], prefix: str, faults: Faults) -> T | None:
    """What stands at `prefix` as a `kind`. Gathering, it goes on without the keys that are wrong, and is None if one of
    them was needed.

    Raises: RecipeError with path and line.
    """
    removed: set[str] = set()
    while True:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            what, path = _split(str(error))
            unknown, missing = re.fullmatch(_UNKNOWN, what), re.fullmatch(_MISSING, what)
            if missing and path == "$" and _is_gone(missing[1], removed):
                return None
            with faults:
                raise _explained(document, what, prefix + path[1:], _struct_at(kind, path)) from None
            key = unknown[1] if unknown and path == "$" else path[2:].partition(".")[0].partition("[")[0]
            if not key:  # the value itself is wrong, or lacks something
                return None
            removed.add(key)
            value = {k: v for k, v in value.items() if k != key}


def _is_gone(key: str, removed: set[str]) -> bool:
    """Whether a key is missing because it, or what was meant to be it, was taken away."""
    import difflib  # as in `suggestion`: not on the path of a recipe without mistakes

    return bool(difflib.get_close_matches(key, removed, n=1))


def method_of(document: Document, name: str) -> Method:
    """The method that the recipe names.

    Raises: MethodError with path and line, if there is none.
    """
    try:
        return find(name)
    except MethodError as error:
        raise document.error(error.message, "$.merge_method", kind=MethodError) from None


def guessed_method(name: object) -> Method:
    """What stands for an unknown method while the rest of its recipe is checked: the one that was meant, if one is
    close, else one without parameters.
    """
    import difflib  # as in `suggestion`

    close = difflib.get_close_matches(name[:100].lower(), names(), n=1) if isinstance(name, str) else []
    found = find(close[0] if close else "linear")
    return replace(found, base="optional", models=(1, 2**16), parameters=found.parameters if close else ())


def known_parameters() -> tuple[str, ...]:
    """The names of all parameters of all methods."""
    return tuple(sorted({p.name for name in names() for p in find(name).parameters}))


def _split(message: str) -> tuple[str, str]:
    """msgspec's message: it ends in the path, unless that is the root."""
    what, _, path = message.partition(" - at `")
    return what, path.removesuffix("`") or "$"


def _struct_at(kind: Any, path: str) -> Any:
    """What a mapping at `path` inside a `kind` would be converted to."""
    return kind if path == "$" else ModelPath if path.endswith(".model") and path.count(".") > 1 else Reference


def _explained(document: Document, what: str, path: str, struct: Any) -> RecipeError:
    """msgspec's message in our words."""
    if found := re.fullmatch(_UNKNOWN, what):
        return _unknown(document, found[1], path, struct)
    if found := re.fullmatch(_MISSING, what):
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
    name = document.value.get("merge_method") if isinstance(document.value, dict) else None
    return tuple(p.name for p in find(name).parameters) if name in names() else known_parameters()
