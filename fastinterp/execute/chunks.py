"""Reads samples of stored tensors outside of a run, for `check` and reports; finds negative importances in them."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from fastinterp.checkpoint.remote import opened, read_from
from fastinterp.messages import plain
from fastinterp.ops.contract import CHUNK
from fastinterp.plan.inputs import StoredInput
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor

_AGREE_BYTES = 1 << 20  # compared of a tensor that must be equal in all models
TENSORS = 128  # that are sampled at most, spread over the model

_CODES: Any = {1: "B", 2: "H", 4: "I", 8: "Q"}  # unsigned integers of so many bytes


def evenly_sampled(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
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
    with opened(str(tensor.path)) as file:
        return read_from(file, tensor.path, tensor.start, min(tensor.nbytes, limit))


def stored_inputs(tensor: PlannedTensor) -> list[tuple[int, StoredInput]]:
    """The inputs that are stored in the files element by element, with the index of their checkpoint: without those
    whose rows are reordered, and the tensors of earlier documents.
    """
    pairs = ((i, e.plain) for i, e in tensor.pairs)
    return [(i, e) for i, e in pairs if e is not None]


def differing_unmerged(plan: Plan) -> tuple[list[tuple[PlannedTensor, int, int]], list[PlannedTensor]]:
    """Compare the first MB of each tensor that is not merged, and must be equal in all models.

    Returns those that differ, each with two of its checkpoints that do, and the others that are longer than that.
    """
    differing, longer = [], []
    for tensor in (t for t in plan.tensors if not t.merged and len(t.inputs) > 1):
        reads = stored_inputs(tensor)
        if len(reads) < 2:
            continue
        first = read_bytes(reads[0][1], limit=_AGREE_BYTES)
        others = [i for i, e in reads[1:] if read_bytes(e, limit=_AGREE_BYTES) != first]
        if others:
            differing.append((tensor, reads[0][0], others[0]))
        elif tensor.inputs[0].nbytes > _AGREE_BYTES:
            longer.append(tensor)
    return differing, longer


def negative_importances(plan: Plan) -> list[str]:
    """Warnings about side-cars with negative importances in sampled chunks: a merge divides by their sum."""
    every = {id(t): t for tensor in plan.tensors for t in tensor.stages}.values()
    negative: dict[str, list[str]] = {}
    for tensor in evenly_sampled([t for t in every if t.program and t.numel and len(t.inputs) > t.model_count]):
        for i, entry in tensor.pairs[tensor.model_count :]:
            if entry.plain is not None and _below_0(middle_chunk(entry.plain)):
                negative.setdefault(plan.checkpoints[i].name, []).append(tensor.name)
    return [
        f"the side-car {plain(name)} holds numbers below 0, in {plain(tensors[0])} for example: importances must not "
        "be negative, since the merge divides by their sum"
        for name, tensors in negative.items()
    ]


def _below_0(tensor: StoredInput) -> bool:
    """Whether any element is negative; -0 and NaN are not."""
    data, size = read_bytes(tensor, limit=tensor.nbytes), tensor.nbytes // tensor.numel
    if max(data[size - 1 :: size]) < 0x80:  # the bytes with the signs: nearly always
        return False
    layout = tensor.dtype.layout
    assert layout is not None  # side-cars merge
    sign, infinite = layout.sign, layout.infinite
    return any(sign < code <= sign + infinite for code in memoryview(data).cast(_CODES[size]))
