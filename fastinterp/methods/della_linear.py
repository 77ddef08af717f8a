"""Drop at random by rank and rescale."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import by_rank, l1_ratios, summed
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, draws=True)
def della_linear(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), epsilon: Each[Unit] = (0.15,),
    normalize: bool = False, rescale: bool = True, lambda_: float = 1.0, int8_mask: bool = False,
) -> Steps:  # fmt: skip
    """Drop small changes more often than large ones, make up for them, and add the weighted sum to the base.

        out = x0 + lambda * sum_i w_i*t_i                   t_i = s_i*(x_i - x0) with probability p_i, else 0
        p_i = density_i - epsilon_i + 2*epsilon_i*rank
    x0          the base
    rank        of |x_i - x0| in its row (the last dimension): 0 for the smallest, 1 for the largest
    weight      w_i, one per model other than the base
    density     the mean probability that an element stays; 1: all do; 0: the model adds nothing
    epsilon     how far the probability goes below and above it; both ends must lie between 0 and 1
    normalize   divide the sum by sum_i w_i
    rescale     s_i = sum |x_i - x0| / sum |kept x_i - x0|, 1 if either sum is below 1e-7; false: 1
    lambda      scales the whole step
    int8_mask   changes nothing
    Reads:  2 (measure, combine); without rescale, and for density 1: 1.  Models: the base and 1 to 63 more.
    Source: Deep et al. 2024, "DELLA-Merging" (arXiv 2406.11617), without its election of signs.
    Differs from mergekit `della_linear`: as `della` does.
    """
    used = shares(weight) if normalize else weight
    masks = by_rank(weight, density, epsilon)
    scales = yield from l1_ratios(tensor, masks, rescale)
    return summed(used, masks, scales, lambda_)
