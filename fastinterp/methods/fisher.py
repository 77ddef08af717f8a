"""Averages weighted element by element."""

from __future__ import annotations

from fastinterp.errors import MethodError
from fastinterp.methods import Each, NotNegative, Sidecar, method
from fastinterp.methods._weights import level
from fastinterp.ops.requests import MaskedCombine


@method(base="none", models=(2, 32), relative=True)
def fisher(n: int, *, fisher: Each[Sidecar], weight: Each[NotNegative] = (1.0,)) -> MaskedCombine:
    """Average the models, elements weighted by importance.     out = sum_i g_i*x_i / sum_i g_i, g_i = w_i*(F_i + 1e-6)

    fisher  F_i: for each model a checkpoint of the same tensors that holds the diagonal of its Fisher information, the
            mean of squared gradients, say; numbers that are not negative: a few samples are looked at, and a warning
            tells of those that are
    weight  w_i, at least 0, one per model
    Where every g_i is 0, out = x0, the first model.
    Reads:  1 (combine), of the models and their side-cars.
    Models: 2 to 32; base_model only gives config and tokenizer unless it is listed.
    Source: Matena and Raffel 2022, "Merging models with Fisher-weighted averaging" (arXiv 2111.09832).
    Differs from mergekit: it has no such method.
    """
    if not any(weight):
        raise MethodError("every weight is 0, so nothing would be merged. Give at least one model a weight")
    return MaskedCombine(level(weight), importance=tuple(range(n, 2 * n)))
