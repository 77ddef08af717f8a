"""The shape of a recipe: mergekit's YAML schema as far as it is supported, and what fastinterp adds to it."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import Method, clipped, find, names, suggestion
from fastinterp.recipe.document import Document


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


class Wish(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A whole recipe, every key of it in the right place and of the right type; values not yet judged."""

    merge_method: str
    models: list[Entry]
    base_model: str | Reference | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    fp8_overflow: str = "saturate"
    integers: str | Reference | None = None
    tokenizer_source: Any = None


# Keys of mergekit's that mean something, which we do not do yet, and what can be done instead.
_NOT_YET = {
    "slices": "Whole models go under `models`",
    "modules": "Whole models go under `models`",
    "tokenizer": "Remove the key to copy the tokenizer of base_model, else of the first model",
    "chat_template": "Remove the key to copy the chat template of base_model, else of the first model",
    "name": "It belongs to recipes of several documents; write one recipe a file",
    "lora": "Merge the LoRA into its model first",
    "override_architecture": "Leave it out; no architecture is needed",
}

_STRUCTS: dict[str, type[msgspec.Struct]] = {
    "$": Wish,
    "$.models[]": Entry,
    "$.models[].model": Reference,
    "$.models[].model.model": Place,
    "$.base_model": Reference,
    "$.base_model.model": Place,
    "$.integers": Reference,
    "$.integers.model": Place,
}

_PLAIN = {"object": "a mapping", "array": "a list", "str": "text", "int": "a whole number", "float": "a number",
          "bool": "true or false", "null": "nothing"}  # fmt: skip

# What a mapping at these places looks like.
_EXPECTED = {"$": ". A recipe starts with `merge_method: ...`", "$.models[]": ". Write `- model: NAME`"}


def check(document: Document) -> Wish:
    """The document as a Wish.

    Raises: RecipeError with path and line, if a key is unknown, missing or of the wrong type. MethodError before that,
    if there is no such method: its recipes have other keys.
    """
    try:
        return msgspec.convert(document.value, Wish)
    except msgspec.ValidationError as error:
        name = document.value.get("merge_method") if isinstance(document.value, dict) else None
        if isinstance(name, str):
            method_of(document, name)
        raise _explained(document, str(error)) from None


def method_of(document: Document, name: str) -> Method:
    """The method that the recipe names.

    Raises: MethodError with path and line, if there is none.
    """
    try:
        return find(name)
    except MethodError as error:
        raise document.error(error.message, "$.merge_method", kind=MethodError) from None


def _explained(document: Document, message: str) -> RecipeError:
    """msgspec's message in our words: it ends in the path, unless that is the root."""
    what, _, path = message.partition(" - at `")
    path = path.removesuffix("`") or "$"
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        return _unknown(document, found[1], path)
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        return document.error(f"the key `{found[1]}` is missing", path)
    if found := re.fullmatch(r"Expected `(.*)`, got `(.*)`", what):
        expected = " or ".join(_PLAIN.get(kind, kind) for kind in found[1].split(" | "))
        hint = _EXPECTED.get(re.sub(r"\[\d+\]", "[]", path), "") if found[1] == "object" else ""
        return document.error(f"expected {expected}, got {_PLAIN.get(found[2], found[2])}{hint}", path)
    return document.error(what, path)


def _unknown(document: Document, key: str, path: str) -> RecipeError:
    at = f"{path}.{key}"
    if key in _NOT_YET:
        return document.error(f"`{key}` is not supported yet. {_NOT_YET[key]}", path, at=at)
    struct = _STRUCTS.get(re.sub(r"\[\d+\]", "[]", path))
    known = struct.__struct_fields__ if struct else ()
    if struct in (Wish, Entry):
        parameters = _parameter_names(document)
        if key in parameters:
            return document.error(f"unknown key `{key}`: what a method takes goes under `parameters`", path, at=at)
        known += parameters if struct is Entry else ()
    return document.error(f"unknown key `{clipped(key)}`{suggestion(key, known)}", path, at=at)


def _parameter_names(document: Document) -> tuple[str, ...]:
    """What the recipe's method takes, as far as the unchecked document names one."""
    name = document.value.get("merge_method")
    return tuple(p.name for p in find(name).parameters) if name in names() else ()
