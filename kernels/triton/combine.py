"""Weighted sums: rules 2, 3 and 11 of docs/NUMERICS.md, and statistics of their outputs.

The inputs of a piece are in the order of its sum: the pivot, then the terms. Its numbers are the total and the weights
of the terms, for each output; by row or by column the totals of all groups and then, group by group, the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.effects import (
    add_counts,
    add_effect,
    no_counts,
    no_effect,
    store_counts,
    store_effect,
)
from fastinterp._triton.numbers import is_nonfinite, load_codes, narrow, random_words, store_codes, widen
from fastinterp._triton.table import (
    COLUMNS,
    COUNT,
    FIRST,
    FLAGS,
    GROUP,
    GROUPS,
    HEADER,
    NUMBERS,
    OUTS,
    ROWS,
    place_of,
    row_of,
)

PLAIN = tl.constexpr(0)
BY_ROW = tl.constexpr(1)
BY_COLUMN = tl.constexpr(2)
CONVERT = tl.constexpr(3)  # no sum: the pivot in another dtype
COPY = tl.constexpr(4)  # the pivot, bit for bit


@triton.jit
def _numbers_at(row, first, j, e0, lanes, N: tl.constexpr, PER: tl.constexpr):
    """The addresses of the total and of the first weight of each element's group; of one element if PLAIN.

    first  the address of the row's first number
    """
    if PER == PLAIN:
        total = first + j * N
        weights = total + 1
    else:
        groups = tl.load(row + GROUPS)
        tensor_row, column = place_of(e0, tl.load(row + COLUMNS), lanes)
        group = tensor_row - tl.load(row + GROUP) if PER == BY_ROW else column
        total = first + j * groups * N + group
        weights = first + j * groups * N + groups + group * (N - 1)
    return total, weights


@triton.jit
def _sum(
    row,
    first,
    j,
    xs,
    e0,
    lanes,
    offs,
    mask,
    N: tl.constexpr,
    DT: tl.constexpr,
    PER: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Pivot, sum of the terms and result of output j at elements `offs` of the piece, e0 + lanes of the tensor.

    first  the address of the row's first number
    xs     all inputs, widened; or the pivot alone, if the others are read here
    """
    p = xs[0]
    acc = tl.zeros_like(p)
    WIDE: tl.constexpr = p.dtype == tl.float64
    if PER == CONVERT:
        y = p
    else:
        total_at, weights_at = _numbers_at(row, first, j, e0, lanes, N, PER)
        for i in tl.static_range(1, N):
            if len(xs) == N:
                x = xs[i]
            else:
                x = widen(load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN), DT[i], WIDE)
            w = _number(weights_at + (i - 1), mask, p, PER)
            more = tl.fma(w, x - p, acc)
            acc = more if PER == PLAIN else tl.where(w != 0, more, acc)
        y = tl.fma(_number(total_at, mask, p, PER), p, acc)
    return p, acc, y


@triton.jit
def _number(at, mask, like, PER: tl.constexpr):
    """A coefficient as the compute type: one rounding of what the host computed in f64."""
    if PER == PLAIN:
        number = tl.broadcast_to(tl.load(at).to(like.dtype), like.shape)
    else:
        number = tl.load(at, mask=mask, other=0).to(like.dtype)
    return number


