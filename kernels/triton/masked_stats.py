"""Statistics of masked deltas: rules 7 and 10 of docs/NUMERICS.md. Chunks as in measure.py; a piece is one row."""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.masked_sum import is_kept
from fastinterp._triton.measure import CHUNK, LANES, addresses_of, codes_of, no_sums
from fastinterp._triton.numbers import fold, widen
from fastinterp._triton.scores import NO_SCORE, magnitude, score_of
from fastinterp._triton.table import COUNT, EXTRA, FIRST, GROUPS, HEADER, NUMBERS, row_of


@triton.jit
def _deltas(codes, step: tl.constexpr, DT: tl.constexpr, WIDE: tl.constexpr):
    x0 = widen(codes[step * len(DT)], DT[0], WIDE)
    deltas = ()
    for i in tl.static_range(1, len(DT)):
        deltas = deltas + (widen(codes[step * len(DT) + i], DT[i], WIDE) - x0,)
    return deltas


@triton.jit
def _masks(row, extra, numbers, deltas, e0, offs, mask, RANDOM: tl.constexpr, SCORE: tl.constexpr):
    """The mask of every delta: which elements are kept."""
    high = mask
    if SCORE != NO_SCORE:
        factors = numbers + tl.load(row + NUMBERS)
        score = score_of(row, factors, deltas, e0, offs, mask, SCORE)
        high = mask & (magnitude(score).to(tl.int64) >= tl.load(extra))
    masks = ()
    for i in tl.static_range(len(deltas)):
        masks = masks + (high & is_kept(deltas[i], extra + 1 + 4 * i, e0 + offs, RANDOM[i]),)
    return masks


@triton.jit
def _add(sums, counts, deltas, masks, DELTAS: tl.constexpr, L1: tl.constexpr, SQUARES: tl.constexpr):
    masks_set = tl.zeros(masks[0].shape, tl.int32)
    for i in tl.static_range(len(masks)):
        masks_set += masks[i].to(tl.int32)
    all_sums = ()
    all_counts = ()
    for k in tl.static_range(len(DELTAS)):
        d = deltas[DELTAS[k]].to(tl.float64)
        left = tl.where(masks[DELTAS[k]], d, 0.0)
        l1 = sums[3 * k] + tl.abs(d) if L1 else sums[3 * k]
        kept_l1 = sums[3 * k + 1] + tl.abs(left) if L1 else sums[3 * k + 1]
        squares = tl.fma(left, left, sums[3 * k + 2]) if SQUARES else sums[3 * k + 2]
        all_sums = all_sums + (l1, kept_l1, squares)
        one = masks[DELTAS[k]].to(tl.int32)
        all_counts = all_counts + (counts[2 * k] + one, counts[2 * k + 1] + tl.where(masks_set > 1, one, 0))
    return all_sums, all_counts


@triton.jit(do_not_specialize=["pieces"])
def masked_stats_kernel(
    table,  # i64: see table.py. EXTRA as in masked_sum.py, GROUPS is the index of the first answer
    numbers,  # f64: factors of a divergence
    sums_out,  # f64[answers, 3 * N]: L1 norms of deltas, then of masked deltas, then squares of masked deltas
    counts_out,  # i32[answers, 2 * N]: elements that are kept, then those that another delta keeps, too
    pieces,
    N: tl.constexpr,
    DT: tl.constexpr,
    WIDE: tl.constexpr,
    DELTAS: tl.constexpr,  # (delta, ...), from 0: those that this launch sums
    RANDOM: tl.constexpr,
    SCORE: tl.constexpr,
    L1: tl.constexpr,
    SQUARES: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,  # as in measure.py
    TILES: tl.constexpr,  # chunks of a program
):
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + N)
    inputs = addresses_of(row, N)
    count = tl.load(row + COUNT)
    if ALIGN == 16:
        count = tl.multiple_of(count, 16)
    first = tl.load(row + FIRST)
    extra = table + tl.load(row + EXTRA)
    chunk = (program - tl.load(row)) * TILES + tl.arange(0, TILES)
    begin = tl.multiple_of(chunk.to(tl.int64) * CHUNK, 16)
    elements = begin[:, None] + tl.arange(0, LANES)[None, :]
    here = begin[:, None] < count
    sums = no_sums(3 * len(DELTAS), TILES, tl.float64)
    counts = no_sums(2 * len(DELTAS), TILES, tl.int32)
    codes = codes_of(inputs, elements, LANES, count, here, DT, AHEAD, ALIGN)
    for start in range(0, tl.minimum(count, CHUNK), LANES * AHEAD):
        # Loaded while the current ones are added, as far as the chunk goes.
        inside = here & (start + LANES * AHEAD < CHUNK)
        more = codes_of(inputs, elements + start + LANES * AHEAD, LANES, count, inside, DT, AHEAD, ALIGN)
        for step in tl.static_range(AHEAD):
            offs = elements + start + step * LANES
            deltas = _deltas(codes, step, DT, WIDE)
            masks = _masks(row, extra, numbers, deltas, first, offs, offs < count, RANDOM, SCORE)
            sums, counts = _add(sums, counts, deltas, masks, DELTAS, L1, SQUARES)
        codes = more
    answer = tl.load(row + GROUPS) + chunk
    for k in tl.static_range(len(DELTAS)):
        for part in tl.static_range(3):
            at = sums_out + answer * 3 * N + part * N + DELTAS[k] + 1
            tl.store(at, fold(sums[3 * k + part], TILES, LANES, 8), mask=begin < count)
        for part in tl.static_range(2):
            at = counts_out + answer * 2 * N + part * N + DELTAS[k] + 1
            tl.store(at, fold(counts[2 * k + part], TILES, LANES, 8), mask=begin < count)
