"""Histograms of magnitudes and scores as launches of Triton kernels."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from fastinterp._C import STRIP, Counts
from fastinterp.backends.device import Piece
from fastinterp.backends.triton.launch import Answer, Room, alignment
from fastinterp.backends.triton.tables import Part, Table

NO_SCORE, SPREAD, DIVERGENCE = range(3)  # as in _triton/scores.py
STRIPS = 4  # of a program


def score_of(score: tuple[str, int, bytes] | None) -> int:
    return NO_SCORE if score is None else SPREAD if score[0] == "spread" else DIVERGENCE


def factors_of(score: tuple[str, int, bytes], part: Part) -> None:
    """Gives a part the factors of the rows that it lies in."""
    begin, end = part.first // part.columns, -(-(part.first + part.count) // part.columns)
    factors = memoryview(score[2]).cast("B").cast("f")[begin:end]
    part.numbers, part.group = bytearray(array("d", factors).tobytes()), begin


def histogram(room: Room, pieces: Sequence[Piece]) -> list[Answer]:
    """Which of a piece's magnitudes, or of its scores, lie where."""
    parts, kinds, bins, brackets = [], [], 0, 0
    shapes: list[tuple[int, int, int, list[int]]] = []  # elements, first bin, first bracket, bins of each
    for piece in pieces:
        part, elements, sizes = _part(piece, bins, brackets)
        shapes.append((elements, bins, brackets, sizes))
        bins, brackets = bins + sum(sizes), brackets + len(sizes)
        parts.append(part)
        kinds.append((part.codes, score_of(piece["score"]), alignment(part.addresses, part.codes, part.count)))
    counted, totals = room.zeros("int32", bins), room.zeros("int64", brackets, 2)
    strips = room.tile(STRIPS, 256)
    for kind in dict.fromkeys(kinds):
        some = [p for p, own in enumerate(kinds) if own == kind]
        _launch(
            room, [parts[p] for p in some], [-(-shapes[p][0] // STRIP) for p in some], kind, counted, totals, strips
        )
    counted, totals = room.fetch(counted), room.fetch(totals)
    return [Answer(lambda shape=shape: _answer(counted, totals, *shape)) for shape in shapes]  # type: ignore[misc]


def _part(piece: Piece, bins: int, brackets: int) -> tuple[Part, int, list[int]]:
    """With its elements that are looked at, and how many bins each bracket has."""
    ranked, score = piece["ranked"], piece["score"]
    read = range(len(piece["inputs"])) if score else sorted({0, *(input_ for input_, *_ in ranked)})
    addresses, codes = zip(*(piece["inputs"][i] for i in read), strict=True)
    part = Part(
        0, list(addresses), codes, [], [], [], bytearray(), [], 0, piece["numel"], piece["first"], piece["columns"]
    )
    if score and score[0] == "divergence":
        factors_of(score, part)
    every, strip = piece["every"], piece["first"] // STRIP
    start = -(-strip // every) * every - strip
    looked = range(start, -(-part.count // STRIP), every)
    elements = len(looked) * STRIP
    if looked:
        elements -= max(0, (looked[-1] + 1) * STRIP - part.count)
    sizes = [((high - low) >> shift) + 1 for _, low, high, shift in ranked]
    # Those of one input next to each other; in front of them, for each input, where its own begin.
    order = sorted(range(len(ranked)), key=lambda b: 0 if score else ranked[b][0])
    starts = [sum(1 for b in ranked if not score and b[0] < i) for i in read] if not score else [0] * len(read)
    part.extra = [every, start, *starts, len(ranked)]
    for b in order:
        _, low, high, shift = ranked[b]
        part.extra += [low, high, shift, bins + sum(sizes[:b]), brackets + b]
    return part, elements, sizes


def _launch(
    room: Room, parts: Sequence[Part], strips: Sequence[int], kind: tuple[Any, ...], bins: Any, totals: Any, tile: int
) -> None:
    from fastinterp._triton.histogram import histogram_kernel

    codes, score, align = kind
    table = Table(parts, [-(-count // tile) for count in strips])
    room.launch(
        histogram_kernel, table.tiles, *table.on(room), bins, totals, len(parts),
        N=len(codes), DT=codes, WIDE=0 in codes, SCORE=score, ALIGN=align, STRIPS=tile, STEPS=table.steps,
    )  # fmt: skip


def _answer(counted: Any, totals: Any, elements: int, bins: int, bracket: int, sizes: Sequence[int]) -> list[Counts]:
    found = []
    for size in sizes:
        above, zero = totals[bracket].tolist()
        own = memoryview(counted[bins : bins + size].contiguous().numpy()).cast("B").cast("I")
        found.append(Counts(elements, above, zero, own))
        bins, bracket = bins + size, bracket + 1
    return found
