"""Interpolation of directions along the great circle, and of lengths along the line."""

from __future__ import annotations

from fastinterp.methods import Unit, method
from fastinterp.methods._sphere import angle, arc, spanned, summed
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 2), walks=True, for_more="`multislerp`, `karcher`")
def slerp_lengths(n: int, tensor: Tensor, *, t: Unit) -> Steps:
    """Interpolate the direction on the great circle, and the length.     out = l * (s0*x0/|x0| + s1*x1/|x1|)

    x0      the base, where t = 0; x1 the other model, where t = 1: both are copied bit for bit
    s0, s1  sin((1-t)*a)/sin(a), sin(t*a)/sin(a), with a the angle between x0 and x1, each tensor taken as one vector;
            1-t and t at angles within 1e-6 of 0 or pi
    l       (1-t)*|x0| + t*|x1|; where either length is 0, out = (1-t)*x0 + t*x1
    t       fraction of the way, 0..1
    Reads:  2 (measure, combine), 3 where x1 is shorter than x0 by more than 8.
    Models: exactly 2, the base and one more.
    Source: what image model tools call slerp: sd-mecha `slerp`, meh, SuperMerger.
    Differs from mergekit: it has no such method; its `slerp` weighs x0 and x1 themselves by s0 and s1, so that between
    vectors of different lengths the direction leans to the longer one. NaN or Inf in a model is an error.
    """
    if t in (0.0, 1.0):
        return Combine((1.0 - t, t), sums_to_one=True)
    span = yield from spanned(tensor.name, based=False)
    x0, x1 = span.models
    lengths = span.norm(x0), span.norm(x1)
    if 0.0 in lengths:
        return span.sum(summed((1.0 - t, t), (x0, x1)))
    s0, s1 = arc(t, angle(lengths[0] ** 2, lengths[1] ** 2, span.dot(x0, x1)))
    length = (1.0 - t) * lengths[0] + t * lengths[1]
    return span.sum(summed((length * s0 / lengths[0], length * s1 / lengths[1]), (x0, x1)))
