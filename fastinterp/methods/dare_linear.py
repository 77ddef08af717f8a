"""Drop at random and rescale."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import Preset, at_random, dare_scales, summed
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True, draws=True)
def dare_linear(
    n: int, tensor: Tensor, *, weight: Each[float], density: Each[Unit] = (1.0,), normalize: bool = False,
    rescale: bool = True, lambda_: float = 1.0, int8_mask: bool = False, preset: Preset = "mergekit",
) -> Steps:  # fmt: skip
    """Keep a random part of each model's changes, make up for the rest, and add the weighted sum to the base.

        out = x0 + lambda * sum_i w_i*s_i*m_i*(x_i - x0)        m_i = 1 with probability density_i, else 0
    x0          the base
    weight      w_i, one per model other than the base
    density     the probability that an element stays, 0..1; 0: the model adds nothing
    normalize   divide the sum by sum_i w_i
    rescale     s_i = sum |x_i - x0| / sum |m_i*(x_i - x0)|, 1 if either sum is below 1e-7; false: 1
    lambda      scales the whole step
    int8_mask   changes nothing
    preset      mergekit; paper and peft: s_i = 1/density_i
    Reads:  2 (measure, combine), or 1 without rescale, with preset paper or peft, and for density 1.
    Models: the base and 1 to 63 more.
    Source: Yu et al. 2023, "Language Models are Super Mario" (arXiv 2311.03099).
    Differs from mergekit `dare_linear`: which elements stay depends on seed, tensor name, model and element only;
    the sums behind s_i are float64; under normalize, weights that cancel are an error.
    """
    used = shares(weight) if normalize else weight
    masks = at_random(weight, density)
    scales = yield from dare_scales(tensor, masks, rescale, preset)
    return summed(used, masks, scales, lambda_)
