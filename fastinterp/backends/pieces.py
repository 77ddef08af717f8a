"""Steps in pieces: where a tensor may be cut for an accelerator, and how what its pieces answer becomes its answer.

Pieces are those of `device.py`; steps are those of the pump (_C.pyi).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from fastinterp._C import CHUNK, STRIP, fold
from fastinterp.ops.dtypes import DTYPES

BLOCK_ROWS = 64  # that a column sums before its blocks fold; the same number stands in csrc/ops.h
_SIZES = {dtype.code: dtype.bits // 8 for dtype in DTYPES.values() if dtype.code is not None}


def element_bytes(step: Mapping[str, Any]) -> int:
    """Bytes of an element in all inputs and outputs together."""
    # (source, offset, dtype), or gathered: (parts, dtype, rows)
    read = sum(_SIZES[operand[1 if isinstance(operand[0], list) else 2]] for operand in step["inputs"])
    return read + (len(step["sinks"]) * _SIZES[step["out_dtype"]] if "sinks" in step else 0)


def cut(step: Mapping[str, Any], most: int) -> list[tuple[int, int]]:
    """The pieces of a step, (first element, elements), in order; one of 0 elements, if there are none.

    most  bytes of all operands of a piece together: it has as many elements as fit, but a chunk, a block of rows or a
          row at least, whatever its size
    """
    numel, fitting = step["numel"], max(1, most // element_bytes(step))
    grain, doubles = _grain(step)
    count = max(1, fitting // grain)
    if doubles:
        count = 1 << count.bit_length() - 1
    length = count * grain
    return [(first, min(length, numel - first)) for first in range(0, numel, length)] or [(0, 0)]


def _grain(step: Mapping[str, Any]) -> tuple[int, bool]:
    """The least length of a piece; whether its length must be that times a power of two, so that sums fold."""
    kind, per = step["kind"], step.get("per", "tensor")
    if kind == "histogram":
        return STRIP, False
    if kind == "divergence" or (kind.startswith("measure") and per == "row"):
        return step["columns"], False
    if kind.startswith("measure") and per == "column":
        return BLOCK_ROWS * step["columns"], True
    return CHUNK, kind.startswith("measure") or kind == "kept"


def has_ranks(step: Mapping[str, Any]) -> bool:
    """Whether a step of kind "kept" or "masked" has random keeps by rank: those look at whole rows."""
    keeps = step["keeps"][1:] if step["kind"] == "kept" else ()
    if step["kind"] == "masked":
        keeps = [term["keep"] for output in step["masked"] for term in output["terms"]]
    return any(keep["lo"] != keep["hi"] for keep in keeps)


def for_pump(step: Mapping[str, Any]) -> Mapping[str, Any]:
    """A step whose tensor's step of kind "kept" a device may have done: those fill no masks, as the pump does. The
    elements of masks that were not filled are drawn again, with the same result.
    """
    if step["kind"] != "masked":
        return step

    def drawn(term: Mapping[str, Any]) -> Mapping[str, Any]:
        known = term["known"]
        return term if known is None or known[0].filled else {**term, "known": None}

    return {**step, "masked": [{**out, "terms": [drawn(t) for t in out["terms"]]} for out in step["masked"]]}


def join(step: Mapping[str, Any], answers: Sequence[Any]) -> Any:
    """The answer of a step from those of its pieces, in order; None if it writes.

    Counts of a histogram are added to the first piece's.
    Raises: ValueError, if answers differ in length.
    """
    if len(answers) == 1 or answers[0] is None:
        return answers[0]
    if step["kind"] == "histogram":
        for more in answers[1:]:
            for whole, part in zip(answers[0], more, strict=True):
                whole.add(part)
        return answers[0]
    if step["kind"] == "divergence" or step.get("per") == "row":
        reals, counts = zip(*answers, strict=True)
        return _chained(reals, "d"), _chained(counts, "q")
    return fold(list(answers))


def _chained(parts: Sequence[memoryview], code: Literal["d", "q"]) -> memoryview:
    whole: Any = memoryview(b"".join(parts)).cast(code)
    return memoryview(whole)


def join_stats(stats: Sequence[Sequence[Mapping[str, float]]]) -> list[dict[str, float]]:
    """The statistics of a step's outputs from those of its pieces: counts and sums add. Empty, if it answers."""
    names = dict.fromkeys(chain.from_iterable(stats[0]))
    return [{name: sum(part[name] for part in parts) for name in names} for parts in zip(*stats, strict=True)]
