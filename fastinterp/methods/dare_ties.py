"""Drop at random, rescale, elect signs."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import Preset, at_random, dare_scales, elected, refuse_cancelling
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, draws=True, elects=True)
def dare_ties(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), normalize: bool | None = None,
    rescale: bool = True, lambda_: float = 1.0, int8_mask: bool = False, preset: Preset = "mergekit",
) -> Steps:  # fmt: skip
    """Keep a random part of each model's changes, make up for the rest, elect a sign for each element, and sum.

        out = x0 + lambda * sum_A w_i*t_i       t_i = s_i*(x_i - x0) with probability density_i, else 0
                                                A: the models with t_i != 0 and sign(w_i*t_i) = sign(sum w_j*t_j)
    x0          the base
    weight      w_i, one per model other than the base
    density     the probability that an element stays, 0..1; 0: the model adds nothing
    normalize   divide by the sum of the weights of A; where that is 0, by 1. Not given: as the preset has it
    rescale     s_i = sum |x_i - x0| / sum |kept x_i - x0|, 1 if either sum is below 1e-7; false: 1
    lambda      scales the whole step
    int8_mask   changes nothing
    preset      mergekit, which does not normalize; paper and peft: s_i = 1/density_i, the sign is that of sum t_i,
                without weights, and normalize, which is on, divides by the number of models in A
    Reads:  2 (measure, combine), or 1 without rescale, with preset paper or peft, and for density 1.
    Models: the base and 1 to 63 more.
    Source: Yu et al. 2023 (arXiv 2311.03099); Yadav et al. 2023 (arXiv 2306.01708).
    Differs from mergekit `dare_ties`: which elements stay depends on seed, tensor name, model and element only;
    the sums behind s_i are float64; under normalize, weights that cancel are an error.
    """
    count = preset != "mergekit"
    divide = count if normalize is None else normalize
    if divide and not count:
        refuse_cancelling(weight)
    masks = at_random((1.0,) * len(weight) if count else weight, density)
    scales = yield from dare_scales(tensor, masks, rescale, preset)
    return elected(weight, masks, scales, normalize=divide, lambda_=lambda_, count=count)
