"""Interpolation along the great circle."""

from __future__ import annotations

import math

from fastinterp.methods import method
from fastinterp.methods._sphere import angles, arc
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import Steps

STRAIGHT = 0.9995  # |cos| above which a straight line is used: 1.81 degrees, so for nearly all fine-tunes of one base


@method(base="required", models=(2, 2), walks=True, for_more="`multislerp`, `karcher`")
def slerp(n: int, tensor: Tensor, *, t: float) -> Steps:
    """Interpolate on the great circle from the base to the other model.     out = s0*x0 + s1*x1

    x0      the base, where t = 0; x1 the other model, where t = 1: both are copied bit for bit
    s0, s1  sin((1-t)*a)/sin(a), sin(t*a)/sin(a), with a the angle between x0 and x1, each tensor taken as one vector;
            1-t and t where |cos a| > 0.9995, opposite vectors included. A tensor of zeros is at a right angle
    t       fraction of the way; below 0 and above 1 it goes on along the circle, or the line
    Reads:  2 (measure, combine), 3 where x1 is shorter than x0 by more than 8.
    Models: exactly 2, the base and one more.
    Source: Shoemake 1985, "Animating rotation with quaternion curves".
    Differs from mergekit `slerp`: the angle is float64, from x1 - x0, where mergekit normalises and sums in float32.
    NaN or Inf in a model is an error; mergekit makes NaN of the whole tensor.
    """
    if t in (0.0, 1.0):
        return Combine((1.0 - t, t), sums_to_one=True)
    (theta,), (short,) = yield from angles(tensor.name)
    pivot = 1 if short else None
    if abs(math.cos(theta)) > STRAIGHT:
        return Combine((1.0 - t, t), sums_to_one=True, pivot=pivot)
    return Combine(arc(t, theta), pivot=pivot)
