"""Embedding rows in the output's vocabulary: which tensors have a row per token, and where each row comes from."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from fastinterp.checkpoint.names import quote
from fastinterp.errors import CheckpointError

if TYPE_CHECKING:
    from fastinterp.tokenizer.vocabulary import Joined, Vocabulary

# What modules with a row per token are called, in the models that transformers and others know.
_INPUTS = (
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "token_embedding", "embeddings",
    "embedding", "word_embedding", "token_embeddings", "tokens_embed", "word_embed", "emb",
)  # fmt: skip
MODULES = frozenset(_INPUTS) | {
    "lm_head",
    "embed_out",
    "output",
    "output_layer",
    "output_projection",
    "head",
    "decoder",
    "predictions",  # BERT's cls.predictions.bias
    "vocab_projector",
    "lm_loss",
    "generator_lm_head",
}


class HasShape(Protocol):
    """A tensor whose shape is known."""

    @property
    def shape(self) -> tuple[int, ...]: ...


ZEROS = -1
PADDING = -2
_SHIFT = 40  # a row is below 2**40


class RowMap(msgspec.Struct, frozen=True, eq=False):
    """Where the rows of one model's embedding in the output's vocabulary are from.

    codes  array('q'), one per output row: ZEROS; PADDING: the mean of all other rows; else see `split`: a row of a
           model, or, of model `models`, a row of `means`
    read   the models that rows are from, if that is known; None: the codes tell
    """

    codes: array[int]
    read: frozenset[int] | None = None

    def is_own(self, model: int, rows: int) -> bool:
        """Whether the new embedding is that of `model` itself, which has `rows` rows."""
        start = model << _SHIFT
        return self.codes == array("q", range(start, start + rows))

    @property
    def models(self) -> set[int]:
        """The models that rows are from; RowPlan.models stands for means."""
        if self.read is not None:
            return set(self.read)
        return {code >> _SHIFT for code in self.codes if code >= 0}


class RowPlan(msgspec.Struct, frozen=True, eq=False):
    """The rows of every model's embeddings.

    size    rows of the output
    models  how many models there are; rows of this index are means
    maps    one per model that is merged
    means   the rows, each (model, row), whose mean a row is: float32, summed in this order
    zeros   tokens that no model has: their rows are zeros
    """

    size: int
    models: int
    maps: tuple[RowMap, ...]
    means: tuple[tuple[tuple[int, int], ...], ...]
    zeros: tuple[str, ...]


class RowSource(msgspec.Struct, frozen=True):
    """Where the row of one token is from, as a recipe chooses.

    model  index of the model whose row it is; None: zeros
    row    in that model's embedding
    force  in models that have the token, too
    """

    model: int | None
    row: int = 0
    force: bool = False


def pack(model: int, row: int) -> int:
    return model << _SHIFT | row


def split(code: int) -> tuple[int, int]:
    """(model, row) of a code that is not negative."""
    return code >> _SHIFT, code & (1 << _SHIFT) - 1


def embeddings(tensors: Mapping[str, HasShape], vocab_size: int | None) -> tuple[str, ...]:
    """The tensors with a row per token, in the order of the file.

    They are those of a module with a name in MODULES (`model.embed_tokens.weight`, `lm_head.bias`: the last part but
    one) of one or two dimensions, the first of `vocab_size`. Where no configuration tells that, None: it is that of the
    first weight of an input embedding.
    """
    if vocab_size is None:
        vocab_size = embedding_row_count(tensors)
    return tuple(
        name for name, e in tensors.items()
        if named_as_embedding(name) and len(e.shape) in (1, 2) and e.shape[0] == vocab_size
    )  # fmt: skip


def named_as_embedding(name: str) -> bool:
    """Whether the name is that of a tensor that may have a row per token."""
    return _module(name) in MODULES


def embedding_row_count(tensors: Mapping[str, HasShape]) -> int | None:
    """Number of rows of the input embedding, which is recognised by its name; None if no tensor is one."""
    for kind in _INPUTS:
        for name, e in tensors.items():
            if _module(name) == kind and name.endswith(".weight") and len(e.shape) == 2:
                return e.shape[0]
    return None


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def row_of(models: Sequence[Vocabulary], model: int, token: str | int, user: str) -> int:
    """The row of a token, by text or by id, in the embedding of a model.

    user  the token that gets this row, for the message
    Raises: CheckpointError, if the model has none.
    """
    vocabulary = models[model]
    row = vocabulary.ids.get(token) if isinstance(token, str) else token
    if row is None or not 0 <= row < vocabulary.size:
        what = f"token {quote(token)}" if isinstance(token, str) else f"row {token} (it has {vocabulary.size})"
        raise CheckpointError(
            f"{vocabulary.name} has no {what}, which `tokens` names as the source of {quote(user)}. Name another source"
        )
    return row


def plan_rows(
    joined: Joined,
    models: Sequence[Vocabulary],
    merged: int,
    size: int,
    *,
    base: int | None,
    chosen: Mapping[str, RowSource] | None = None,
    keep_padding: bool = True,
) -> RowPlan:
    """Where every row of the embeddings of models[:merged] is from, in the vocabulary `joined` of `size` rows.

    models        those that are merged, then others: joined.base must be one of all
    base          index of the base model, or None
    chosen        rows of tokens that the recipe names
    keep_padding  a row of no token is the model's own if it has one there, else that of joined.base; else PADDING

    A token that a model has keeps its row, unless another is forced. Else, in this order: the one chosen; the row of
    the only model that has it; zeros, if none does; the base's; the mean of those that have it. Only models that are
    merged, and the base, count here.
    """
    chosen = chosen or {}
    tokens: list[str | None] = [None] * max(size, joined.end)
    for text, i in reversed(list(joined.ids.items())):  # reversed: of two tokens with one id the first counts
        tokens[i] = text
    del tokens[size:]
    rows = [list(map(m.ids.get, tokens)) for m in models]  # type: ignore[arg-type]  # None is in no vocabulary
    fallback = _Fallback(rows, [i for i in range(len(models)) if i < merged or i == base], base)
    spare = next(i for i, m in enumerate(models) if m is joined.base)
    maps = []
    for i in range(merged):
        start, vocabulary = i << _SHIFT, models[i]
        codes = array("q", [ZEROS if row is None else start + row for row in rows[i]])
        taken = set(vocabulary.ids.values())
        for r, token in [(r, tokens[r]) for r, row in enumerate(rows[i]) if row is None]:
            if token is not None:
                codes[r] = ZEROS if token in chosen else fallback.code(r, token)
            elif not keep_padding:
                codes[r] = PADDING
            elif r < vocabulary.size and r not in taken:
                codes[r] = start + r
            else:
                codes[r] = pack(spare, r) if r < models[spare].size else PADDING
        for token, source in chosen.items():
            r = joined.ids[token]
            if source.force or rows[i][r] is None:
                codes[r] = ZEROS if source.model is None else pack(source.model, source.row)
        maps.append(RowMap(codes))
    return RowPlan(size, len(models), tuple(maps), tuple(fallback.means), tuple(fallback.zeros))


class _Fallback:
    """The rows of tokens that a model does not have and that the recipe does not choose: the same for every such model.

    rows    per model, per output row: its row of this token, or None
    voters  the models that count
    """

    def __init__(self, rows: Sequence[Sequence[int | None]], voters: Sequence[int], base: int | None):
        self._rows, self._voters, self._base = rows, voters, base
        self._known: dict[int, int] = {}
        self.means: list[tuple[tuple[int, int], ...]] = []
        self.zeros: list[str] = []

    def code(self, r: int, token: str) -> int:
        known = self._known.get(r)
        if known is None:
            known = self._known[r] = self._source(r, token)
        return known

    def _source(self, r: int, token: str) -> int:
        having = [(i, row) for i in self._voters if (row := self._rows[i][r]) is not None]
        if not having:
            self.zeros.append(token)
            return ZEROS
        if len(having) == 1:
            return pack(*having[0])
        for i, row in having:
            if i == self._base:
                return pack(i, row)
        self.means.append(tuple(having))
        return pack(len(self._rows), len(self.means) - 1)
