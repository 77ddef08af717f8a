"""Shared by the methods with weights: shares, and scaling into the range of float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastinterp.errors import MethodError

ORDINARY = 2.0**32  # weights between its inverse and this are left as they are


def level(weights: Sequence[float]) -> tuple[float, ...]:
    """The weights divided by one power of two, so that float32 can hold them and their sums, where only their quotients
    or signs count. Without rounding: by 1, unless the largest is beyond 2^32, or none above 2^-32.
    """
    largest = max(map(abs, weights), default=0.0)
    if largest == 0.0 or 1.0 / ORDINARY < largest < ORDINARY:
        return tuple(weights)
    exponent = math.frexp(largest)[1]
    return tuple(math.ldexp(w, -exponent) for w in weights)


def cancel(weights: Sequence[float]) -> bool:
    """Whether the sum of the weights is below 1e-8 of the sum of their magnitudes."""
    return abs(math.fsum(weights)) <= 1e-8 * math.fsum(map(abs, weights))


def shares(
    weights: Sequence[float], *, instead: str = "Change them, or write `normalize: false` to use them as they are"
) -> tuple[float, ...]:
    """f64[n], each weight divided by their sum.

    instead  the end of the message: what to do

    Raises: MethodError, if the weights cancel: their sum is below 1e-8 of the sum of their magnitudes, so that the
    quotients would be mostly rounding error, or infinite.
    """
    total = math.fsum(weights)
    if cancel(weights):
        listed = ", ".join(f"{w:g}" for w in weights[:8]) + (", ..." if len(weights) > 8 else "")
        raise MethodError(f"the weights {listed} sum to {total:g}, which is too near 0 to divide by. {instead}")
    return tuple(w / total for w in weights)
