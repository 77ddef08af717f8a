"""The schema of a recipe's keys: mergekit's as far as it is supported, and what fastinterp adds to it.

`raw_recipe` converts a document. Each part of it (an item of `models`, a slice, a token, ...) becomes an `Unchecked`,
which knows its type and its path; what reads the part calls `checked`, so that errors come in the order of reading.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, Generic, TypeVar

import msgspec

from fastinterp.errors import MethodError, RecipeError
from fastinterp.messages import clipped, closest, suggestion
from fastinterp.methods import Method, find, names
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.mergekit_options import instead_of_key

T = TypeVar("T")


class Unchecked(msgspec.Struct, Generic[T], frozen=True):
    """A part of a recipe as it is written, which is to be a T.

    path  where it stands in the document
    """

    document: Document
    value: Any
    kind: type[T]
    path: str

    def checked(self, collector: ErrorCollector) -> T | None:
        """The part as a T. Keys with errors are collected and left out; None, if one was needed.

        Raises: RecipeError with path and line.
        """
        value, kind = self.value, self.kind
        if isinstance(value, dict):
            value = {key: self._with_parts(key, inner) for key, inner in value.items()}
        removed: set[str] = set()
        while True:
            try:
                return msgspec.convert(value, kind)
            except msgspec.ValidationError as error:
                problem, path = _split(str(error))
                unknown, missing = re.fullmatch(_UNKNOWN, problem), re.fullmatch(_MISSING, problem)
                if missing and path == "$" and _was_removed(missing[1], removed):
                    return None
                with collector:
                    raise _translated(self.document, problem, self.path + path[1:], _struct_at(kind, path)) from None
                key = unknown[1] if unknown and path == "$" else path[2:].partition(".")[0].partition("[")[0]
                if not key:  # the value itself is wrong, or lacks something
                    return None
                removed.add(key)
                value = {k: v for k, v in value.items() if k != key}

    def _with_parts(self, key: str, value: Any) -> Any:
        """The value of one of the keys, with an Unchecked for each of its parts; if it is of a wrong type, as it is."""
        path, kind = f"{self.path}.{key}", _PARTS.get((self.kind, key))
        if kind is not None and isinstance(value, list):
            return [Unchecked(self.document, item, kind, f"{path}[{i}]") for i, item in enumerate(value)]
        if kind is not None and isinstance(value, dict):
            return {name: Unchecked(self.document, item, kind, f"{path}.{name}") for name, item in value.items()}
        if (self.kind, key) == (RawRecipe, "tokenizer") and isinstance(value, dict):
            return Unchecked(self.document, value, TokenizerItem, path)
        if (self.kind, key) == (TokenItem, "source") and isinstance(value, dict):
            row = _row_type(value)
            return value if row is None else Unchecked(self.document, value, row, path)
        return value


class ModelPath(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{path, revision}` of a model reference; the form for paths that hold an `@` or `+`."""

    path: str
    revision: str | None = None


