"""Reads samples of stored tensors outside of a run, for `check` and reports."""

from __future__ import annotations

import os

from msgspec.structs import replace

from fastinterp.execute.sources import storage
from fastinterp.ops.contract import CHUNK
from fastinterp.plan.inputs import PlannedTensor, StoredInput

TENSORS = 128  # that are sampled at most, spread over the model


def spread_over(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """At most TENSORS of these, evenly spread over the model."""
    return [tensors[k * len(tensors) // TENSORS] for k in range(TENSORS)] if len(tensors) > TENSORS else tensors


def middle_chunk(tensor: StoredInput) -> StoredInput:
    """The CHUNK elements in the middle of a tensor, as an input; the whole tensor, if it has no more."""
    size = tensor.nbytes // tensor.numel
    count = min(tensor.numel, CHUNK)
    skipped = (tensor.numel - count) // 2
    return replace(tensor, shape=(count,), start=tensor.start + skipped * size, nbytes=count * size)


def read_bytes(tensor: StoredInput, *, limit: int) -> bytes:
    """The first bytes of a tensor, or of a chunk of it."""
    with storage(tensor.path), open(tensor.path, "rb", buffering=0) as stream:
        return os.pread(stream.fileno(), min(tensor.nbytes, limit), tensor.start)
