"""What a recipe wants of tokenizer and chat template, as plain values: its keys `tokenizer` and `chat_template`.

`tokenizer_source: NAME` is `tokenizer: {source: NAME}`. Nothing here opens a model. Models are named as in
Recipe.models, or as the recipe's base_model where that is not merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from fastinterp.methods import clipped, shown, suggestion
from fastinterp.recipe.document import Document
from fastinterp.recipe.faults import Faults
from fastinterp.recipe.references import ModelRef, model_ref
from fastinterp.recipe.schema import Reference, Wish, converted

TEMPLATES = ("alpaca", "chatml", "exaone", "llama3", "mistral")  # as mergekit names them


@dataclass(frozen=True, slots=True)
class TokenSource:
    """The row of an embedding that a token gets.

    model            whose row; None: zeros
    token, token_id  which token of that model; both None: the one of the same text
    """

    model: ModelRef | None = None
    token: str | None = None
    token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenWish:
    """One entry of `tokens`: it is added to the vocabulary, if it is not in it.

    text    of the token
    source  where its row comes from in models that do not have it; None: as for a token that no entry names
    force   the source goes before the model's own row, too; with source None it changes nothing
    """

    text: str
    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerWish:
    """The vocabulary of the output, and where the rows of its embeddings come from.

    source              "union" of the vocabularies of all models, base first; "base": that of base_model;
                        "model": that of `model`
    model               whose vocabulary it is for "base" and "model"; None for "union"
    tokens              in the order of the recipe
    pad_to_multiple_of  the number of rows is rounded up to a multiple of it; None: not at all
    """

    source: Literal["union", "base", "model"]
    model: ModelRef | None = None
    tokens: tuple[TokenWish, ...] = ()
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of the output.

    kind  "auto": the one that most of the models have. "named": a well-known one. "jinja": as it stands in the recipe
    text  "alpaca", "chatml", "exaone", "llama3" or "mistral" for "named"; Jinja for "jinja"; empty for "auto"
    """

    kind: Literal["auto", "named", "jinja"]
    text: str = ""


