"""Sums with masks: rule 14 of docs/NUMERICS.md.

The inputs of a piece are those that one output reads, the base first. Its numbers: least share, other share, limit; for
each term weight, sign weight, share, sole weight, and weight * 1e-6; then the factors of a divergence. The words at
EXTRA: min_bits of the score; for each term min_bits, max_bits, limit of the random number, and Philox key.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.effects import add_counts, add_effect, no_counts, no_effect, store_counts, store_effect
from fastinterp._triton.numbers import (
    is_drawn,
    is_nonfinite,
    load_codes,
    narrow,
    random_words,
    store_codes,
    widen,
)
from fastinterp._triton.scores import NO_SCORE, divide, magnitude, score_of
from fastinterp._triton.table import COUNT, EXTRA, FIRST, FLAGS, HEADER, NUMBERS, OUTS, row_of

SHARED_NUMBERS = tl.constexpr(3)
TERM_NUMBERS = tl.constexpr(5)


@triton.jit
def is_kept(d, test, e, RANDOM: tl.constexpr):
    """Whether elements pass a test, by rule 10. test: address of min_bits, max_bits, limit and key."""
    mag = magnitude(d).to(tl.int64)
    mask = (mag >= tl.load(test)) & (mag <= tl.load(test + 1))
    if RANDOM:
        # Volatile: else compilers compute the keys of all rounds before a loop, and spill registers in it.
        mask = mask & is_drawn(e, tl.load(test + 2), tl.load(test + 3, volatile=True))
    return mask


@triton.jit
def _deltas(xs, most, TERMS: tl.constexpr, LIMITED: tl.constexpr):
    deltas = ()
    for t in tl.static_range(len(TERMS)):
        d = xs[TERMS[t]] - xs[0] if TERMS[t] > 0 else tl.zeros_like(xs[0])
        if LIMITED:
            d = tl.where(d < -most, -most, d)
            d = tl.where(d > most, most, d)
        deltas = deltas + (d,)
    return deltas


@triton.jit
def _minus(deltas, masks, terms):
    """Where the sum of the signed deltas is negative: the elected sign is minus."""
    total = tl.zeros_like(deltas[0])
    for t in tl.static_range(len(deltas)):
        sign_weight = tl.broadcast_to(tl.load(terms + t * TERM_NUMBERS + 1), total.shape)
        more = tl.fma(sign_weight.to(total.dtype), deltas[t], total)
        total = tl.where(masks[t] & (sign_weight != 0), more, total)
    return total < 0


@triton.jit
def _elected(d, sign_weight, minus):
    """Where a delta times its sign weight (f64) has the elected sign."""
    if d.dtype == tl.float64:
        negative = d.to(tl.int64, bitcast=True) < 0
    else:
        negative = d.to(tl.int32, bitcast=True) < 0
    return (sign_weight != 0) & ((d != d) | ((d != 0) & ((negative != (sign_weight < 0)) == minus)))


@triton.jit
def _step(deltas, masks, shares, terms, ELECTS: tl.constexpr, DIVIDES: tl.constexpr, SOLE: tl.constexpr):
    step = tl.zeros_like(deltas[0])
    share = tl.zeros_like(step)
    sole = tl.zeros_like(step)
    count = tl.zeros(step.shape, tl.int32)
    minus = _minus(deltas, masks, terms) if ELECTS else 0
    for t in tl.static_range(len(deltas)):
        numbers = terms + t * TERM_NUMBERS
        d = deltas[t]
        takes = masks[t]
        if ELECTS:
            takes = takes & _elected(d, tl.broadcast_to(tl.load(numbers + 1), d.shape), minus)
        more = tl.fma(tl.broadcast_to(tl.load(numbers).to(step.dtype), step.shape), d, step)
        step = tl.where(takes, more, step)
        if DIVIDES:
            share = tl.where(takes, share + tl.load(numbers + 2).to(step.dtype), share)
        if SOLE:
            only = tl.fma(tl.broadcast_to(tl.load(numbers + 3).to(step.dtype), step.shape), d, tl.zeros_like(step))
            sole = tl.where(takes, only, sole)
            count += takes.to(tl.int32)
    if DIVIDES:
        least = tl.load(shares).to(step.dtype)
        other = tl.load(shares + 1).to(step.dtype)
        step = divide(step, tl.where((share == 0) | (tl.abs(share) < least), other, share))
    if SOLE:
        step = tl.where(count == 1, sole, step)
    return step


@triton.jit
def _important(xs, deltas, terms, IMPORTANCE: tl.constexpr):
    step = tl.zeros_like(xs[0])
    share = tl.zeros_like(step)
    for t in tl.static_range(len(deltas)):
        weight = tl.broadcast_to(tl.load(terms + t * TERM_NUMBERS).to(step.dtype), step.shape)
        least = tl.broadcast_to(tl.load(terms + t * TERM_NUMBERS + 4).to(step.dtype), step.shape)
        g = tl.fma(weight, xs[IMPORTANCE[t]], least)
        step = tl.fma(g, deltas[t], step)
        share += g
    return tl.where(share == 0, 0.0, divide(step, share)).to(step.dtype)


@triton.jit
def _sum(
    table,
    row,
    numbers,
    xs,
    e0,
    lanes,
    mask,
    TERMS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    RANDOM: tl.constexpr,
    ELECTS: tl.constexpr,
    DIVIDES: tl.constexpr,
    SOLE: tl.constexpr,
    LIMITED: tl.constexpr,
    SCORE: tl.constexpr,
):
    """The change that is added to the base, at elements e0 + lanes of the tensor."""
    shares = numbers + tl.load(row + NUMBERS)
    terms = shares + SHARED_NUMBERS
    extra = table + tl.load(row + EXTRA)
    deltas = _deltas(xs, tl.load(shares + 2).to(xs[0].dtype), TERMS, LIMITED)
    if len(IMPORTANCE) > 0:
        step = _important(xs, deltas, terms, IMPORTANCE)
    else:
        high = mask
        if SCORE != NO_SCORE:
            score = score_of(row, terms + len(TERMS) * TERM_NUMBERS, deltas, e0, lanes, mask, SCORE)
            high = magnitude(score).to(tl.int64) >= tl.load(extra)
        masks = ()
        for t in tl.static_range(len(TERMS)):
            masks = masks + (high & is_kept(deltas[t], extra + 1 + 4 * t, e0 + lanes, RANDOM[t]),)
        step = _step(deltas, masks, shares, terms, ELECTS, DIVIDES, SOLE)
    return step


@triton.jit(do_not_specialize=["pieces"])
def masked_sum_kernel(
    table,  # i64: see table.py
    numbers,  # f64
    flags,  # i32[outputs]: becomes 1 where something read or written is NaN or infinite
    pieces,
    N: tl.constexpr,
    DT: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
    TERMS: tl.constexpr,  # (input, ...)
    IMPORTANCE: tl.constexpr,  # importance input of each term, or ()
    RANDOM: tl.constexpr,  # of each term: whether its mask is random
    ELECTS: tl.constexpr,
    DIVIDES: tl.constexpr,
    SOLE: tl.constexpr,
    LIMITED: tl.constexpr,
    SCORE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SATURATE: tl.constexpr,
    MARK_NONFINITE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
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
    xs = ()
    bad = lanes < 0
    for i in tl.static_range(N):
        codes = load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN)
        xs = xs + (widen(codes, DT[i], WIDE),)
        if MARK_NONFINITE:
            bad = bad | is_nonfinite(codes, DT[i])
    step = _sum(
        table, row, numbers, xs, e0, lanes, mask, TERMS, IMPORTANCE, RANDOM, ELECTS, DIVIDES, SOLE, LIMITED, SCORE
    )
    outs = table + tl.load(row + OUTS)
    word = random_words(e0 + lanes, tl.load(outs + 1)) if STOCHASTIC else 0
    codes = narrow(xs[0] + step, word, OUT, STOCHASTIC, SATURATE)
    store_codes(tl.load(outs), offs, codes, mask, OUT, ALIGN)
    if MARK_NONFINITE:
        bad = (bad | is_nonfinite(codes, OUT)) & mask
        tl.store(flags + tl.load(row + FLAGS), 1, mask=tl.max(bad.to(tl.int32), axis=0) > 0)


@triton.jit
def masked_sum_effect_kernel(
    table,
    numbers,
    flags,
    spans,  # as in combine.py
    results,
    COUNTS: tl.constexpr,
    N: tl.constexpr,
    DT: tl.constexpr,
    OUT: tl.constexpr,
    WIDE: tl.constexpr,
    TERMS: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    RANDOM: tl.constexpr,
    ELECTS: tl.constexpr,
    DIVIDES: tl.constexpr,
    SOLE: tl.constexpr,
    LIMITED: tl.constexpr,
    SCORE: tl.constexpr,
    SATURATE: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Statistics of the outputs of some chunks. All NaN and Inf of inputs are counted, of masked elements too: these do
    not reach the output."""
    span = spans + tl.program_id(0) * 4
    row = table + tl.load(span) * (HEADER + N)
    begin = tl.load(span + 1)
    end = begin + tl.load(span + 2)
    if ALIGN == 16:
        begin = tl.multiple_of(begin, 16)
        end = tl.multiple_of(end, 16)
    first = tl.load(row + FIRST)
    lanes = tl.arange(0, BLOCK)
    out = tl.load(table + tl.load(row + OUTS))
    to = results + tl.load(span + 3) * 4
    if COUNTS:
        if tl.load(flags + tl.load(row + FLAGS)) != 0:
            counts = no_counts(BLOCK)
            for start in range(begin, end, BLOCK):
                offs = start + lanes
                mask = offs < end
                counts = add_counts(counts, load_codes(out, offs, mask, OUT, ALIGN), mask, OUT, True)
                for i in tl.static_range(N):
                    codes = load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN)
                    counts = add_counts(counts, codes, mask, DT[i], False)
            store_counts(to, counts)
    else:
        sums = no_effect(BLOCK)
        for start in range(begin, end, BLOCK):
            offs = start + lanes
            mask = offs < end
            xs = ()
            for i in tl.static_range(N):
                xs = xs + (widen(load_codes(tl.load(row + HEADER + i), offs, mask, DT[i], ALIGN), DT[i], WIDE),)
            step = _sum(
                table, row, numbers, xs, first + start, lanes, mask,
                TERMS, IMPORTANCE, RANDOM, ELECTS, DIVIDES, SOLE, LIMITED, SCORE,
            )  # fmt: skip
            codes = load_codes(out, offs, mask, OUT, ALIGN)
            sums = add_effect(sums, xs[0], step, codes, mask, OUT, SATURATE)
        store_effect(to, sums)
