"""Finds negative importances in samples of side-cars: a merge divides by their sum."""

from __future__ import annotations

from typing import Any

from fastinterp.execute.chunks import middle_chunk, read_bytes, spread_over
from fastinterp.messages import plain
from fastinterp.plan.inputs import StoredInput
from fastinterp.plan.plan import Plan

_CODES: Any = {1: "B", 2: "H", 4: "I", 8: "Q"}  # unsigned integers of so many bytes


def negative_importances(plan: Plan) -> list[str]:
    """Warnings about side-cars with negative importances in sampled chunks."""
    every = {id(t): t for tensor in plan.tensors for t in tensor.stages}.values()
    negative: dict[str, list[str]] = {}
    for tensor in spread_over([t for t in every if t.program and t.numel and len(t.inputs) > t.model_count]):
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
