"""Statistics of an output: the sums of its change from the pivot, and counts of NaN and Inf."""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.numbers import is_nan, is_nonfinite, narrow, widen


@triton.jit
def no_effect(BLOCK: tl.constexpr):
    zeros = tl.zeros([BLOCK], tl.float64)
    return zeros, zeros, zeros, tl.zeros([BLOCK], tl.int32)


@triton.jit
def add_effect(sums, p, intended, codes, mask, OUT: tl.constexpr, SATURATE: tl.constexpr):
    """Adds a tile: its pivots, the intended change, and what was stored.

    sums  of p * p, D * D and (out - p) * D in f64, and of elements stored otherwise than p would be. Differences are
          rounded to the compute dtype
    """
    WIDE: tl.constexpr = p.dtype == tl.float64
    stored = widen(codes, OUT, WIDE).to(p.dtype)
    unmoved = narrow(p, 0, OUT, False, SATURATE)
    p64 = tl.where(mask, p.to(tl.float64), 0.0)
    d64 = tl.where(mask, intended.to(tl.float64), 0.0)
    moved64 = tl.where(mask, (stored - p).to(tl.float64), 0.0)
    pp, dd, od, changed = sums
    changed += tl.where((codes != unmoved) & mask, 1, 0)
    return tl.fma(p64, p64, pp), tl.fma(d64, d64, dd), tl.fma(moved64, d64, od), changed


@triton.jit
def store_effect(to, sums):
    """to  f64[4]. The order of these sums is no part of the numeric contract."""
    for i in tl.static_range(4):
        tl.store(to + i, tl.sum(sums[i], axis=0).to(tl.float64))


@triton.jit
def no_counts(BLOCK: tl.constexpr):
    zeros = tl.zeros([BLOCK], tl.int32)
    return zeros, zeros, zeros, zeros


@triton.jit
def add_counts(counts, codes, mask, D: tl.constexpr, OUTPUT: tl.constexpr):
    """Adds the NaN and the infinities of a tile: of inputs, or of an output."""
    nan_in, inf_in, nan_out, inf_out = counts
    nan = is_nan(codes, D) & mask
    inf = is_nonfinite(codes, D) & mask
    nans = tl.where(nan, 1, 0)
    infs = tl.where(inf, 1, 0) - nans
    if OUTPUT:
        nan_out += nans
        inf_out += infs
    else:
        nan_in += nans
        inf_in += infs
    return nan_in, inf_in, nan_out, inf_out


@triton.jit
def store_counts(to, counts):
    """to  i64[4]: NaN and infinities of the inputs, then of the output"""
    for i in tl.static_range(4):
        tl.store(to + i, tl.sum(counts[i], axis=0).to(tl.int64))
