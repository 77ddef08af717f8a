"""The direction between several models on the sphere."""

from __future__ import annotations

import math

from fastinterp.methods import Each, NotNegative, method
from fastinterp.methods._sphere import spanned, summed
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import Steps


@method(base="optional", models=(2, 64), sums_deltas=True)
def multislerp(
    n: int, tensor: Tensor, *, weight: Each[float], normalize_weights: bool = True, eps: NotNegative = 1e-8
) -> Steps:
    """Average the models' directions, and their lengths.     out = sum_i w_i*|v_i| * m/|m|, m = sum_i w_i*v_i/|v_i|

    v_i                the models; with a base x_i - x0, and x0 is added to the result
    weight             w_i, one per model other than the base
    normalize_weights  divide each w_i by their sum
    eps                where |m| <= eps, directions cancel, and out = sum_i w_i*v_i
    Reads:  2 (measure, combine), 3 where without a base a model is shorter than the first by more than 8.
    Models: 2 to 64, with or without a base; one beside the base is copied.
    Source: mergekit `multislerp` (goddard.blog).
    Differs from mergekit `multislerp`: its tangent term, sum_i w_i*(u_i - <u_i,m>*m), is 0 by construction and left
    out; lengths and directions are float64 (mergekit: the storage dtype), and eps is not added to lengths; directions
    of 3 or more models that cancel make the weighted sum, as those of 2 do, not an error; so do tensors of zeros. NaN
    or Inf in a model is an error.
    """
    based = n > len(weight)
    if len(weight) == 1:
        return Combine((0.0, 1.0), 0)
    w = (
        shares(weight, instead="Write `normalize_weights: false` to use them as they are")
        if normalize_weights
        else weight
    )
    span = yield from spanned(tensor.name, based=based)
    lengths = [span.norm(v) for v in span.models]
    turned = [a / length if length else 0.0 for a, length in zip(w, lengths, strict=True)]
    m = summed(turned, span.models)
    size = span.norm(m)
    if size <= eps:
        m, scale = summed(w, span.models), 1.0
    else:
        scale = math.fsum(a * length for a, length in zip(w, lengths, strict=True)) / size
    return span.sum([scale * k for k in m])
