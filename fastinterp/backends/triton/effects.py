"""Statistics of the outputs that Triton kernels write: counts of NaN and Inf, and sums over sampled chunks."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from fastinterp.backends.triton.launch import ALIGNED, NATURAL, LaunchContext
from fastinterp.backends.triton.tables import Part, Table
from fastinterp.ops.contract import CHUNK

SPAN = 1 << 18  # elements in which one program counts NaN and Inf
COUNTED = ("nan_in", "inf_in", "nan_out", "inf_out")
SAMPLED = ("sum_pp", "sum_dd", "sum_od", "changed")


def _zeros() -> dict[str, float]:
    """The statistics of one output in the form of `_C.Pump.stats`, all 0."""
    return {
        "nan_in": 0, "inf_in": 0, "nan_out": 0, "inf_out": 0, "sampled": 0, "changed": 0,
        "sum_pp": 0.0, "sum_dd": 0.0, "sum_od": 0.0,
    }  # fmt: skip


class Written:
    """The results of a piece that writes: a Pending (device.py).

    piece, outputs  index of the piece, and its number of outputs
    effects         statistics of some of its outputs, appended by launches
    """

    def __init__(self, piece: int, outputs: int):
        self._piece, self._outputs = piece, outputs
        self.effects: list[Effects] = []

    def answer(self) -> None:
        return None

    def stats(self) -> list[dict[str, float]]:
        stats = [_zeros() for _ in range(self._outputs)]
        for effects in self.effects:
            effects.add_to(self._piece, stats)
        return stats


class Effects:
    """Statistics of the outputs of parts with the same constants: launches the kernels, and adds up their results.

    kernel     the statistics kernel, as effect_kernel in _triton/combine.py, and its constants
    every      chunk c of a tensor is sampled iff c % every == 0
    measured   whether outputs differ from their pivot, so that sums over samples are needed
    block      elements of a tile whose sums fit into registers
    flags      i32[outputs]: 1 where an output has NaN or Inf, which are counted then
    """

    def __init__(
        self, context: LaunchContext, kernel: Any, parts: Sequence[Part], constants: dict[str, Any],
        *, every: int, measured: bool, flags: Any, block: int = 1024,
    ):  # fmt: skip
        self._results: list[tuple[tuple[str, ...], list[tuple[int, int, int]], Any]] = []
        table = Table(parts, [1] * len(parts))
        rows, numbers = table.on(context)
        for counts in (True, False) if measured else (True,):
            every_span = _cut(parts, constants["OUT"], 0 if counts else every)
            for align, spans in every_span.items():
                tile = context.tile(1024 if counts else block, 8192)
                owners = [(parts[at].piece, j, count) for at, _, count in spans for j in parts[at].rows]
                values = context.zeros("int64" if counts else "float64", len(owners), 4)
                context.launch(
                    kernel, len(spans), rows, numbers, flags, context.upload(_described(parts, spans), "int64"), values,
                    **constants, COUNTS=counts, ALIGN=align, BLOCK=tile,
                )  # fmt: skip
                self._results.append((COUNTED if counts else SAMPLED, owners, context.fetch(values)))

    def add_to(self, piece: int, stats: list[dict[str, float]]) -> None:
        """Add the statistics of a piece to those of its outputs."""
        for names, owners, values in self._results:
            for (owner, j, count), row in zip(owners, values.tolist(), strict=True):
                if owner != piece:
                    continue
                for name, value in zip(names, row, strict=True):
                    stats[j][name] += int(value) if name == "changed" else value
                if names is SAMPLED:
                    stats[j]["sampled"] += count


def _cut(parts: Sequence[Part], out: int, every: int) -> dict[int, list[tuple[int, int, int]]]:
    """The (part, first element, elements) of each program, by alignment.

    every  one chunk in so many is sampled; 0: all elements
    """
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for at, part in enumerate(parts):
        align = part.alignment(out)
        for begin, count in _samples(part, every) if every else _spans(part):
            of_span = NATURAL if align == ALIGNED and (begin | count) % 16 else align
            cuts.setdefault(of_span, []).append((at, begin, count))
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
    """The argument `spans` of the kernel: i64[programs, 4]."""
    words, answers = array("q"), 0
    for at, begin, count in spans:
        words.extend((at, begin, count, answers))
        answers += len(parts[at].rows)
    return words
