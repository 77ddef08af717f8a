"""Reinforced agent merging."""

from __future__ import annotations

from fastinterp.methods import Length, method
from fastinterp.methods._float32 import bits_above
from fastinterp.ops.requests import Mask, MaskedCombine


@method(base="required", models=(2, 64), sums_deltas=True, drops=True)
def ram(n: int, *, epsilon: Length = 1e-5) -> MaskedCombine:
    """Take what one model changed from that model, and the average of what several changed.

        out = x0 + sum_A (x_i - x0) / |A|       A: the models with |x_i - x0| > epsilon
    x0        the base
    epsilon   a change that is not larger does not count
    Reads:  1 (combine).  Models: the base and 1 to 63 more.
    Source: arXiv 2601.13572.
    Differs from mergekit `ram`: sums and quotients are float32 whatever the storage dtype.
    """
    ones = (0.0,) + (1.0,) * (n - 1)
    return MaskedCombine(ones, masks=(Mask(), *(Mask(min_bits=bits_above(epsilon)),) * (n - 1)), shares=ones)