@triton.jit(do_not_specialize=["pieces"])
def combine_kernel(
    table,  # i64: see table.py
    numbers,  # f64
    flags,  # i32[outputs]: becomes 1 where something of an output is NaN or infinite
    pieces,
    N: tl.constexpr,  # inputs of each piece
    DT: tl.constexpr,  # their dtype codes
    OUT: tl.constexpr,  # dtype code of the outputs
    WIDE: tl.constexpr,  # compute in f64
    PER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SATURATE: tl.constexpr,
    MARK_NONFINITE: tl.constexpr,  # whether to set flags
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,  # elements of a tile
):
    program = tl.program_id(0)
    row = row_of(table, pieces, program, HEADER + N)
    start = (program - tl.load(row)) * BLOCK
    count = tl.load(row + COUNT)
    if ALIGN == 16:
        count = tl.multiple_of(count, 16)
    lanes = tl.arange(0, BLOCK)
    offs = start + lanes
    mask = offs < count
    e0 = tl.load(row + FIRST) + start
    pivot = load_codes(tl.load(row + HEADER), offs, mask, DT[0], ALIGN)
    xs = (widen(pivot, DT[0], WIDE),)
    if N <= 8:  # few enough to be held in registers while all outputs are made
        for i in tl.static_range(1, N):
            xs = xs + (widen(load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN), DT[i], WIDE),)
    outputs = tl.load(row + ROWS)
    outs = table + tl.load(row + OUTS)
    first = numbers + tl.load(row + NUMBERS)
    if MARK_NONFINITE:
        flags += tl.load(row + FLAGS)
    for j in range(outputs):
        if PER == COPY:
            codes = pivot
        else:
            _, _, y = _sum(row, first, j, xs, e0, lanes, offs, mask, N, DT, PER, ALIGN)
            word = random_words(e0 + lanes, tl.load(outs + outputs + j)) if STOCHASTIC else 0
            codes = narrow(y, word, OUT, STOCHASTIC, SATURATE)
        store_codes(tl.load(outs + j), offs, codes, mask, OUT, ALIGN)
        if MARK_NONFINITE:
            bad = tl.max((is_nonfinite(codes, OUT) & mask).to(tl.int32), axis=0)
            tl.store(flags + j, 1, mask=bad > 0)


@triton.jit
def effect_kernel(
    table,
    numbers,
    flags,
    spans,  # i64[programs, 4]: row of the table, first element in the piece, elements, index of the first answer
    results,  # f64[answers, 4] or i64[answers, 4]: see effects.py; zeros before
    COUNTS: tl.constexpr,  # whether NaN and infinities are counted, where there are any; else how outputs moved
    N: tl.constexpr,
    DT: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
    PER: tl.constexpr,
    SATURATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of the outputs of some chunks. The order of their sums is fixed, but no part of the contract."""
    span = spans + tl.program_id(0) * 4
    row = table + tl.load(span) * (HEADER + N)
    begin = tl.load(span + 1)
    end = begin + tl.load(span + 2)
    if ALIGN == 16:
        begin = tl.multiple_of(begin, 16)
        end = tl.multiple_of(end, 16)
    e0 = tl.load(row + FIRST)
    first = numbers + tl.load(row + NUMBERS)
    lanes = tl.arange(0, BLOCK)
    outs = table + tl.load(row + OUTS)
    outputs = tl.load(row + ROWS)
    for j in range(outputs):
        to = results + (tl.load(span + 3) + j) * 4
        out = tl.load(outs + j)
        if COUNTS:
            if tl.load(flags + tl.load(row + FLAGS) + j) != 0:
                counts = no_counts(BLOCK)
                for start in range(begin, end, BLOCK):
                    offs = start + lanes
                    mask = offs < end
                    codes = load_codes(out, offs, mask, OUT, ALIGN)
                    counts = add_counts(counts, codes, mask, OUT, True)
                    for i in tl.static_range(N):
                        part = _takes_part(row, first, j, i, e0 + start, lanes, mask, WIDE, N, PER)
                        codes = load_codes(tl.load(row + HEADER + i), offs, part, DT[i], ALIGN)
                        counts = add_counts(counts, codes, part, DT[i], False)
                store_counts(to, counts)
        else:
            affine = tl.load(outs + 2 * outputs + j) != 0
            sums = no_effect(BLOCK)
            for start in range(begin, end, BLOCK):
                offs = start + lanes
                mask = offs < end
                xs = (widen(load_codes(tl.load(row + HEADER), offs, mask, DT[0], ALIGN), DT[0], WIDE),)
                p, acc, y = _sum(row, first, j, xs, e0 + start, lanes, offs, mask, N, DT, PER, ALIGN)
                codes = load_codes(out, offs, mask, OUT, ALIGN)
                sums = add_effect(sums, p, tl.where(affine, acc, y - p), codes, mask, OUT, SATURATE)
            store_effect(to, sums)


@triton.jit
def _takes_part(
    row, first, j, i: tl.constexpr, e0, lanes, mask, WIDE: tl.constexpr, N: tl.constexpr, PER: tl.constexpr
):
    """Where input i has a weight that is not 0 in the compute type."""
    part = mask
    if PER != PLAIN and PER != CONVERT and i > 0:
        _, weights_at = _numbers_at(row, first, j, e0, lanes, N, PER)
        w = tl.load(weights_at + (i - 1), mask=mask, other=0)
        part = mask & ((w if WIDE else w.to(tl.float32)) != 0)
    return part
