"""Magnitudes and scores: rules 10 and 13 of docs/NUMERICS.md."""

from __future__ import annotations

import triton
import triton.language as tl
from fastinterp._triton.table import COLUMNS, GROUP, place_of

NO_SCORE = tl.constexpr(0)
VARIANCE = tl.constexpr(1)
DIVERGENCE = tl.constexpr(2)


@triton.jit
def magnitude(d):
    """|d| as the bits of a float32: u32. Every NaN is 7FFFFFFF."""
    mag = d.to(tl.float32).to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    return tl.where(mag > 0x7F800000, 0x7FFFFFFF, mag).to(tl.uint32)


@triton.jit
def divide(a, b):
    """IEEE division: `/` is only nearly so for float32."""
    if a.dtype == tl.float32:
        quotient = tl.div_rn(a, b)
    else:
        quotient = a / b
    return quotient


@triton.jit
def score_of(row, factors, deltas, e0, lanes, mask, SCORE: tl.constexpr):
    """The score of each element from its deltas. factors: f64 by row of the tensor, of a divergence."""
    if SCORE == VARIANCE:
        mean = tl.zeros_like(deltas[0])
        for i in tl.static_range(len(deltas)):
            mean += deltas[i]
        mean = divide(mean, tl.full(mean.shape, len(deltas), mean.dtype))
        score = tl.zeros_like(mean)
        for i in tl.static_range(len(deltas)):
            away = deltas[i] - mean
            score = tl.fma(away, away, score)
    else:
        tensor_row, _ = place_of(e0, tl.load(row + COLUMNS), lanes)
        factor = tl.load(factors + tensor_row - tl.load(row + GROUP), mask=mask, other=0).to(deltas[0].dtype)
        score = tl.abs(deltas[0]) * factor
    return score
