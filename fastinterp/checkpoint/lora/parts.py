"""The parts of a LoRA adapter, parsed: products of two factors, tensors and rows that are replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.errors import CheckpointError

# What a module is: a matrix; a matrix of tokens; a convolution; a parameter of a module that peft was told by name.
Kind = Literal["linear", "embedding", "convolution", "parameter"]


class LowRankModule(msgspec.Struct, frozen=True):
    """One product of two factors, which is added to the weight of a module.

    module     its name. Of PEFT and diffusers without their prefix: `model.layers.0.self_attn.q_proj`; of kohya as it
               stands in the file, with underscores: `lora_unet_down_blocks_0_attn_to_q`
    kind       `linear`: a [r, in], b [out, r]. `embedding`: a [r, tokens], b [dim, r], of a weight [tokens, dim].
               `convolution`: a [r, in, ...], b [out, r, 1, ...]. `parameter`: a [r * experts, in],
               b [out, r * experts], where a's rows are those of one expert after the other, and b's columns those of
               all experts for the first rank, then for the second
    rank       of the product, of one expert
    alpha      by which the file scales it; None: not scaled
    scale      the factor of b @ a: alpha / rank, or alpha / sqrt(rank)
    magnitude  of DoRA: the length of each row of the weight [out, in] after the merge
    bias       what is added to the module's bias, times scale
    parameters  of the kind `parameter`: of the module, by name, that it may belong to; the likeliest first
    """

    module: str
    kind: Kind
    a: Entry
    b: Entry
    rank: int
    alpha: float | None
    scale: float
    magnitude: Entry | None = None
    bias: Entry | None = None
    parameters: tuple[str, ...] = ()

    @property
    def weight(self) -> str:
        """The adapter's name of the tensor that the product is added to; of parameters, the likeliest."""
        return f"{self.module}.{self.parameters[0] if self.parameters else 'weight'}"

    @property
    def tensors(self) -> tuple[Entry, ...]:
        """The stored tensors that it consists of."""
        return tuple(entry for entry in (self.a, self.b, self.magnitude, self.bias) if entry is not None)


class TokenRows(msgspec.Struct, frozen=True):
    """Rows of an embedding that are replaced.

    module   its name, as of LowRankModule
    tokens   the numbers of the rows, in the order of `rows`
    rows     [tokens, dim]
    """

    module: str
    tokens: tuple[int, ...]
    rows: Entry


class LoraAdapter(msgspec.Struct, frozen=True):
    """An adapter, parsed.

    style     whose names it has: `peft`, `kohya` or `diffusers`
    modules   in the order of the file
    replaced  name in the base, as of LowRankModule with the tensor's last part -> the tensor that replaces it: whole
              modules that were trained, and biases
    rows      rows of embeddings that are replaced
    config    adapter_config.json, or empty
    """

    checkpoint: Checkpoint
    style: str
    modules: tuple[LowRankModule, ...]
    replaced: Mapping[str, Entry] = {}
    rows: tuple[TokenRows, ...] = ()
    config: Mapping[str, Any] = {}

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether its configuration says that the base stores weights as [in, out]."""
        return self.config.get("fan_in_fan_out") is True


def pair_error(checkpoint: Checkpoint, module: str, have: Entry, missing: str) -> CheckpointError:
    """The error about a module of which one factor is missing."""
    return CheckpointError(
        f"module {quote(module)} has {quote(have.name)}, but no {quote(missing)}: a product needs both. Download or "
        "copy the adapter again",
        file=checkpoint.name,
        tensor=have.name,
    )


def check_floats(checkpoint: Checkpoint, entries: Iterable[Entry | None]) -> None:
    """Raises: CheckpointError, if what is multiplied or added is not floating-point. None: it is not there."""
    for entry in entries:
        if entry is not None and (not entry.dtype.merges or entry.dtype.is_complex):
            raise CheckpointError(
                f"tensor {quote(entry.name)} is {entry.dtype}: a factor of an adapter is floating-point",
                file=checkpoint.name,
                tensor=entry.name,
            )


def check_pair(checkpoint: Checkpoint, module: str, a: Entry, b: Entry, rank: int, said: str = "") -> None:
    """Raises: CheckpointError, if two factors do not fit each other, or are not floating-point.

    rank  the length that both have in common
    said  who says what it is: `adapter_config.json`; empty: the factor a
    """
    check_floats(checkpoint, (a, b))
    fits = len(a.shape) > 1 and len(b.shape) > 1 and a.shape[0] == rank and b.shape[1] == rank
    if not fits or rank < 1:
        whose = f", and {said} gives rank {rank}" if said else ""
        raise CheckpointError(
            f"the factors of module {quote(module)} do not fit: {quote(a.name)} is {list(a.shape)} and {quote(b.name)} "
            f"{list(b.shape)}{whose}. Expected [r, in] and [out, r]",
            file=checkpoint.name,
            tensor=a.name,
        )


def put(found: dict[str, Entry], part: str, entry: Entry, twice: list[tuple[Entry, Entry]]) -> None:
    """Add a tensor to those that are found; where it has the place of another, to `twice` with that."""
    if part in found:
        twice.append((found[part], entry))
    found[part] = entry


def refuse_twice(checkpoint: Checkpoint, twice: Sequence[tuple[Entry, Entry]]) -> None:
    """Raises: CheckpointError, if two tensors of an adapter have one place."""
    if twice:
        first, second = twice[0]
        raise CheckpointError(
            f"{quote(first.name)} and {quote(second.name)} are the same part of one module: two adapters in one file? "
            "Save the one that is wanted alone",
            file=checkpoint.name,
            tensor=second.name,
        )


def refuse_left(checkpoint: Checkpoint, left: list[str], why: str) -> None:
    """Raises: CheckpointError, naming them, if tensors of an adapter are left over."""
    if left:
        raise CheckpointError(
            f"{len(left)} of {len(checkpoint.tensors)} tensors of the adapter have no place: {listing(left)}. {why}",
            file=checkpoint.name,
            tensor=left[0],
        )
