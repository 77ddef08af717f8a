"""Sums of task vectors."""

from __future__ import annotations

from fastinterp.methods import Each, method
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Combine


@method(base="required", models=(2, 64), sums_deltas=True)
def task_arithmetic(
    n: int, *, weight: Each[float], normalize: bool = False, lambda_: float = 1.0, int8_mask: bool = False
) -> Combine:
    """Add weighted task vectors to the base.     out = x0 + lambda * sum_i w_i*(x_i - x0)

    x0          the base
    weight      w_i, one per model other than the base; negative weights remove what a fine-tune learned
    normalize   divide the sum by sum_i w_i
    lambda      scales the whole step
    int8_mask   changes nothing: in mergekit it saves memory for masks, and there are none here
    Reads:  1 (combine).  Models: the base and 1 to 63 more; a base that is also listed adds nothing.
    Source: Ilharco et al. 2023, "Editing models with task arithmetic" (arXiv 2212.04089).
    Differs from mergekit `task_arithmetic`: differences and sums are float32 (mergekit: the base's dtype); under
    normalize, weights that cancel are an error (mergekit then silently divides by 1). Its `density` and `rescale` have
    no effect there, nor here.
    """
    shared = shares(weight) if normalize else weight
    return Combine((0.0, *(lambda_ * w for w in shared)), base=0)
