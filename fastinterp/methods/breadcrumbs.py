"""Leave out the largest and the smallest changes."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import l1_ratios, middle, summed
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True)
def breadcrumbs(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), gamma: Each[Unit] = (0.01,),
    normalize: bool = False, rescale: bool = False, lambda_: float = 1.0, int8_mask: bool = False,
) -> Steps:  # fmt: skip
    """Drop the outliers and the small changes of each model, and add the weighted sum of the rest to the base.

        out = x0 + lambda * sum_i w_i*t_i       t_i = x_i - x0 where |x_i - x0| is neither among the largest nor the
                                                smallest, else 0
    x0          the base
    weight      w_i, one per model other than the base
    density     the fraction of its elements that t_i keeps; 1: all, whatever gamma is; 0: the model adds nothing
    gamma       the fraction that is dropped as the largest, or 1 - density where that is less; the rest of what is
                dropped are the smallest. Elements that equal the largest or smallest kept one stay, too
    normalize   divide the sum by sum_i w_i
    rescale     multiply t_i by sum |x_i - x0| / sum |t_i|, unless either sum is below 1e-7
    lambda      scales the whole step
    int8_mask   changes nothing
    Reads:  2 (select, combine), one more with rescale; density 1: 1.  Models: the base and 1 to 63 more.
    Source: Davari & Belilovsky 2023, "Model Breadcrumbs" (arXiv 2312.06795).
    Differs from mergekit `breadcrumbs`: elements that equal a threshold stay (mergekit: an arbitrary choice among
    them); a density above 0 keeps at least one; under normalize, weights that cancel are an error.
    """
    used = shares(weight) if normalize else weight
    masks = yield from middle(tensor, weight, density, gamma)
    scales = yield from l1_ratios(tensor, masks, rescale)
    return summed(used, masks, scales, lambda_)
