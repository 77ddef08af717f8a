"""What a recipe wants of tokenizer and chat template, as plain values: `tokenizer`, `tokenizer_source`, `chat_template`.

Nothing here opens a model. Models are named as in Recipe.models, or as Recipe.origin where that is not merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TokenSource:
    """The row of an embedding that a token gets.

    model            whose row; None: zeros
    token, token_id  which token of that model; both None: the one of the same text
    """

    model: str | None = None
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
    model: str | None = None
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
