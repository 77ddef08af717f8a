"""One model as it is, or scaled."""

from __future__ import annotations

from fastinterp.compute.ops import Combine
from fastinterp.errors import MethodError
from fastinterp.methods import Each, method


@method(base="none", models=(1, 1))
def passthrough(n: int, *, scale: Each[float | None] = (None,)) -> Combine:
    """Copy one model, or scale it.     out = scale*x0

    scale   a number; without it, and for 1, the tensors are copied bit for bit where the dtype stays the same
    Reads:  1 (combine).  Models: exactly 1; base_model only gives config and tokenizer.
    Source: mergekit `passthrough`.
    Differs from mergekit `passthrough`: the product is rounded once, from float32, whatever the model's dtype.
    """
    factor = 1.0 if scale[0] is None else scale[0]
    if factor == 0.0:
        raise MethodError("`scale` 0 would write nothing but zeros. Give another number, or leave it out to copy")
    return Combine((factor,))