class Reference(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{model: ...}`: the long form of a model's name.

    lora                   adapters that are added: a name, `{path, revision, scale}`, or a list of these
    scale                  of those that have none
    override_architecture  for mergekit, which needs one; has no effect
    """

    model: str | ModelPath
    lora: Any = None
    scale: float | None = None
    override_architecture: str | None = None


class ModelItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of `models`."""

    model: str | Reference
    parameters: dict[str, Any] | None = None


class SourceItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of the `sources` of a slice."""

    model: str | Reference
    layer_range: list[int]
    parameters: dict[str, Any] | None = None


class SliceItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One item of `slices`."""

    sources: list[Unchecked[SourceItem]]
    base_model: str | Reference | None = None
    residual_weight: float | None = None
    parameters: dict[str, Any] | None = None


class ModuleItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of `modules`."""

    models: list[Unchecked[ModelItem]] | None = None
    slices: list[Unchecked[SliceItem]] | None = None
    parameters: dict[str, Any] | None = None


class ZeroRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{kind: zero}` as the `source` of a token."""

    kind: str


class ModelTokenRow(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{kind: model_token, model: ..., token: ... or token_id: ...}` as the `source` of a token."""

    kind: str
    model: str | Reference
    token: str | None = None
    token_id: int | None = None


class TokenItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of `tokens` of a tokenizer.

    source  an Unchecked of Reference, ZeroRow or ModelTokenRow; all else, and a mapping of another kind, as written
    """

    source: Any = None
    force: bool = False


class TokenizerItem(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`tokenizer: ...`"""

    source: str | Reference = "union"
    tokens: dict[str, Unchecked[TokenItem]] | None = None
    pad_to_multiple_of: int | None = None


class RawRecipe(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One document of a recipe: all keys are known, and of the right type. Nothing else is checked yet."""

    merge_method: str
    models: list[Unchecked[ModelItem]] | None = None
    slices: list[Unchecked[SliceItem]] | None = None
    modules: dict[str, Unchecked[ModuleItem]] | None = None
    base_model: str | Reference | None = None
    parameters: dict[str, Any] | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    rounding: str = "nearest"
    seed: int = 0
    fp8_overflow: str = "saturate"
    missing: str = "error"
    channels: str = "same"
    truncate_embeddings: bool = False
    quantize: str = "none"
    integers: str | Reference | None = None
    tokenizer: Unchecked[TokenizerItem] | None = None
    tokenizer_source: str | Reference | None = None
    chat_template: str | None = None
    name: str | None = None
    out: str = "model"
    rank: int | None = None


# Keys with parts: each item of a list, or each value of a mapping.
_PARTS: dict[tuple[type, str], type] = {
    (RawRecipe, "models"): ModelItem,
    (RawRecipe, "slices"): SliceItem,
    (RawRecipe, "modules"): ModuleItem,
    (ModuleItem, "models"): ModelItem,
    (ModuleItem, "slices"): SliceItem,
    (SliceItem, "sources"): SourceItem,
    (TokenizerItem, "tokens"): TokenItem,
}

# Keys of mergekit that are refused, and the end of the message.
_REFUSED = {
    "lora": "is a key of a model's long form: `model: {model: NAME, lora: ADAPTER}`, or `model: NAME+ADAPTER`",
    "override_architecture": "is a key of a model's long form, `model: {model: ...}`, without effect. Leave it out",
    "residual_weight": "is a key of a slice, where it has no effect, in mergekit neither. Leave it out",
}

_UNKNOWN = "(?s)Object contains unknown field `(.*)`"
_MISSING = "Object missing required field `(.*)`"
_OF_PARAMETERS = (RawRecipe, ModelItem, SourceItem, SliceItem, ModuleItem)  # with `parameters` beside the other keys

_PLAIN = {"object": "a mapping", "array": "a list", "str": "text", "int": "a whole number", "float": "a number",
          "bool": "true or false", "null": "nothing"}  # fmt: skip

# What a mapping at these places looks like.
_EXPECTED = {
    RawRecipe: ". A recipe starts with `merge_method: ...`",
    ModelItem: ". Write `- model: NAME`",
    SourceItem: ". Write `- {model: NAME, layer_range: [0, 16]}`",
    SliceItem: ". Write `- sources: ...`",
}


def raw_recipe(document: Document, collector: ErrorCollector | None = None) -> RawRecipe | None:
    """The document as a RawRecipe; None, if the errors that were collected leave none.

    Raises: RecipeError with path and line, if a key of the document itself is unknown, missing or of the wrong type.
    """
    return Unchecked(document, document.value, RawRecipe, "$").checked(collector or ErrorCollector())


def _row_type(source: dict[str, Any]) -> type | None:
    """The type of a mapping that is the `source` of a token; None, if it is of an unknown kind."""
    if "kind" not in source:
        return Reference
    return ZeroRow if source["kind"] == "zero" else ModelTokenRow if source["kind"] == "model_token" else None


def _was_removed(key: str, removed: set[str]) -> bool:
    """Whether a key is missing because it, or a misspelling of it, was left out for its error."""
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
    """A stand-in for an unknown method while the rest of its recipe is checked: the closest one, if one is close, else
    one without parameters.
    """
    import difflib  # as in `suggestion`

    close = difflib.get_close_matches(name[:100].lower(), names(), n=1) if isinstance(name, str) else []
    method = find(close[0] if close else "linear")
    return replace(method, base="optional", models=(1, 2**16), parameters=method.parameters if close else ())


def known_parameters() -> tuple[str, ...]:
    """The names of all parameters of all methods."""
    return tuple(sorted({p.name for name in names() for p in find(name).parameters}))


def _split(message: str) -> tuple[str, str]:
    """(problem, path) of msgspec's message, which ends in the path, unless that is the root."""
    problem, _, path = message.partition(" - at `")
    return problem, path.removesuffix("`") or "$"


def _struct_at(kind: Any, path: str) -> Any:
    """The type that a mapping at `path` inside a `kind` would be converted to."""
    return kind if path == "$" else ModelPath if path.endswith(".model") and path.count(".") > 1 else Reference


def _translated(document: Document, problem: str, path: str, struct: Any) -> RecipeError:
    """The error for a problem as msgspec words it."""
    if unknown := re.fullmatch(_UNKNOWN, problem):
        return _unknown_key(document, unknown[1], path, struct)
    if missing := re.fullmatch(_MISSING, problem):
        return document.error(f"the key `{missing[1]}` is missing", path)
    if mismatch := re.fullmatch(r"Expected `(.*)`, got `(.*)`", problem):
        expected = " or ".join(_PLAIN.get(kind, kind) for kind in mismatch[1].split(" | ") if kind != "null")
        hint = _EXPECTED.get(struct, "") if mismatch[1] == "object" else ""
        if re.search(r"\.layer_range(\[\d+\])?$", path):
            hint = ". Write `layer_range: [first, end]`, as [0, 16]: two whole numbers, and end is not in it"
        return document.error(f"expected {expected}, got {_PLAIN.get(mismatch[2], mismatch[2])}{hint}", path)
    return document.error(problem, path)


def _unknown_key(document: Document, key: str, path: str, struct: Any) -> RecipeError:
    at = f"{path}.{key}"
    if key in _REFUSED:
        return document.error(f"`{key}` {_REFUSED[key]}", path, at=at)
    if instead := instead_of_key(key):
        return document.error(f"unknown key `{key}`: {instead}", path, at=at)
    known: tuple[str, ...] = struct.__struct_fields__
    if struct in _OF_PARAMETERS:
        parameters = _parameter_names(document)
        if key in parameters:
            return document.error(f"unknown key `{key}`: what a method takes goes under `parameters`", path, at=at)
        meant = closest(key.lower(), (*known, *parameters))
        if meant in parameters and meant not in known:
            message = f"unknown key `{clipped(key)}`, did you mean `{meant}`? It goes under `parameters`"
            return document.error(message, path, at=at)
    return document.error(f"unknown key `{clipped(key)}`{suggestion(key, known)}", path, at=at)


def _parameter_names(document: Document) -> tuple[str, ...]:
    """The parameters of the recipe's method, if the unchecked document names one; else those of all."""
    name = document.value.get("merge_method") if isinstance(document.value, dict) else None
    return tuple(p.name for p in find(name).parameters) if name in names() else known_parameters()