class _Tokenizer(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`tokenizer: ...`"""

    source: str | Reference = "union"
    tokens: dict[str, Any] | None = None
    pad_to_multiple_of: int | None = None


class _Token(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One entry of its `tokens`."""

    source: Any = None
    force: bool = False


class _Zero(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{kind: zero}`"""

    kind: str


class _ModelToken(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """`{kind: model_token, model: ..., token: ... or token_id: ...}`"""

    kind: str
    model: str | Reference
    token: str | None = None
    token_id: int | None = None


def tokenizer_wish(
    document: Document, wish: Wish, models: Sequence[ModelRef], base_model: ModelRef | None, faults: Faults
) -> TokenizerWish | None:
    """What the keys `tokenizer` and `tokenizer_source` say; None, if it is wrong and the faults are gathered.

    models      those that are merged
    base_model  the recipe's
    Raises: RecipeError with path and line.
    """
    if wish.tokenizer is not None and wish.tokenizer_source is not None:
        with faults:
            message = "`tokenizer` and `tokenizer_source` exclude each other. Write `tokenizer: {source: ...}`"
            raise document.error(message, at="$.tokenizer_source")
    if wish.tokenizer is None:
        given: _Tokenizer | None = _Tokenizer(wish.tokenizer_source or "")
        path, at = "$.tokenizer_source", "$.tokenizer_source"
    else:
        given = converted(document, wish.tokenizer, _Tokenizer, "$.tokenizer", faults)
        path, at = "$.tokenizer", "$.tokenizer.source"
    if given is None:
        return None
    known = (*models, *([base_model] if base_model else []))
    tokens = []
    for text, value in (given.tokens or {}).items():
        with faults:
            tokens.append(_token(document, known, text, value, f"{path}.tokens.{text}", faults))
    multiple = given.pad_to_multiple_of
    with faults:
        if multiple is not None and not 1 <= multiple <= 1 << 20:
            raise document.error(
                f"`pad_to_multiple_of` must be in 1..2**20, got {shown(multiple)}", f"{path}.pad_to_multiple_of"
            )
    with faults:
        kind, model = _source(document, given.source, known, base_model, at)
        return TokenizerWish(kind, model, tuple(tokens), multiple)
    return None


def _source(
    document: Document, given: str | Reference, known: Sequence[ModelRef], base_model: ModelRef | None, path: str
) -> tuple[Literal["union", "base", "model"], ModelRef | None]:
    if given == "union":
        return "union", None
    if given != "base":
        return "model", _model(document, given, known, path)
    if base_model is None:
        key = path.removeprefix("$.")
        raise document.error(
            f"`{key}` 'base' needs the key `base_model`. Remove the line to copy the tokenizer of the first model", path
        )
    return "base", base_model


def _model(document: Document, written: str | Reference, known: Sequence[ModelRef], path: str) -> ModelRef:
    """The one of `known` that is written at `path`."""
    model = model_ref(document, written, path)
    if model in known:
        return known[known.index(model)]
    words = "union, base, " if path in ("$.tokenizer_source", "$.tokenizer.source") else ""
    raise document.error(f"expected {words}a model that is merged, or base_model, got {shown(str(model))}", path)


def _token(
    document: Document, known: Sequence[ModelRef], text: str, value: Any, path: str, faults: Faults
) -> TokenWish:
    if not text:
        raise document.error("a token must not be empty", path)
    given = converted(document, {} if value is None else value, _Token, path, faults) or _Token()
    if given.source is None:
        if given.force:
            raise document.error(
                "`force` does nothing without a `source`. Name one, or remove it", path, at=f"{path}.force"
            )
        return TokenWish(text)
    return TokenWish(text, _token_source(document, known, given.source, f"{path}.source", faults), given.force)


def _token_source(document: Document, known: Sequence[ModelRef], given: Any, path: str, faults: Faults) -> TokenSource:
    if isinstance(given, str):
        return TokenSource(_model(document, given, known, path))
    if not isinstance(given, dict):
        raise document.error(f"expected a model or a mapping, got {shown(given)}", path)
    if "kind" not in given:
        reference = converted(document, given, Reference, path, Faults())
        assert reference is not None
        return TokenSource(_model(document, reference, known, path))
    if given["kind"] == "zero":
        converted(document, given, _Zero, path, Faults())
        return TokenSource()
    if given["kind"] != "model_token":
        kind = given["kind"] if isinstance(given["kind"], str) else ""
        known_kinds = suggestion(kind, ("zero", "model_token"))
        raise document.error(f"unknown kind {shown(given['kind'])}{known_kinds}", f"{path}.kind")
    token = converted(document, given, _ModelToken, path, Faults())
    assert token is not None
    if (token.token is None) == (token.token_id is None):
        raise document.error("a model_token needs one of `token` and `token_id`", path)
    if token.token_id is not None and token.token_id < 0:
        raise document.error(f"`token_id` must be at least 0, got {shown(token.token_id)}", f"{path}.token_id")
    return TokenSource(_model(document, token.model, known, f"{path}.model"), token.token, token.token_id)


def chat_template(document: Document, given: str) -> ChatTemplate:
    """What the key `chat_template` says.

    Raises: RecipeError, if it is neither a known name nor Jinja: at least 20 characters with a `{` among them.
    """
    if given == "auto":
        return ChatTemplate("auto")
    if given in TEMPLATES:
        return ChatTemplate("named", given)
    if len(given) >= 20 and "{" in given:
        return ChatTemplate("jinja", given)
    close = suggestion(given, ("auto", *TEMPLATES))
    raise document.error(
        "`chat_template` must be a name, or a Jinja template (20 characters or more, with a `{`), got "
        f"`{clipped(given)}`{close}",
        "$.chat_template",
    )
