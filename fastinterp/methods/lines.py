"""Task vectors scaled layer by layer."""

from __future__ import annotations

from fastinterp.methods import Each, method
from fastinterp.ops.combine import Combine, Tensor


@method(base="required", models=(2, 64), sums_deltas=True)
def lines(n: int, tensor: Tensor, *, alpha: float, beta: float, weight: Each[float] = (1.0,)) -> Combine:
    """Add task vectors, deep layers more than others.     out = x0 + (alpha + beta*l/(L-1)) * sum_i w_i*(x_i - x0)

    x0      the base
    l, L    index of the tensor's layer, from 0, and the number of layers; a tensor in no layer (embeddings, the last
            norm, the head) and one in an only layer has l = 0
    alpha   the factor of the first layer
    beta    what the last layer has more than the first
    weight  w_i, one per model other than the base; negative weights remove what a fine-tune learned
    Reads:  1 (combine).  Models: the base and 1 to 63 more.
    Source: Wang et al. 2024, "LiNeS: post-training layer scaling prevents forgetting and enhances model merging"
    (arXiv 2410.17146).
    Differs from mergekit: it has no such method; `task_arithmetic` with a gradient of weights is near it.
    """
    depth = 0.0 if tensor.layer is None or tensor.layers < 2 else tensor.layer / (tensor.layers - 1)
    factor = alpha + beta * depth
    return Combine((0.0, *(factor * w for w in weight)), base=0)
