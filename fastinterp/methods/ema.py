"""Averages over the checkpoints of one training run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from fastinterp.errors import MethodError
from fastinterp.methods import Keyed, Unit, method
from fastinterp.ops.combine import Combine

Schedule = Annotated[Literal["1-sqrt", "linear", "cosine", "uniform"], Keyed("decay")]


@method(base="none", models=(2, 64))
def ema(n: int, *, decay: Unit | None = None, weights: Schedule | None = None) -> Combine:
    """Average the checkpoints of a training run, listed oldest first.     out = sum_i c_i*x_i, sum_i c_i = 1

    decay    b of an exponential moving average that starts at the oldest, e = b*e + (1-b)*x_i: c_i = (1-b)*b^(n-1-i),
             and b^(n-1) for the oldest. 0 copies the newest, 1 the oldest
    weights  {decay: 1-sqrt}, also linear, cosine, uniform: the average of a run at constant learning rate that stands
             for one whose rate decayed. With left(s) of the rate left at the fraction s of the decay, 1 - sqrt(s) or
             (1 + cos(pi*s))/2, c_i = left(i/n) - left((i+1)/n); linear decay makes all c_i = 1/n, which is uniform
    Exactly one of the two is given.
    Reads:  1 (combine).  Models: 2 to 64; base_model only gives config and tokenizer unless it is listed.
    Source: Polyak and Juditsky 1992; Tian et al. 2025, "WSM: decay-free learning rate schedule via checkpoint merging"
    (arXiv 2507.17634): step i of the run then counts w_i = left(i/n), and c_i = w_i - w_(i+1).
    Differs from mergekit: it has no such method; its `linear` with weights c_i is the same sum.
    """
    if (decay is None) == (weights is None):
        what = "neither" if decay is None else "both"
        raise MethodError(
            f"`ema` needs `decay: 0.9`, say, or `weights: {{decay: 1-sqrt}}`, got {what}. Give one of them"
        )
    if decay is not None:
        oldest = decay ** (n - 1)
        return Combine((oldest, *((1.0 - decay) * decay ** (n - 1 - i) for i in range(1, n))), sums_to_one=True)
    left = [_left(str(weights), i / n) for i in range(n + 1)]
    return Combine(tuple(left[i] - left[i + 1] for i in range(n)), sums_to_one=True)


def _left(schedule: str, s: float) -> float:
    """What is left of the learning rate at the fraction s of its decay."""
    if schedule == "1-sqrt":
        return 1.0 - math.sqrt(s)
    return 0.5 * (1.0 + math.cos(math.pi * s)) if schedule == "cosine" else 1.0 - s
