"""Between the base and the mean of fine-tunes, as far as they agree."""

from __future__ import annotations

import math
from array import array

from fastinterp.methods import method
from fastinterp.methods._sphere import Columns, each_angle, grams
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import GroupCombine, Per, Steps


@method(base="required", models=(3, 64), sums_deltas=True)
def model_stock(n: int, tensor: Tensor, *, filter_wise: bool = False) -> Steps:
    """Go from the base towards the mean of the fine-tunes, as far as they agree.     out = x0 + t * sum_i (x_i - x0)/N

    x0           the base; N the number of the other models
    t            N*c / (1 + (N-1)*c), with c the mean cosine between two of the d_i = x_i - x0. Deltas of zeros have
                 cosine 0. Negative where they point apart; 0, the base, where they cancel: 1 + (N-1)*c < 1e-6
    filter_wise  each row has its own c: each index of all dimensions but the last. Else each tensor has one
    Reads:  2 (measure, combine).  Models: the base and 2 to 63 more.
    Source: Jang et al. 2024, "Model Stock: all we need is just a few fine-tuned models" (arXiv 2403.19522).
    Differs from mergekit `model_stock`: deltas, cosines and t are float64 (mergekit: the storage dtype); cosines of
    short deltas are not damped (mergekit divides by at least 1e-6). NaN or Inf in a model is an error.
    """
    per: Per = "row" if filter_wise and len(tensor.shape) > 1 else "tensor"
    shares = _shares((yield from grams(tensor.name, per)))
    if per == "tensor":
        return Combine((0.0, *shares * (n - 1)), 0)
    weights = array("d", bytes(8 * n * len(shares)))
    for i in range(1, n):
        weights[i::n] = shares
    return GroupCombine(weights, n, per, 0)


def _shares(g: Columns) -> array[float]:
    """f64[groups]: t/N, the weight of each delta."""
    count = len(g) - 1
    pairs = [(i, j) for j in range(2, count + 1) for i in range(1, j)]
    cosines = [map(math.cos, each_angle(g[i][i], g[j][j], g[i][j])) for i, j in pairs]
    shares = array("d")
    for total in map(math.fsum, zip(*cosines, strict=True)):
        c = total / len(pairs)
        denominator = 1.0 + (count - 1) * c
        t = count * c / denominator if denominator >= 1e-6 else 0.0
        shares.append(t / count)
    return shares
