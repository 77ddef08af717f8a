"""Take over the changes that matter most."""

from __future__ import annotations

from array import array

from fastinterp.methods import method
from fastinterp.methods._float32 import bits_from
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import ALL_BITS, Divergence, MaskedCombine, Score, Select, Steps


@method(base="required", models=(2, 2), sums_deltas=True, drops=True)
def arcee_fusion(n: int, tensor: Tensor) -> Steps:
    """Take those elements of the other model whose importance is an outlier, and the rest of the base.

        out = x1 where score >= q(1/2) + 1.5*(q(3/4) - q(1/4)), else x0
        score = |x1 - x0| * sum_row p*log(p/q)      p = softmax(x1) + 1e-8, q = softmax(x0) + 1e-8, along the row
    x0    the base
    q(f)  the score at position floor(f*(elements - 1)) in ascending order, of this tensor
    row   the last dimension
    x1 is written as x0 + (x1 - x0), in float32
    Reads:  3 (divergence, select, combine).  Models: exactly 2, the base and another.
    Source: mergekit `arcee_fusion`.
    Differs from mergekit `arcee_fusion`: the quantiles are those of all scores (mergekit: of a random sample, where
    there are more than a million); divergences are float64; the output has the dtype that the recipe asks for
    (mergekit: always float32).
    """
    if not tensor.numel:
        return Combine((0.0, 0.0), base=0)
    rows = yield Divergence()
    factors = array("f", (max(0.0, row) for row in rows)).tobytes()  # a NaN, or a little below 0 from rounding, is 0
    last = tensor.numel - 1
    ranks = tuple((0, tensor.numel - quarter * last // 4) for quarter in (1, 2, 3))
    low, median, high = yield Select(ranks, score=Score("divergence", factors))
    least = bits_from(median.value + 1.5 * (high.value - low.value))
    if least > ALL_BITS:
        return Combine((0.0, 0.0), base=0)
    return MaskedCombine((0.0, 1.0), score=Score("divergence", factors, least))
