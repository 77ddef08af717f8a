"""The point with the least sum of distances."""

from __future__ import annotations

import math
from typing import Annotated

from fastinterp.methods import Each, NotNegative, Range, method
from fastinterp.methods._sphere import spanned, summed
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import Steps


@method(base="none", models=(2, 64), relative=True)
def geometric_median(
    n: int,
    tensor: Tensor,
    *,
    weight: Each[NotNegative] = (1.0,),
    max_iter: Annotated[int, Range(0, 10000)] = 100,
    tol: NotNegative = 1e-6,
) -> Steps:
    """Find the point nearest to all models; outliers pull less than in a mean.     out = argmin_y sum_i w_i*|y - x_i|

    weight    w_i, at least 0, one per model
    max_iter  steps of Weiszfeld's iteration at most, from the weighted mean: y = sum_i (w_i/r_i)*x_i / sum_i w_i/r_i,
              r_i = |y - x_i|, each tensor taken as one vector. At a model, the step is that of Vardi and Zhang
    tol       a step shorter than this times the largest r_i is the last
    Reads:  2 (measure, combine), 3 where a model is shorter than the first by more than 8, whatever the number of
            steps: they are made in the span of the models.
    Models: 2 to 64; base_model only gives config and tokenizer unless it is listed.
    Source: Weiszfeld 1937; Vardi and Zhang 2000, "The multivariate L1-median and associated data depth".
    Differs from mergekit: it has no such method.  NaN or Inf in a model is an error.
    """
    span = yield from spanned(tensor.name, based=False)
    pull = shares(weight, instead="Give at least one model a weight")
    y = pull
    for _ in range(max_iter):
        at = summed(y, span.models)
        r = [span.norm([a - b for a, b in zip(at, v, strict=True)]) for v in span.models]
        far = max(r)
        here = math.fsum(w for w, d in zip(pull, r, strict=True) if d <= 1e-12 * far)
        force = [w / d * far if d > 1e-12 * far else 0.0 for w, d in zip(pull, r, strict=True)]
        if not any(force):
            break  # all models with a weight are one point
        goal = shares(force)
        leap = span.norm([a - b for a, b in zip(summed(goal, span.models), at, strict=True)])
        drawn = leap * math.fsum(force) / far  # the length of the sum of the pulls; `here` holds against it
        move = 1.0 - min(1.0, here / drawn) if drawn else 0.0
        y = tuple(a + move * (b - a) for a, b in zip(y, goal, strict=True))
        if move * leap <= tol * far:
            break
    return Combine(y, sums_to_one=True, pivot=span.pivot(y))
