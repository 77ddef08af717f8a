"""Trim, elect signs, merge."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import Preset, elected, element_count, l1_ratios, ranked, refuse_cancelling
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, elects=True)
def ties(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), normalize: bool = True,
    rescale: bool = False, lambda_: float = 1.0, int8_mask: bool = False, preset: Preset = "mergekit",
) -> Steps:  # fmt: skip
    """Keep the largest changes of each model, elect a sign for each element, and average those that have it.

        out = x0 + lambda * sum_A w_i*t_i / sum_A w_i  t_i = x_i - x0 where |x_i - x0| is among the largest, else 0
                                                       A: the models with t_i != 0, sign(w_i*t_i) = sign(sum w_j*t_j)
    x0          the base
    weight      w_i, one per model other than the base
    density     the fraction of its elements that t_i keeps: floor(density*elements), at least one, and all that equal
                the smallest kept one; 0: the model adds nothing
    normalize   divide by the sum of the weights of A; where that is 0, by 1
    rescale     multiply t_i by sum |x_i - x0| / sum |t_i|, unless either sum is below 1e-7
    lambda      scales the whole step
    int8_mask   changes nothing
    preset      mergekit; peft: the sign is that of sum t_i, without weights, and the divisor is the number of models in
                A; paper: like peft, and `density` is a fraction of the whole model. The paper has weights of 1
    Reads:  2 (select, combine), one more with rescale; density 1: 1.  Models: the base and 1 to 63 more.
    Source: Yadav et al. 2023, "TIES-Merging" (arXiv 2306.01708).
    Differs from mergekit `ties`: all elements that equal the threshold stay (mergekit: an arbitrary choice among them);
    under normalize, weights that cancel are an error. From the paper: a sum of 0 elects +, not the sign that most of
    the model has.
    """
    count, whole = preset != "mergekit", preset == "paper"
    if normalize and not count:
        refuse_cancelling(weight)
    size = tensor.model_numel if whole else tensor.numel
    counts = [element_count(p, size) if w or count else 0 for w, p in zip(weight, density, strict=True)]
    masks = yield from ranked([(1, k) if k else None for k in counts], size, whole)
    scales = yield from l1_ratios(tensor, masks, rescale)
    return elected(weight, masks, scales, normalize=normalize, lambda_=lambda_, count=count)
