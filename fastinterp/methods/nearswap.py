"""The base, moved towards another model by a bounded step per element."""

from __future__ import annotations

from fastinterp.methods import Length, method
from fastinterp.ops.combine import Combine
from fastinterp.ops.requests import MaskedCombine, Sum


@method(base="required", models=(2, 2), sums_deltas=True)
def nearswap(n: int, *, t: Length) -> Sum:
    """Move every element of the base towards the other model, but not further than t.

        out = x0 + max(-t, min(t, x1 - x0))
    x0   the base
    t    the largest step, in units of the weights; 0: the base
    Reads:  1 (combine).  Models: exactly 2, the base and another.
    Source: mergekit `nearswap`, after alchemonaut's QuartetAnemoi-70B; there as a weight of min(1, t / |x1 - x0|).
    Differs from mergekit `nearswap`: the step is not computed from a quotient and a product, and differences below 1e-6
    are no special case, which matters for t below that; negative t are an error (mergekit: the base).
    """
    if t == 0.0:
        return Combine((0.0, 0.0), base=0)
    return MaskedCombine((0.0, 1.0), limit=t)
