"""Select, calculate, erase."""

from __future__ import annotations

from fastinterp.methods import Unit, method
from fastinterp.methods._deltas import energies
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import ALL_BITS, Mask, MaskedCombine, Measure, MeasureMasked, Score, Select, Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, elects=True)
def sce(n: int, tensor: Tensor, *, select_topk: Unit = 1.0, int8_mask: bool = False) -> Steps:
    """Merge where the models differ most from each other, each model by the energy of its changes, with elected signs.

        out = x0 + sum_A w_i*t_i / sum_A w_i        t_i = x_i - x0 at the selected elements, else 0
        w_i = mean t_i^2 / sum_j mean t_j^2         A: the models with t_i != 0 and sign(t_i) = sign(sum t_i)
    x0           the base
    select_topk  the fraction that is selected, of the elements where the variance of x_i - x0 over the models is not 0:
                 those of the largest variance. Where that is less than one element, nothing is added; 1: all elements
    int8_mask    changes nothing
    w_i          all equal, if the sum of the means is below 1e-6
    sum_A w_i    at least 1e-6
    Reads:  2 (measure, combine); select_topk below 1: 3 (select, measure, combine).
    Models: the base and 1 to 63 more.
    Source: Wan et al. 2024, "FuseChat" (arXiv 2408.07990).
    Differs from mergekit `sce`: variances, means and weights are float64; all elements that equal the threshold are
    selected (mergekit: an arbitrary choice among them).
    """
    score, size = None, tensor.numel
    if select_topk < 1.0 and size:
        (threshold,) = yield Select(((0, select_topk),), score=Score("variance"), nonzero=True)
        score = Score("variance", min_bits=threshold.min_bits)
    if not size or (score and score.min_bits > ALL_BITS):
        return Combine((0.0,) * n, base=0)
    if score:
        squares = (yield MeasureMasked((Mask(),) * n, score, l1=False)).squares
    else:
        gram = (yield Measure(deltas=True)).gram
        squares = tuple(gram[i][i] for i in range(n))
    weights = (0.0, *energies(tensor, squares[1:]))
    ones = (0.0,) + (1.0,) * (n - 1)
    return MaskedCombine(weights, sign_weights=ones, shares=weights, least_share=1e-6, other_share=1e-6, score=score)
