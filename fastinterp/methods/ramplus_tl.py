"""Reinforced agent merging, with larger weights for what only one model changed."""

from __future__ import annotations

from fastinterp.methods import Length, NotNegative, method
from fastinterp.methods._float32 import bits_above
from fastinterp.ops.requests import Mask, MaskedCombine, MeasureMasked, Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True)
def ramplus_tl(n: int, *, epsilon: Length = 1e-5, r: float = 0.1, alpha: NotNegative = 0.2) -> Steps:
    """Take what one model changed from that model, scaled up, and the average of what several changed.

        out = x0 + l_i*(x_i - x0)               where only model i has |x_i - x0| > epsilon
        out = x0 + sum_A (x_i - x0) / |A|       elsewhere; A: the models with |x_i - x0| > epsilon
        l_i = 1 + r*min(alpha, shared_i / unique_i)
    x0        the base
    epsilon   a change that is not larger does not count
    r         how much stronger, per unit of the quotient
    alpha     the largest quotient
    shared_i  elements of this tensor that model i and at least one other model changed
    unique_i  elements that model i alone changed, and at least epsilon
    Reads:  2 (measure, combine).  Models: the base and 1 to 63 more.
    Source: arXiv 2601.13572.
    Differs from mergekit `ramplus_tl`: sums are float32 and the output has the dtype that the recipe asks for
    (mergekit: always float32).
    """
    masks = (Mask(), *(Mask(min_bits=bits_above(epsilon)),) * (n - 1))
    stats = yield MeasureMasked(masks, l1=False, squares=False)
    sole_weights = [0.0]
    for i in range(1, n):
        unique = max(stats.count[i] - stats.shared[i], epsilon)
        quotient = stats.shared[i] / unique if unique else alpha  # no change is unique: as large as it gets
        sole_weights.append(1.0 + r * min(quotient if stats.shared[i] else 0.0, alpha))
    ones = (0.0,) + (1.0,) * (n - 1)
    return MaskedCombine(ones, masks=masks, shares=ones, sole_weights=tuple(sole_weights))
