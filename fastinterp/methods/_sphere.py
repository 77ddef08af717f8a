"""Geometry of a few vectors from their Gram matrix, in float64: angles, and points of the space that they span."""

from __future__ import annotations

import math
from array import array
from collections.abc import Generator, Iterable, Sequence
from operator import mul
from typing import Any

from fastinterp.errors import MethodError
from fastinterp.ops.combine import Combine
from fastinterp.ops.requests import Measure, Measured, Per, Request

NEARLY_OPPOSITE = 1e-6  # radians; closer to pi, the direction of a great circle is rounding error
APART = 8.0  # a model shorter than the first by more than this loses more than 3 of its bits in a delta from it

Vector = list[float]
Column = Sequence[float]  # a number of each group, be it the tensor, a row or a column
Columns = tuple[tuple[Column, ...], ...]


def grams(name: str, per: Per, *, deltas: bool = True) -> Generator[Request, Any, Columns]:
    """The Gram matrices of all groups of the tensor called `name`, n x n columns, once lengths and angles are defined.

    Raises: MethodError, if a model has NaN or Inf in it, or numbers beyond 1e150.
    """
    measured = yield Measure(deltas=deltas, per=per)
    if per == "tensor":
        measured = finite(measured, name)
        return tuple(tuple((x,) for x in row) for row in measured.gram)
    gram: Columns = measured.gram
    _check_finite([column for i, row in enumerate(gram) for column in row[i:]], name)
    return gram


def finite(measured: Measured, name: str) -> Measured:
    """`measured`, if its Gram matrix is finite, so that lengths and angles are defined.

    Raises: MethodError, as `grams`.
    """
    _check_finite(measured.gram, name)
    return measured


def _check_finite(columns: Iterable[Column], name: str) -> None:
    # Where a sum is not finite, an element may be at fault, or the sum of large ones.
    if not all(math.isfinite(sum(column)) or all(map(math.isfinite, column)) for column in columns):
        raise MethodError(
            f"{name} holds NaN or Inf, or numbers beyond 1e150, so its lengths and angles are not defined. "
            "Repair the model, or merge with `linear`, which needs neither"
        )


def angle(a2: float, b2: float, ab: float) -> float:
    """The angle between a and b, in radians, from <a,a>, <b,b> and <a,b>. A zero vector is at a right angle to all."""
    return each_angle((a2,), (b2,), (ab,))[0]


def each_angle(a2: Column, b2: Column, ab: Column) -> array[float]:
    """The same of each group. One loop that calls no function of Python, as rows are many."""
    sqrt, atan2, found = math.sqrt, math.atan2, array("d")
    for aa, bb, product in zip(a2, b2, ab, strict=True):
        lengths = sqrt(aa) * sqrt(bb)
        c = product / lengths if lengths else 0.0
        if c > 1.0:
            c = 1.0
        elif c < -1.0:
            c = -1.0
        found.append(atan2(sqrt((1.0 - c) * (1.0 + c)), c))
    return found


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


def is_short(a2: float, d2: float, ad: float) -> bool:
    """Whether a + d is much shorter than a, or 0, from <a,a>, <d,d> and <a,d>: d loses its digits."""
    return a2 + 2.0 * ad + d2 < a2 / APART**2


class Span:
    """The space spanned by n vectors, from their Gram matrix. A vector in it is the list of its coordinates.

    models  those that are averaged, as vectors of the space
    based   the basis is x_0 and the deltas x_i - x_0, and the models are the deltas (coordinates e_1, e_2, ...)
    deltas  without a base: the basis is the same, and the models are the inputs (e_0, e_0 + e_1, ...), so that what is
            small is measured as small, and cosines near 1 keep their digits. False: the basis is the inputs themselves
            (e_0, e_1, ...), where one `is_short`
    """

    def __init__(self, measured: Measured, *, based: bool, deltas: bool = True) -> None:
        self.gram, self.n, self.based = measured.gram, len(measured.gram), based
        self._deltas = deltas
        self.models = [self._model(i) for i in range(int(based), self.n)]

    def _model(self, i: int) -> Vector:
        return [float(k == i or (k == 0 and self._deltas and not self.based)) for k in range(self.n)]

    def dot(self, a: Vector, b: Vector) -> float:
        return float(sum(u * sum(map(mul, row, b)) for u, row in zip(a, self.gram, strict=True) if u))

    def norm(self, a: Vector) -> float:
        return math.sqrt(max(self.dot(a, a), 0.0))

    def sum(self, a: Vector) -> Combine:
        """The sum of the inputs that is `a`; with a base, what is added to it."""
        if self.based:
            return Combine((0.0, *a[1:]), 0)
        weights = (a[0] - math.fsum(a[1:]), *a[1:]) if self._deltas else tuple(a)
        return Combine(weights, pivot=self.pivot(weights))

    def pivot(self, weights: Sequence[float]) -> int | None:
        """Without a base: the shortest of the inputs with a weight, if the first of them is much longer; else None."""
        lengths = [(self.norm(v), i) for i, (v, w) in enumerate(zip(self.models, weights, strict=True)) if w]
        shortest = min(lengths, default=(0.0, 0))
        return shortest[1] if lengths and lengths[0][0] > APART * shortest[0] else None


def spanned(name: str, *, based: bool) -> Generator[Request, Measured, Span]:
    """Measure the tensor called `name`: once, and once more if without a base a model is much shorter than the first.

    Raises: MethodError, as `grams`.
    """
    measured = finite((yield Measure(deltas=True)), name)
    g = measured.gram
    if based or not any(is_short(g[0][0], g[i][i], g[0][i]) for i in range(1, len(g))):
        return Span(measured, based=based)
    return Span(finite((yield Measure()), name), based=False, deltas=False)


def angles(name: str, per: Per = "tensor") -> Generator[Request, Any, tuple[Column, Sequence[int]]]:
    """Of each group of the tensor called `name`: the angle between x_0 and x_1, and whether x_1 is much shorter; then
    all are measured once more.

    Raises: MethodError, as `grams`.
    """
    g = yield from grams(name, per)
    thetas = array("d", map(angle_to_sum, g[0][0], g[1][1], g[0][1]))
    short = bytearray(map(is_short, g[0][0], g[1][1], g[0][1]))
    if any(short):
        g = yield from grams(name, per, deltas=False)
        more = each_angle(g[0][0], g[1][1], g[0][1])
        thetas = array("d", (b if s else a for a, b, s in zip(thetas, more, short, strict=True)))
    return thetas, short


def summed(weights: Sequence[float], vectors: Sequence[Vector]) -> Vector:
    """sum_i weights[i] * vectors[i]."""
    return [math.fsum(map(mul, weights, column)) for column in zip(*vectors, strict=True)]
