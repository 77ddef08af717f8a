"""The weighted average."""

from __future__ import annotations

from fastinterp.errors import MethodError
from fastinterp.methods import Each, method
from fastinterp.methods._weights import shares
from fastinterp.ops.combine import Combine


@method(base="none", models=(1, 64))
def linear(n: int, *, weight: Each[float], normalize: bool = True) -> Combine:
    """Average the models, or sum them.     out = sum_i w_i*x_i / sum_i w_i

    weight      w_i, one per model; any sign, so that 1.5 and -0.5 extrapolate
    normalize   divide by the sum of the weights; false: out = sum_i w_i*x_i
    Reads:  1 (combine).  Models: 1 to 64; base_model only gives config and tokenizer.
    Source: Wortsman et al. 2022, "Model soups" (arXiv 2203.05482).
    Differs from mergekit `linear`: weights are divided by their sum in float64 and rounded to float32 once, where
    mergekit rounds them first, and divides each sum of products; weights that cancel are an error, not Inf and NaN.
    """
    if normalize:
        return Combine(shares(weight), sums_to_one=True)
    if not any(weight):
        raise MethodError("every weight is 0, so nothing would be merged. Give at least one model a weight")
    return Combine(weight)
