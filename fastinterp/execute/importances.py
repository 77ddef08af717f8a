"""Importances of side-cars that are negative, found in samples: a merge divides by their sum."""

from __future__ import annotations

from typing import Any

from fastinterp.execute.chunks import middle_chunk, read_bytes, spread_over
from fastinterp.messages import plain
from fastinterp.plan.inputs import StoredInput
from fastinterp.plan.plan import Plan

_CODES: Any = {1: "B", 2: "H", 4: "I", 8: "Q"}  # unsigned integers of so many bytes
# Code of Inf, or of the largest number where there is none.
_INFINITE = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x7C00, "BF16": 0x7F80, "F8_E4M3": 0x7E, "F8_E5M2": 0x7C}


def negative_importances(plan: Plan) -> list[str]:
    """What to say about side-cars whose samples hold numbers below 0: no importance is, and sums of them divide."""
    every = {id(t): t for tensor in plan.tensors for t in tensor.stages}.values()
    found: dict[str, list[str]] = {}
    for tensor in spread_over([t for t in every if t.program and t.numel and len(t.inputs) > t.model_count]):
        for i, entry in tensor.pairs[tensor.model_count :]:
            if entry.plain is not None and _below_0(middle_chunk(entry.plain)):
                found.setdefault(plan.checkpoints[i].name, []).append(tensor.name)
    return [
        f"the side-car {plain(name)} holds numbers below 0, in {plain(tensors[0])} for example: importances must not "
        "be negative, since the merge divides by their sum"
        for name, tensors in found.items()
    ]


def _below_0(tensor: StoredInput) -> bool:
    """-0 and NaN are not."""
    data, size = read_bytes(tensor, limit=tensor.nbytes), tensor.nbytes // tensor.numel
    if max(data[size - 1 :: size]) < 0x80:  # the bytes with the signs: nearly always
        return False
    sign, infinite = 1 << 8 * size - 1, _INFINITE[tensor.dtype.name]
    return any(sign < code <= sign + infinite for code in memoryview(data).cast(_CODES[size]))
