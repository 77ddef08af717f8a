"""Geometry of a few vectors from their Gram matrix, in float64: angles, and points of the space that they span."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from operator import mul

from fastinterp.compute.requests import Measured
from fastinterp.errors import MethodError

NEARLY_OPPOSITE = 1e-6  # radians; closer to pi, the direction of a great circle is rounding error

Vector = list[float]


def finite(found: Measured, name: str) -> Measured:
    """`found`, if lengths and angles can be had from it.

    Raises: MethodError, if a model has NaN or Inf in the tensor called `name`, or numbers beyond 1e150.
    """
    if not all(map(math.isfinite, chain.from_iterable(found.gram))):
        raise MethodError(
            f"{name} holds NaN or Inf, or numbers beyond 1e150, so its lengths and angles are not defined. "
            "Repair the model, or merge with `linear`, which needs neither"
        )
    return found


def angle(a2: float, b2: float, ab: float) -> float:
    """The angle between a and b, in radians, from <a,a>, <b,b> and <a,b>. A zero vector is at a right angle to all."""
    lengths = math.sqrt(a2) * math.sqrt(b2)
    if lengths == 0.0:
        return math.pi / 2.0
    c = ab / lengths
    c = -1.0 if c < -1.0 else min(1.0, c)
    return math.atan2(math.sqrt((1.0 - c) * (1.0 + c)), c)


def angle_to_sum(a2: float, d2: float, ad: float) -> float:
    """The angle between a and a + d from <a,a>, <d,d> and <a,d>: to full precision also where d is small."""
    long, short = math.sqrt(a2), math.sqrt(d2)
    if long == 0.0 or short == 0.0:
        return 0.0 if long else math.pi / 2.0
    c = max(-1.0, min(1.0, ad / long / short))
    across, along = short * math.sqrt((1.0 - c) * (1.0 + c)), long + short * c
    return math.atan2(across, along) if across or along else math.pi / 2.0


def arc(t: float, theta: float) -> tuple[float, float]:
    """The weights of the two end points at the fraction t of the great circle between them.

    Where there is no such circle, at angles within 1e-6 of 0 or pi, those of a straight line: 1 - t and t.
    """
    if min(theta, math.pi - theta) < NEARLY_OPPOSITE:
        return 1.0 - t, t
    return math.sin((1.0 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


class Span:
    """The space spanned by x_0 and the deltas x_i - x_0. A vector in it is the list of its coordinates in that basis.

    With a base the models are the deltas (coordinates e_1, e_2, ...), without they are the inputs (e_0, e_0 + e_1,
    ...): either way, what is small is measured as small, and cosines near 1 keep their digits.
    """

    def __init__(self, found: Measured, *, based: bool) -> None:
        self.gram, self.n, self.based = found.gram, len(found.gram), based
        self.models = [self._model(i) for i in range(int(based), self.n)]

    def _model(self, i: int) -> Vector:
        return [float(k == i or (k == 0 and not self.based)) for k in range(self.n)]

    def dot(self, a: Vector, b: Vector) -> float:
        return float(sum(u * sum(map(mul, row, b)) for u, row in zip(a, self.gram, strict=True) if u))

    def norm(self, a: Vector) -> float:
        return math.sqrt(max(self.dot(a, a), 0.0))

    def weights(self, a: Vector) -> tuple[float, ...]:
        """Those with which the inputs sum to `a`; with a base, the deltas, and that of the base is 0."""
        return (0.0 if self.based else a[0] - math.fsum(a[1:]), *a[1:])


def summed(weights: Sequence[float], vectors: Sequence[Vector]) -> Vector:
    """sum_i weights[i] * vectors[i]."""
    return [math.fsum(map(mul, weights, column)) for column in zip(*vectors, strict=True)]
