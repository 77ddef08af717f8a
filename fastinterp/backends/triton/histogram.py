"""Launches of the Triton kernel for histograms of magnitudes or scores."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastinterp._C import Counts
from fastinterp.backends.device import Piece
from fastinterp.backends.triton.launch import Answer, LaunchContext, alignment
from fastinterp.backends.triton.tables import Part, Table
from fastinterp.ops.contract import STRIP
from fastinterp.ops.steps import Histogram, Score

NO_SCORE, VARIANCE, DIVERGENCE = range(3)  # as in _triton/scores.py
STRIPS = 4  # of a program


def score_code(score: Score | None) -> int:
    return NO_SCORE if score is None else VARIANCE if score.kind == "variance" else DIVERGENCE


def add_factors(score: Score | None, part: Part) -> None:
    """Add the factors of a part's rows to its numbers, if its score has factors."""
    if score is None or score.kind != "divergence":
        return
    begin, end = part.first // part.columns, -(-(part.first + part.count) // part.columns)
    factors = memoryview(score.factors).cast("B").cast("f")[begin:end]
    part.numbers, part.group = bytearray(array("d", factors).tobytes()), begin


def histogram(context: LaunchContext, pieces: Sequence[Piece]) -> list[Answer]:
    """Counts of magnitudes, or of scores, by bracket and bin. pieces: of Histogram steps."""
    parts, kinds, bins, brackets = [], [], 0, 0
    shapes: list[tuple[int, int, int, list[int]]] = []  # elements, first bin, first bracket, bins of each
    for piece in pieces:
        part, elements, sizes = _part(piece, bins, brackets)
        shapes.append((elements, bins, brackets, sizes))
        bins, brackets = bins + sum(sizes), brackets + len(sizes)
        parts.append(part)
        score = score_code(_histogram(piece).score)
        kinds.append((part.codes, score, alignment(part.addresses, part.codes, part.count)))
    counted, totals = context.zeros("int32", bins), context.zeros("int64", brackets, 2)
    strips = context.tile(STRIPS, 256)
    for kind in dict.fromkeys(kinds):
        some = [p for p, of_part in enumerate(kinds) if of_part == kind]
        _launch(
            context, [parts[p] for p in some], [-(-shapes[p][0] // STRIP) for p in some], kind, counted, totals, strips
        )
    counted, totals = context.fetch(counted), context.fetch(totals)
    return [Answer(partial(_answer, counted, totals, *shape)) for shape in shapes]


def _histogram(piece: Piece) -> Histogram:
    assert isinstance(piece.step, Histogram)
    return piece.step


def _part(piece: Piece, bins: int, brackets: int) -> tuple[Part, int, list[int]]:
    """The part of a piece, its number of counted elements, and the number of bins of each bracket."""
    step = _histogram(piece)
    ranked, score = step.brackets, step.score
    read = range(len(piece.inputs)) if score else sorted({0, *(bracket.input for bracket in ranked)})
    addresses, codes = [piece.inputs[i] for i in read], tuple(step.inputs[i].dtype for i in read)
    part = Part(0, addresses, codes, [], [], [], bytearray(), [], 0, piece.numel, piece.first, step.columns)
    add_factors(score, part)
    every, strip = step.every, piece.first // STRIP
    start = -(-strip // every) * every - strip
    strips = range(start, -(-part.count // STRIP), every)
    elements = len(strips) * STRIP
    if strips:
        elements -= max(0, (strips[-1] + 1) * STRIP - part.count)
    sizes = [((bracket.high - bracket.low) >> bracket.shift) + 1 for bracket in ranked]
    # Brackets in the order of their inputs; before them, for each input, the index of its first bracket.
    order = sorted(range(len(ranked)), key=lambda b: 0 if score else ranked[b].input)
    starts = [sum(1 for b in ranked if not score and b.input < i) for i in read] if not score else [0] * len(read)
    part.extra = [every, start, *starts, len(ranked)]
    for b in order:
        bracket = ranked[b]
        part.extra += [bracket.low, bracket.high, bracket.shift, bins + sum(sizes[:b]), brackets + b]
    return part, elements, sizes


def _launch(
    context: LaunchContext,
    parts: Sequence[Part],
    strips: Sequence[int],
    kind: tuple[Any, ...],
    bins: Any,
    totals: Any,
    tile: int,
) -> None:
    from fastinterp._triton.histogram import histogram_kernel

    codes, score, align = kind
    table = Table(parts, [-(-count // tile) for count in strips])
    context.launch(
        histogram_kernel, table.tiles, *table.on(context), bins, totals, len(parts),
        N=len(codes), DT=codes, WIDE=0 in codes, SCORE=score, ALIGN=align, STRIPS=tile,
    )  # fmt: skip


def _answer(counted: Any, totals: Any, elements: int, bins: int, bracket: int, sizes: Sequence[int]) -> list[Counts]:
    counts = []
    for size in sizes:
        above, zero = totals[bracket].tolist()
        of_bins = memoryview(counted[bins : bins + size].contiguous().numpy()).cast("B").cast("I")
        counts.append(Counts(elements, above, zero, of_bins))
        bins, bracket = bins + size, bracket + 1
    return counts
