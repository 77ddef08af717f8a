"""Task arithmetic without the largest changes."""

from __future__ import annotations

from fastinterp.methods import Each, Unit, method
from fastinterp.methods._deltas import ranked, summed
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Tensor
from fastinterp.ops.requests import Steps


@method(base="required", models=(2, 64), sums_deltas=True, drops=True)
def ignore_k(
    n: int, tensor: Tensor, *, weight: Each[float], k: Each[Unit] = (0.01,), normalize: bool = False,
    lambda_: float = 1.0,
) -> Steps:  # fmt: skip
    """Drop the largest changes of each model, and add the weighted sum of the rest to the base.

        out = x0 + lambda * sum_i w_i*t_i       t_i = x_i - x0 where it is not among the largest, else 0
    x0          the base
    weight      w_i, one per model other than the base
    k           the fraction of its elements that t_i loses: floor(k*elements), less those that equal the largest kept
                one; 0: none; 1: the model adds nothing
    normalize   divide the sum by sum_i w_i
    lambda      scales the whole step
    Reads:  2 (select, combine); k 0: 1.  Models: the base and 1 to 63 more.
    Source: the upper mask alone of Davari & Belilovsky 2023, "Model Breadcrumbs" (arXiv 2312.06795).
    Differs from mergekit: it has no such method. Its nearest, `breadcrumbs` with density 1 - k and gamma k, also keeps
    the density of at least one element.
    """
    used = shares(weight) if normalize else weight
    size = tensor.numel
    dropped = [int(part * size) if w else size for w, part in zip(weight, k, strict=True)]
    masks = yield from ranked([(top + 1, size) if top < size else None for top in dropped], size)
    return summed(used, masks, (1.0,) * len(weight), lambda_)
