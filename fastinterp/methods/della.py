"""Drop at random by rank, rescale, elect signs."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import by_rank, elected, l1_ratios, refuse_cancelling
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, draws=True, elects=True)
def della(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), epsilon: Each[Unit] = (0.15,),
    normalize: bool = True, rescale: bool = True, lambda_: float = 1.0, int8_mask: bool = False,
) -> Steps:  # fmt: skip
    """Drop small changes more often than large ones, make up for them, elect signs, and average.

        out = x0 + lambda * sum_A w_i*t_i / sum_A w_i   t_i = s_i*(x_i - x0) with probability p_i, else 0
        p_i = density_i - epsilon_i + 2*epsilon_i*rank  A: the models with t_i != 0, sign(w_i*t_i) = sign(sum w_j*t_j)
    x0          the base
    rank        of |x_i - x0| in its row (the last dimension): 0 for the smallest, 1 for the largest
    weight      w_i, one per model other than the base
    density     the mean probability that an element stays; 1: all do; 0: the model adds nothing
    epsilon     how far the probability goes below and above it; both ends must lie between 0 and 1
    normalize   divide by the sum of the weights of A; where that is 0, by 1
    rescale     s_i = sum |x_i - x0| / sum |kept x_i - x0|, 1 if either sum is below 1e-7; false: 1
    lambda      scales the whole step
    int8_mask   changes nothing
    Reads:  2 (measure, combine); without rescale, and for density 1: 1.  Models: the base and 1 to 63 more.
    Source: Deep et al. 2024, "DELLA-Merging" (arXiv 2406.11617), whose s_i is 1/p_i.
    Differs from mergekit `della`: rows are the last dimension of tensors of any number of dimensions; equal magnitudes
    share their mean rank; rows of one element have rank 1/2 (mergekit fails); which elements stay depends on seed,
    tensor name, model and element only; under normalize, weights that cancel are an error.
    """
    if normalize:
        refuse_cancelling(weight)
    masks = by_rank(weight, density, epsilon)
    scales = yield from l1_ratios(tensor, masks, rescale)
    return elected(weight, masks, scales, normalize=normalize, lambda_=lambda_)
