"""Parts of stored tensors, read one by one outside of a run: what `check` and reports look at."""

from __future__ import annotations

import os
from dataclasses import replace

from fastinterp.checkpoint.header import Entry
from fastinterp.execute.sources import storage
from fastinterp.plan.plan import Plan
from fastinterp.plan.tensors import PlannedTensor

CHUNK = 16384  # elements of a tensor
TENSORS = 128  # that are sampled, spread over the model


def spread_over(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """TENSORS of them at most, over all of the model."""
    return [tensors[k * len(tensors) // TENSORS] for k in range(TENSORS)] if len(tensors) > TENSORS else tensors


def middle_chunk(entry: Entry) -> Entry:
    """CHUNK elements of a tensor, from its middle; all of it, if it has no more."""
    size = entry.nbytes // entry.numel
    count = min(entry.numel, CHUNK)
    skipped = (entry.numel - count) // 2
    return replace(entry, shape=(count,), start=entry.start + skipped * size, nbytes=count * size)


def read_bytes(plan: Plan, i: int, entry: Entry, *, limit: int) -> bytes:
    """The first bytes of a tensor, or of a chunk of it."""
    path = plan.checkpoints[i].files[entry.file]
    with storage(path), open(path, "rb", buffering=0) as stream:
        return os.pread(stream.fileno(), min(entry.nbytes, limit), entry.start)
