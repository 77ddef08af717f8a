"""The mean of directions on the sphere."""

from __future__ import annotations

import math
from typing import Annotated

from fastinterp.methods import NotNegative, Range, method
from fastinterp.methods._sphere import NEARLY_OPPOSITE, Span, Vector, spanned, summed
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import Steps


@method(base="none", models=(2, 64))
def karcher(n: int, tensor: Tensor, *, max_iter: Annotated[int, Range(0, 1000)] = 10, tol: NotNegative = 1e-5) -> Steps:
    """Average the directions on the sphere, and the lengths.     out = |x|*u, |x| = sum_i |x_i|/n

    u         unit vector with the least sum_i angle(u, x_i)^2: the mean of the x_i/|x_i|, moved in steps along the
              mean of the great circles to them. A model that is opposite to u to 1e-6 rad has no such circle and is
              left out. Where all directions cancel, u starts at the first model's; a step that would lead to 0 is not
              made. Tensors of zeros have no direction; of these alone, out is zeros
    max_iter  steps at most
    tol       radians: a step shorter than this is the last, and is not made
    Reads:  2 (measure, combine), 3 where a model is shorter than the first by more than 8, whatever the number of
            steps: they are made in the span of the models.
    Models: 2 to 64; base_model only gives config and tokenizer unless it is listed.
    Source: Karcher 1977; mergekit `karcher`.
    Differs from mergekit `karcher`: all is float64, where mergekit has the storage dtype's cosines, whose angles are 0
    for close models in bf16; short tensors count (mergekit drops those with |x_i| <= tol). NaN or Inf is an error.
    """
    span = yield from spanned(tensor.name, based=False)
    lengths = [span.norm(v) for v in span.models]
    units = [[k / length for k in v] for v, length in zip(span.models, lengths, strict=True) if length]
    if not units:
        return Combine((0.0,) * n)
    u = summed([1.0 / len(units)] * len(units), units)
    u = _scaled(u, 1.0 / span.norm(u)) if span.norm(u) > max(tol, 1e-12) else units[0]
    for _ in range(max_iter):
        step = summed([1.0 / len(units)] * len(units), [_towards(span, u, v) for v in units])
        size = span.norm(step)
        if size < max(tol, 1e-15):
            break
        moved = summed((math.cos(size), math.sin(size) / size), (u, step))
        if not span.norm(moved):
            break
        u = _scaled(moved, 1.0 / span.norm(moved))
    return span.sum(_scaled(u, math.fsum(lengths) / n))


def _scaled(v: Vector, factor: float) -> Vector:
    return [factor * k for k in v]


def _towards(span: Span, u: Vector, v: Vector) -> Vector:
    """The tangent at u that leads to v along the great circle, as long as the angle between them."""
    c = span.dot(v, u)  # in this order: v has two coordinates that are not 0
    across = [b - c * a for a, b in zip(u, v, strict=True)]
    size = span.norm(across)
    theta = math.atan2(size, c)
    if size == 0.0 or math.pi - theta < NEARLY_OPPOSITE:
        return [0.0] * len(u)
    return _scaled(across, theta / size)
