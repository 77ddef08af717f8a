"""a * b + c with one rounding, in numpy: exact where numpy has no such operation.

Source: Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
odd".
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def fma(a: Any, b: Array, c: Array) -> Array:
    """a * b + c with one rounding, in the dtype of b: see fma32 and fma64."""
    return fma64(a, b, c) if b.dtype == np.float64 else fma32(a, b, c)


def fma32(a: Any, b: Any, c: Any) -> Array:
    """a * b + c of f32 with one rounding to nearest even: f32, broadcast.

    The product is exact in f64. The sum is rounded to odd there and then once to f32, which is right because 53 bits
    are at least two more than f32 has (Boldo and Melquiond). Nothing over- or underflows in f64.
    """
    with np.errstate(all="ignore"):
        product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
        return _sum_to_odd(product, np.asarray(c, np.float64)).astype(np.float32)


def fma64(a: Any, b: Any, c: Any) -> Array:
    """a * b + c of f64 with one rounding to nearest even: f64, broadcast.

    Boldo and Melquiond's algorithm where neither the product nor its error can over- or underflow; exact rational
    arithmetic, an element at a time, elsewhere.
    """
    with np.errstate(all="ignore"):
        a, b, c = (np.array(v) for v in np.broadcast_arrays(*(np.asarray(v, np.float64) for v in (a, b, c))))
        high, low = _two_product(a, b)
        t_high, t_low = _two_sum(c, low)
        v_high, v_low = _two_sum(high, t_high)
        y = v_high + _sum_to_odd(t_low, v_low)
        factors_finite = np.isfinite(a) & np.isfinite(b)
        plain = (a == 0) | (b == 0) | ~factors_finite | ~np.isfinite(c)
        # An infinite c wins over a finite product, even over one that would overflow.
        y = np.where(plain, np.where(factors_finite & ~np.isfinite(c), c, a * b + c), y)
        ea, eb, ec = (np.frexp(v)[1] for v in (a, b, c))
        safe = (abs(ea) < 960) & (abs(eb) < 960) & (abs(ea + eb) < 900) & ((abs(ec) < 900) | (c == 0))
        rest = ~(plain | safe)
        y[rest] = [_exact_fma(*abc) for abc in zip(a[rest].tolist(), b[rest].tolist(), c[rest].tolist(), strict=True)]
        return y


def _exact_fma(a: float, b: float, c: float) -> float:
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    try:
        return float(exact)  # one rounding to nearest even, subnormals and the sign of an underflow included
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and what the rounding lost (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b rounded, and what the rounding lost (Dekker, with Veltkamp's split into halves of 26 bits)."""

    def split(x: Array) -> tuple[Array, Array]:
        t = x * 134217729.0  # 2**27 + 1
        high = t - (t - x)
        return high, x - high

    p = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _sum_to_odd(a: Array, b: Array) -> Array:
    """a + b in f64; where inexact, that one of the two neighbours whose last bit is 1."""
    s, lost = _two_sum(a, b)
    even = (s.view(np.int64) & 1 == 0) & (lost != 0) & np.isfinite(s)
    return np.where(even, np.nextafter(s, np.where(lost > 0, np.inf, -np.inf)), s)
