"""The keys `tokenizer` and `chat_template` of a recipe, as plain values.

`tokenizer_source: NAME` is `tokenizer: {source: NAME}`. Nothing here opens a model. Models are named as in
Recipe.models, or as the recipe's base_model where that is not merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastinterp.messages import clipped, closest, shown, suggestion
from fastinterp.recipe.document import Document, ErrorCollector
from fastinterp.recipe.references import ModelRef, model_ref
from fastinterp.recipe.schema import ModelTokenRow, RawRecipe, Reference, TokenItem, TokenizerItem, Unchecked, ZeroRow

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
class TokenSpec:
    """One entry of `tokens`: it is added to the vocabulary, if it is not in it.

    text    of the token
    source  where its row comes from in models that do not have it; None: as for a token that no entry names
    force   the source goes before the model's own row, too; with source None it changes nothing
    """

    text: str
    source: TokenSource | None = None
    force: bool = False


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """The vocabulary of the output, and where the rows of its embeddings come from.

    source              "union" of the vocabularies of all models, base first; "base": that of base_model, else
                        of the first model; "model": that of `model`
    model               whose vocabulary it is for "base" and "model"; None for "union"
    tokens              in the order of the recipe
    pad_to_multiple_of  the number of rows is rounded up to a multiple of it; None: not at all
    """

    source: Literal["union", "base", "model"]
    model: ModelRef | None = None
    tokens: tuple[TokenSpec, ...] = ()
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of the output.

    kind  "auto": the one that most of the models have. "named": a well-known one. "jinja": as it stands in the recipe
    text  "alpaca", "chatml", "exaone", "llama3" or "mistral" for "named"; Jinja for "jinja"; empty for "auto"
    """

    kind: Literal["auto", "named", "jinja"]
    text: str = ""


def tokenizer_spec(
    document: Document,
    raw: RawRecipe,
    models: Sequence[ModelRef],
    base_model: ModelRef | None,
    collector: ErrorCollector,
) -> TokenizerSpec | None:
    """The keys `tokenizer` and `tokenizer_source`; None, if errors were collected that leave no specification.

    models      those that are merged
    base_model  the recipe's
    Raises: RecipeError with path and line.
    """
    if raw.tokenizer is not None and raw.tokenizer_source is not None:
        with collector:
            message = "`tokenizer` and `tokenizer_source` exclude each other. Write `tokenizer: {source: ...}`"
            raise document.error(message, at="$.tokenizer_source")
    if raw.tokenizer is None:
        keys: TokenizerItem | None = TokenizerItem(raw.tokenizer_source or "")
        path, at = "$.tokenizer_source", "$.tokenizer_source"
    else:
        keys = raw.tokenizer.checked(collector)
        path, at = "$.tokenizer", "$.tokenizer.source"
    if keys is None:
        return None
    known = (*models, *([base_model] if base_model else []))
    tokens = []
    for text, part in (keys.tokens or {}).items():
        with collector:
            tokens.append(_token(document, known, text, part, collector))
    multiple = keys.pad_to_multiple_of
    with collector:
        if multiple is not None and not 1 <= multiple <= 1 << 20:
            raise document.error(
                f"`pad_to_multiple_of` must be in 1..2**20, got {shown(multiple)}", f"{path}.pad_to_multiple_of"
            )
    with collector:
        kind, model = _source(document, keys.source, known, base_model, at)
        return TokenizerSpec(kind, model, tuple(tokens), multiple)
    return None


def _source(
    document: Document, written: str | Reference, known: Sequence[ModelRef], base_model: ModelRef | None, path: str
) -> tuple[Literal["union", "base", "model"], ModelRef | None]:
    if written == "union":
        return "union", None
    if written != "base":
        return "model", _model(document, written, known, path)
    return "base", base_model or (known[0] if known else None)  # as mergekit: without a base the first model counts


def _model(document: Document, written: str | Reference, known: Sequence[ModelRef], path: str) -> ModelRef:
    """The one of `known` that is written at `path`."""
    model = model_ref(document, written, path)
    if model in known:
        return known[known.index(model)]
    words = "union, base, " if path in ("$.tokenizer_source", "$.tokenizer.source") else ""
    close = closest(str(model), [*(("union", "base") if words else ()), *map(str, known)])
    hint = f", did you mean `{close}`?" if close else ""
    raise document.error(f"expected {words}a model that is merged, or base_model, got {shown(str(model))}{hint}", path)


def _token(
    document: Document, known: Sequence[ModelRef], text: str, part: Unchecked[TokenItem], collector: ErrorCollector
) -> TokenSpec:
    path = part.path
    if not text:
        raise document.error("a token must not be empty", path)
    if part.value is None:  # a token with nothing behind it
        return TokenSpec(text)
    entry = part.checked(collector) or TokenItem()
    if entry.source is None:
        if entry.force:
            raise document.error(
                "`force` does nothing without a `source`. Name one, or remove it", path, at=f"{path}.force"
            )
        return TokenSpec(text)
    return TokenSpec(text, _token_source(document, known, entry.source, f"{path}.source"), entry.force)


def _token_source(document: Document, known: Sequence[ModelRef], source: Any, path: str) -> TokenSource:
    """The row that the `source` of a TokenItem names."""
    if isinstance(source, str):
        return TokenSource(_model(document, source, known, path))
    if isinstance(source, dict):  # of a kind that the schema does not have
        kind = source["kind"] if isinstance(source["kind"], str) else ""
        known_kinds = suggestion(kind, ("zero", "model_token"))
        raise document.error(f"unknown kind {shown(source['kind'])}{known_kinds}", f"{path}.kind")
    if not isinstance(source, Unchecked):
        raise document.error(f"expected a model or a mapping, got {shown(source)}", path)
    row = source.checked(ErrorCollector())  # its first error is enough
    if isinstance(row, ZeroRow):
        return TokenSource()
    if isinstance(row, Reference):
        return TokenSource(_model(document, row, known, path))
    assert isinstance(row, ModelTokenRow)
    if (row.token is None) == (row.token_id is None):
        raise document.error("a model_token needs one of `token` and `token_id`", path)
    if row.token_id is not None and row.token_id < 0:
        raise document.error(f"`token_id` must be at least 0, got {shown(row.token_id)}", f"{path}.token_id")
    return TokenSource(_model(document, row.model, known, f"{path}.model"), row.token, row.token_id)


def chat_template(document: Document, text: str) -> ChatTemplate:
    """The key `chat_template`.

    Raises: RecipeError, if it is neither a known name nor Jinja: at least 20 characters with a `{` among them.
    """
    if text == "auto":
        return ChatTemplate("auto")
    if text in TEMPLATES:
        return ChatTemplate("named", text)
    if len(text) >= 20 and "{" in text:
        return ChatTemplate("jinja", text)
    close = suggestion(text, ("auto", *TEMPLATES))
    raise document.error(
        "`chat_template` must be a name, or a Jinja template (20 characters or more, with a `{`), got "
        f"`{clipped(text)}`{close}",
        "$.chat_template",
    )
