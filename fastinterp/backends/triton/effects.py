"""What Triton kernels tell of the outputs that they write: counts of NaN and infinities, and sums over samples."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from fastinterp.backends.triton.launch import ALIGNED, NATURAL, LaunchContext
from fastinterp.backends.triton.tables import Part, Table
from fastinterp.ops.contract import CHUNK

SPAN = 1 << 18  # elements that one program counts NaN and infinities of
COUNTED = ("nan_in", "inf_in", "nan_out", "inf_out")
SAMPLED = ("sum_pp", "sum_dd", "sum_od", "changed")


def _nothing() -> dict[str, float]:
    """As `_C.Pump.stats` has it, before anything is counted."""
    return {
        "nan_in": 0, "inf_in": 0, "nan_out": 0, "inf_out": 0, "sampled": 0, "changed": 0,
        "sum_pp": 0.0, "sum_dd": 0.0, "sum_od": 0.0,
    }  # fmt: skip


class Written:
    """Pending, see device.py, of a piece that writes.

    piece, outputs  its number, and how many outputs it has
    effects         what is told of them, added by and by
    """

    def __init__(self, piece: int, outputs: int):
        self._piece, self._outputs = piece, outputs
        self.effects: list[Effects] = []

    def answer(self) -> None:
        return None

    def stats(self) -> list[dict[str, float]]:
        found = [_nothing() for _ in range(self._outputs)]
        for effects in self.effects:
            effects.add_to(self._piece, found)
        return found


class Effects:
    """Of the outputs of parts that are alike: launches what finds them, and adds it up when it has been fetched.

    kernel     of the sums, as effect_kernel in _triton/combine.py, and its constants
    every      chunk c of a tensor is sampled iff c % every == 0
    measured   whether there is a change that was intended
    flags      i32[outputs]: where there is something to count
    """

    def __init__(
        self, context: LaunchContext, kernel: Any, parts: Sequence[Part], constants: dict[str, Any],
        *, every: int, measured: bool, flags: Any, warps: int = 4,
    ):  # fmt: skip
        self._found: list[tuple[tuple[str, ...], list[tuple[int, int, int]], Any]] = []
        block = context.tile(512, 8192)
        table = Table(parts, [1] * len(parts))
        rows, numbers = table.on(context)
        for counts in (True, False) if measured else (True,):
            every_span = _cut(parts, constants["OUT"], 0 if counts else every)
            for align, spans in every_span.items():
                owners = [(parts[at].piece, j, count) for at, _, count in spans for j in parts[at].rows]
                found = context.zeros("int64" if counts else "float64", len(owners), 4)
                context.launch(
                    kernel, len(spans), rows, numbers, flags, context.upload(_described(parts, spans), "int64"), found,
                    **constants, COUNTS=counts, ALIGN=align, BLOCK=block, warps=warps,
                )  # fmt: skip
                self._found.append((COUNTED if counts else SAMPLED, owners, context.fetch(found)))

    def add_to(self, piece: int, stats: list[dict[str, float]]) -> None:
        for names, owners, found in self._found:
            for (owner, j, count), values in zip(owners, found.tolist(), strict=True):
                if owner != piece:
                    continue
                for name, value in zip(names, values, strict=True):
                    stats[j][name] += int(value) if name == "changed" else value
                if names is SAMPLED:
                    stats[j]["sampled"] += count


def _cut(parts: Sequence[Part], out: int, every: int) -> dict[int, list[tuple[int, int, int]]]:
    """Part, first element in it, and elements of what a program looks at, by what it may count on.

    every  of the chunks that are sampled; 0: all elements
    """
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for at, part in enumerate(parts):
        align = part.alignment(out)
        for begin, count in _samples(part, every) if every else _spans(part):
            own = NATURAL if align == ALIGNED and (begin | count) % 16 else align
            cuts.setdefault(own, []).append((at, begin, count))
    return cuts


def _spans(part: Part) -> Iterator[tuple[int, int]]:
    for begin in range(0, part.count, SPAN):
        yield begin, min(SPAN, part.count - begin)


def _samples(part: Part, every: int) -> Iterator[tuple[int, int]]:
    end = part.first + part.count
    chunk = -(-(part.first // CHUNK) // every) * every
    for start in range(chunk * CHUNK, end, every * CHUNK):
        begin = max(start, part.first)
        if begin < start + CHUNK:
            yield begin - part.first, min(start + CHUNK, end) - begin


def _described(parts: Sequence[Part], spans: Sequence[tuple[int, int, int]]) -> array[int]:
    told, answers = array("q"), 0
    for at, begin, count in spans:
        told.extend((at, begin, count, answers))
        answers += len(parts[at].rows)
    return told
