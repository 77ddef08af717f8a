"""Embeddings when vocabularies change: which tensors have a row per token, and where each row of the output is from."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

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
}


class HasShape(Protocol):
    """A tensor, as far as it matters here."""

    @property
    def shape(self) -> tuple[int, ...]: ...


ZEROS = -1
PADDING = -2
_SHIFT = 40  # a row is below 2**40


@dataclass(frozen=True, eq=False)
class RowMap:
    """Where the rows of one model's embedding in the output's vocabulary are from.

    codes  array('q'), one per output row: ZEROS; PADDING: the mean of all other rows; else see `split`: a row of a
           model, or, of model `models`, a row of `means`
    """

    codes: array[int]

    def is_own(self, model: int, rows: int) -> bool:
        """Whether the new embedding is that of `model` itself, which has `rows` rows."""
        start = model << _SHIFT
        return self.codes == array("q", range(start, start + rows))

    @property
    def models(self) -> set[int]:
        """The models that rows are from; RowPlan.models stands for means."""
        return {code >> _SHIFT for code in self.codes if code >= 0}


@dataclass(frozen=True, eq=False)
class RowPlan:
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


@dataclass(frozen=True, slots=True)
class RowSource:
    """What the row of one token shall be.

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
        vocab_size = rows_found(tensors)
    return tuple(
        name for name, e in tensors.items()
        if named_as_embedding(name) and len(e.shape) in (1, 2) and e.shape[0] == vocab_size
    )  # fmt: skip


def named_as_embedding(name: str) -> bool:
    """Whether the name is that of a tensor that may have a row per token."""
    return _module(name) in MODULES


def rows_found(tensors: Mapping[str, HasShape]) -> int | None:
    """Rows of the input embedding, by its name alone; None if no tensor has one."""
    for kind in _INPUTS:
        for name, e in tensors.items():
            if _module(name) == kind and name.endswith(".weight") and len(e.shape) == 2:
                return e.shape[0]
    return None


def _module(name: str) -> str:
    parts = name.split(".")
    return parts[-2] if len(parts) > 1 else ""


def row_of(models: Sequence[Vocabulary], model: int, token: str | int, wisher: str) -> int:
    """The row of a token, by text or by id, in the embedding of a model.

    wisher  the token whose row is wished for, for the message
    Raises: CheckpointError, if the model has none.
    """
    of = models[model]
    row = of.ids.get(token) if isinstance(token, str) else token
    if row is None or not 0 <= row < of.size:
        what = f"token {quote(token)}" if isinstance(token, str) else f"row {token} (it has {of.size})"
        raise CheckpointError(
            f"{of.name} has no {what}, which `tokens` names as the source of {quote(wisher)}. Name another source"
        )
    return row


def plan_rows(
    joined: Joined,
    models: Sequence[Vocabulary],
    merged: int,
    size: int,
    *,
    base: int | None,
    wishes: Mapping[str, RowSource] | None = None,
    keep_padding: bool = True,
) -> RowPlan:
    """Where every row of the embeddings of models[:merged] is from, in the vocabulary `joined` of `size` rows.

    models  those that are merged, then others: joined.base must be one of all
    base    index of the base model, or None
    keep_padding  a row of no token is the model's own if it has one there, else that of joined.base; else PADDING

    A token that a model has keeps its row, unless a wish is forced. Else, in this order: the wish; the row of the only
    model that has it; zeros, if none does; the base's; the mean of those that have it. Only models that are merged, and
    the base, count here.
    """
    wishes = wishes or {}
    tokens: list[str | None] = [None] * max(size, joined.end)
    for text, i in reversed(list(joined.ids.items())):  # reversed: of two tokens with one id the first counts
        tokens[i] = text
    del tokens[size:]
    found = [list(map(m.ids.get, tokens)) for m in models]  # type: ignore[arg-type]  # None is in no vocabulary
    fallback = _Fallback(found, [i for i in range(len(models)) if i < merged or i == base], base)
    spare = next(i for i, m in enumerate(models) if m is joined.base)
    maps = []
    for i in range(merged):
        start, own = i << _SHIFT, models[i]
        codes = array("q", [ZEROS if row is None else start + row for row in found[i]])
        taken = set(own.ids.values())
        for r, token in [(r, tokens[r]) for r, row in enumerate(found[i]) if row is None]:
            if token is not None:
                codes[r] = ZEROS if token in wishes else fallback.code(r, token)
            elif not keep_padding:
                codes[r] = PADDING
            elif r < own.size and r not in taken:
                codes[r] = start + r
            else:
                codes[r] = pack(spare, r) if r < models[spare].size else PADDING
        for token, wish in wishes.items():
            r = joined.ids[token]
            if wish.force or found[i][r] is None:
                codes[r] = ZEROS if wish.model is None else pack(wish.model, wish.row)
        maps.append(RowMap(codes))
    return RowPlan(size, len(models), tuple(maps), tuple(fallback.means), tuple(fallback.zeros))


class _Fallback:
    """The rows of tokens that a model does not have and no wish names: the same for every such model.

    found   per model, per output row: its row of this token, or None
    voters  the models that count
    """

    def __init__(self, found: Sequence[Sequence[int | None]], voters: Sequence[int], base: int | None):
        self._found, self._voters, self._base = found, voters, base
        self._known: dict[int, int] = {}
        self.means: list[tuple[tuple[int, int], ...]] = []
        self.zeros: list[str] = []

    def code(self, r: int, token: str) -> int:
        known = self._known.get(r)
        if known is None:
            known = self._known[r] = self._decided(r, token)
        return known

    def _decided(self, r: int, token: str) -> int:
        having = [(i, row) for i in self._voters if (row := self._found[i][r]) is not None]
        if not having:
            self.zeros.append(token)
            return ZEROS
        if len(having) == 1:
            return pack(*having[0])
        for i, row in having:
            if i == self._base:
                return pack(i, row)
        self.means.append(tuple(having))
        return pack(len(self._found), len(self.means) - 1)
