"""Histograms of magnitudes or scores: rule 15 of docs/NUMERICS.md."""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.numbers import load_codes, widen
from fastinterp._triton.scores import NO_SCORE, magnitude, score_of
from fastinterp._triton.table import COUNT, EXTRA, FIRST, HEADER, NUMBERS, row_of
from fastinterp.ops import contract

STRIP = tl.constexpr(contract.STRIP)


@triton.jit
def _count(mags, mask, bracket, bins, totals):
    """Counts magnitudes in one bracket: its low, high, shift, first bin, and index among the totals."""
    low = tl.load(bracket).to(tl.uint32)
    high = tl.load(bracket + 1).to(tl.uint32)
    shift = tl.load(bracket + 2).to(tl.uint32)
    first = bins + tl.load(bracket + 3)
    total = totals + tl.load(bracket + 4) * 2
    zero = mask & (mags == 0)
    inside = mask & (mags != 0) & (mags >= low) & (mags <= high)
    tl.atomic_add(first + ((mags - low) >> shift).to(tl.int64), 1, mask=inside, sem="relaxed")
    zeros = tl.sum(tl.sum(zero.to(tl.int32), axis=1), axis=0)
    # Zeros are many, and adding to one address again and again waits for the last addition each time.
    tl.atomic_add(first, zeros, mask=(low == 0) & (zeros > 0), sem="relaxed")
    above = tl.sum(tl.sum((mask & (mags > high)).to(tl.int32), axis=1), axis=0)
    tl.atomic_add(total, above.to(tl.int64), mask=above > 0, sem="relaxed")
    tl.atomic_add(total + 1, zeros.to(tl.int64), mask=zeros > 0, sem="relaxed")


@triton.jit(do_not_specialize=["pieces"])
def histogram_kernel(
    table,  # i64: see table.py. EXTRA: how many strips apart, where the first begins, the first bracket of each input
    # and the end of the last, and the brackets: see _count
    numbers,  # f64: factors of a divergence
    bins,  # i32, added to
    totals,  # i64[brackets, 2], added to: above the bracket, and equal to 0
    pieces,
    N: tl.constexpr,
    DT: tl.constexpr,
    WIDE: tl.constexpr,
    SCORE: tl.constexpr,
    ALIGN: tl.constexpr,
    STRIPS: tl.constexpr,  # of a program
):
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + N)
    words = table + tl.load(row + EXTRA)
    every = tl.load(words)
    count = tl.load(row + COUNT)
    if ALIGN == 16:
        count = tl.multiple_of(count, 16)
    strip = ((program - tl.load(row)) * STRIPS + tl.arange(0, STRIPS)) * every
    offs = tl.load(words + 1) * STRIP + strip[:, None] * STRIP + tl.arange(0, STRIP)[None, :]
    mask = offs < count
    x0 = widen(load_codes(tl.load(row + HEADER), offs, mask, DT[0], ALIGN), DT[0], WIDE)
    brackets = words + 3 + N
    if SCORE == NO_SCORE:
        for i in tl.static_range(1, N):
            x = widen(load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN), DT[i], WIDE)
            mags = magnitude(x - x0)
            for b in range(tl.load(words + 2 + i), tl.load(words + 3 + i)):
                _count(mags, mask, brackets + b * 5, bins, totals)
    else:
        deltas = ()
        for i in tl.static_range(1, N):
            x = widen(load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN), DT[i], WIDE)
            deltas = deltas + (x - x0,)
        factors = numbers + tl.load(row + NUMBERS)
        mags = magnitude(score_of(row, factors, deltas, tl.load(row + FIRST), offs, mask, SCORE))
        for b in range(tl.load(words + 2), tl.load(words + 2 + N)):
            _count(mags, mask, brackets + b * 5, bins, totals)
