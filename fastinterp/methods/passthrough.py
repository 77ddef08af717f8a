"""One model as it is, or scaled."""

from __future__ import annotations

from fastinterp.methods import Each, method
from fastinterp.ops.combine import Combine


@method(base="none", models=(1, 1), for_more="`linear`, or `slices`")
def passthrough(n: int, *, scale: Each[float | None] = (None,)) -> Combine:
    """Copy one model, or scale it.     out = scale*x0

    scale   a number; without it, and for 1, the tensors are copied bit for bit where the dtype stays the same; for 0
            they become +0, which removes a layer's part in a residual stream, say (0 times NaN or Inf is NaN)
    Reads:  1 (combine).  Models: exactly 1; base_model only gives config and tokenizer.
    Source: mergekit `passthrough`.
    Differs from mergekit `passthrough`: the product is rounded once, from float32, whatever the model's dtype; 0 times
    a negative number is +0.
    """
    return Combine((1.0 if scale[0] is None else scale[0],))
