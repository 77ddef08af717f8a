"""Extrapolation beyond a fine-tune."""

from __future__ import annotations

from fastinterp.methods import method
from fastinterp.ops.combine import Combine


@method(base="required", models=(2, 2), sums_deltas=True, for_more="`task_arithmetic`")
def expo(n: int, *, alpha: float) -> Combine:
    """Extrapolate beyond a fine-tune along its delta from the base.     out = x1 + alpha*(x1 - x0)

    x0      the base: what x1 was trained from, a supervised fine-tune, say, whose alignment is x1
    alpha   how far, in units of x1 - x0: 0 copies x1, model cards have 0.1 to 0.5, -1 copies the base
    Reads:  1 (combine).  Models: exactly 2, the base and one more.
    Source: Zheng et al. 2024, "Weak-to-strong extrapolation expedites alignment" (ExPO, arXiv 2404.16792).
    Differs from mergekit: it has no such method; its `task_arithmetic` with weight 1 + alpha is the same sum.
    """
    return Combine((0.0, 1.0 + alpha), base=0)
