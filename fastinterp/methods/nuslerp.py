"""Interpolation along the great circle, of models or of task vectors; of whole tensors, rows or columns."""

from __future__ import annotations

from array import array
from itertools import chain

from fastinterp.errors import MethodError
from fastinterp.methods import Each, method
from fastinterp.methods._sphere import angles, arc, each_angle, grams
from fastinterp.methods._weights import cancel, shares
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import GroupCombine, Per, Steps


@method(base="optional", models=(2, 3), sums_deltas=True, relative=True, for_more="`multislerp`, `karcher`")
def nuslerp(
    n: int, tensor: Tensor, *, weight: Each[float], nuslerp_flatten: bool = True, nuslerp_row_wise: bool = False
) -> Steps:
    """Interpolate two models, or two task vectors, on a great circle.     out = s1*x1 + s2*x2, or x0 + s1*d1 + s2*d2

    x1, x2            the two models; x0 the base, if there is one; d1 = x1 - x0, d2 = x2 - x0
    s1, s2            sin((1-t)*a)/sin(a), sin(t*a)/sin(a), with a the angle between the two vectors; 1-t and t where
                      they are parallel or opposite to 1e-6. A vector of zeros is at a right angle
    weight            w1 and w2: t = w2 / (w1 + w2); 0.5 where they cancel, as in mergekit
    nuslerp_flatten   true: each tensor is one vector. false: each index of all dimensions but the last has its angle
    nuslerp_row_wise  with nuslerp_flatten false: each index of the last dimension has its angle instead, which is what
                      mergekit does, whatever the name says. Tensors of one dimension are always one vector
    Reads:  2 (measure, combine), 3 where without a base x2 is shorter than x1 by more than 8.
    Models: exactly 2, with or without a base beside them.
    Source: mergekit `nuslerp`; Shoemake 1985.
    Differs from mergekit `nuslerp`: angles are float64, where mergekit has those of the storage dtype, which in bf16
    are 0 above cos 0.998; under nuslerp_row_wise a tensor of 3 dimensions has an angle per last index, in mergekit one
    per pair of the last two. NaN or Inf in a model is an error.
    """
    if len(weight) != 2:
        raise MethodError(f"`nuslerp` takes exactly 2 models beside the base, got {len(weight)}")
    t = 0.5 if cancel(weight) else shares(weight)[1]
    based = n == 3
    if t in (0.0, 1.0):
        return Combine((0.0, 1.0 - t, t), 0) if based else Combine((1.0 - t, t), sums_to_one=True)
    per: Per = "tensor"
    if not nuslerp_flatten and len(tensor.shape) > 1:
        per = "column" if nuslerp_row_wise else "row"
    if not based:
        thetas, short = yield from angles(tensor.name, per)
        weights = array("d", chain.from_iterable(arc(t, theta) for theta in thetas))
        if per == "tensor":
            return Combine(tuple(weights), pivot=1 if short[0] else None)
        return GroupCombine(weights, n, per)
    g = yield from grams(tensor.name, per)
    thetas = each_angle(g[1][1], g[2][2], g[1][2])
    weights = array("d", chain.from_iterable((0.0, *arc(t, theta)) for theta in thetas))
    return Combine(tuple(weights), 0) if per == "tensor" else GroupCombine(weights, n, per, 0)
