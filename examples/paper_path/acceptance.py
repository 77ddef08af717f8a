"""What must hold, in numbers: expectations fixed before the three seeds were run, and margins fitted once after them.

Each check turns the results of one seed into one number. `pilot` is what a single pilot run of other code on another
grammar gave, `first` the margin that was set from it in advance, `margin` the one fitted once to the three seeds here.
A check passes if the mean over the seeds is within its margin; one that is `strict`, if every seed is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Check:
    number: int
    what: str
    value: Callable[[Results], float]
    at_most: bool
    pilot: str
    first: float
    margin: float
    strict: bool = False
    exact: bool = False  # no statistic: the margin is a promise, and is not fitted

    def bound(self, margin: float) -> str:
        return f"{'<=' if self.at_most else '>='} {margin:g}"

    def within(self, value: float, margin: float) -> bool:
        return value <= margin if self.at_most else value >= margin


@dataclass(frozen=True)
class Verdict:
    check: Check
    values: tuple[float, ...]  # one for each seed

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def passed(self) -> bool:
        return self._passed(self.check.margin)

    @property
    def passed_first(self) -> bool:
        return self._passed(self.check.first)

    def _passed(self, margin: float) -> bool:
        every = all(self.check.within(v, margin) for v in self.values)
        return every if self.check.strict or self.check.exact else self.check.within(self.mean, margin)


def judge(results: Sequence[Results], *, whole: bool = True) -> list[Verdict]:
    """Every check; where not `whole`, those that need the line alone."""
    return [Verdict(c, tuple(c.value(r) for r in results)) for c in (CHECKS if whole else QUICK)]


# --- numbers of one seed ---------------------------------------------------------------------------------------------


def at(points: Sequence[Results], **where: float) -> Results:
    """The one point with these coordinates."""
    (found,) = (p for p in points if all(p[k] == v for k, v in where.items()))
    return found


def inside(r: Results) -> list[Results]:
    return [p for p in r["line"] if 0 <= p["alpha"] <= 1]


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, against the order in which the values stand; equal values share their mean rank."""
    x = np.asarray(values)
    ranks = np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])
    return float(np.corrcoef(ranks, np.arange(len(x)))[0, 1])


def between(r: Results) -> list[Results]:
    return [p for p in r["line"] if 0 < p["alpha"] < 1]


def monotone(r: Results) -> float:
    return rank_correlation([p["positive"] for p in inside(r)])


def step_down(r: Results) -> float:
    p = [p["positive"] for p in inside(r)]
    return max(a - b for a, b in pairwise(p))


def over_chord(r: Results) -> float:
    """The barrier: how far the loss on mixed text rises over the straight line between its ends."""
    a, b = (at(r["line"], alpha=x)["nll_mixed"] for x in (0, 1))
    return max(p["nll_mixed"] - ((1 - p["alpha"]) * a + p["alpha"] * b) for p in between(r))


def over_ends(r: Results) -> float:
    return max(p["nll_mixed"] for p in between(r)) - max(at(r["line"], alpha=x)["nll_mixed"] for x in (0, 1))


def lower_end(r: Results) -> float:
    """Grammaticality at the worse end."""
    return min(at(r["line"], alpha=x)["grammatical"] for x in (0, 1))


def grammar_inside(r: Results) -> float:
    return min(p["grammatical"] for p in inside(r)) - lower_end(r)


def grammar_at(r: Results, alpha: float) -> float:
    return at(r["line"], alpha=alpha)["grammatical"] - lower_end(r)


def fit_log_odds(r: Results) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the log-odds of positive words against alpha, on [0, 1]."""
    points = inside(r)
    x, y = np.array([p["alpha"] for p in points]), np.array([p["positive_log_odds"] for p in points])
    slope, intercept = np.polyfit(x, y, 1)
    rest = y - (slope * x + intercept)
    return float(slope), float(intercept), float(1 - rest @ rest / ((y - y.mean()) @ (y - y.mean())))


def beyond(key: str) -> Callable[[Results], float]:
    return lambda r: float(r["at_1.25"][key])


def grammar_beyond(r: Results) -> float:
    return beyond("grammatical")(r) - lower_end(r)


def of_mixture(r: Results) -> list[Results]:
    return [p for p in r["mixtures"]["points"] if 0 < p["alpha"] < 1]


def divergence_share(r: Results) -> float:
    return max(p["kl_logits"] for p in of_mixture(r)) / r["mixtures"]["kl_ends"]


def divergence_ratio(r: Results) -> float:
    """Of the divergence from the mixed logits to that from the mixed probabilities, at worst."""
    return max(p["kl_logits"] / p["kl_probabilities"] for p in of_mixture(r))


def barrier_of_independent(r: Results) -> float:
    a, middle, b = (at(r["independent"], alpha=x)["nll_mixed"] for x in (0, 0.5, 1))
    return float(middle - (a + b) / 2)


def random_shift(r: Results) -> float:
    return float(abs(at(r["random"], alpha=1)["positive"] - r["base"]["positive"]))


def random_loss(r: Results) -> float:
    return float(at(r["random"], alpha=1)["nll_mixed"] - r["base"]["nll_mixed"])


def both(r: Results, key: str) -> float:
    return float(at(r["plane"], towards_pos=1, towards_formal=1)[key])


def soup(r: Results) -> float:
    return float(r["soup"]["nll_mixed"] - r["base"]["nll_mixed"])


def cross_talk(r: Results) -> float:
    """How far a task vector at full strength moves the attribute that it is not about."""
    base = r["base"]
    by_pos = at(r["plane"], towards_pos=1, towards_formal=0)["formal"] - base["formal"]
    by_formal = at(r["plane"], towards_pos=0, towards_formal=1)["positive"] - base["positive"]
    return float(max(abs(by_pos), abs(by_formal)))


def wrong_bits(r: Results) -> float:
    """Outputs that are not, bit for bit, what they must be."""
    e = r["engine"]
    ends = (e["alpha_0_has_the_bits_of_its_end"], e["alpha_1_has_the_bits_of_its_end"])
    return float(len(e["outputs_with_other_bits_than_the_reference"]) + ends.count(False))


def reads(r: Results) -> float:
    return float(r["engine"]["bytes_read"] / r["engine"]["bytes_of_inputs"])


def stairs(form: str, alpha: float) -> Callable[[Results], Results]:
    return lambda r: at(r["staircase"][form], alpha=alpha)


def untold(r: Results) -> float:
    """Between what arrived in bf16 at alpha 0.25 and what fastinterp said about it; 1 if it did not warn."""
    step = stairs("nearest", 0.25)(r)
    return float(abs(step["told"] - step["arrived"])) if step["warned"] else 1.0


def off_quarter(form: str) -> Callable[[Results], float]:
    return lambda r: float(abs(stairs(form, 0.25)(r)["arrived"] - 0.25))


# --- the checks ------------------------------------------------------------------------------------------------------


def low(number: int, what: str, value: Callable[[Results], float], pilot: str, first: float,
        margin: float = math.nan, **more: bool) -> Check:  # fmt: skip
    """A check of a number that must be small."""
    return Check(number, what, value, True, pilot, first, first if math.isnan(margin) else margin, **more)


def high(number: int, what: str, value: Callable[[Results], float], pilot: str, first: float,
         margin: float = math.nan, **more: bool) -> Check:  # fmt: skip
    """A check of a number that must be large."""
    return Check(number, what, value, False, pilot, first, first if math.isnan(margin) else margin, **more)


def positive_at(alpha: float) -> Callable[[Results], float]:
    return lambda r: float(at(r["line"], alpha=alpha)["positive"])


CHECKS: tuple[Check, ...] = (
    low(1, "P(positive) at neg, alpha 0", positive_at(0), "0.041", 0.08, 0.066),
    high(1, "P(positive) at pos, alpha 1", positive_at(1), "0.974", 0.92, 0.93),
    high(2, "rank correlation of P(positive) with alpha on [0, 1]", monotone, "1", 0.98, 0.99),
    low(2, "largest step down of P(positive) on [0, 1]", step_down, "< 0", 0.03, 0.014),
    low(3, "barrier: NLL over the chord between the ends, nats per byte", over_chord, "<= 0", 0.005, -0.006),
    low(3, "NLL over the worse end between the ends, nats per byte", over_ends, "<= 0", 0.002, -0.0072),
    high(4, "grammaticality on [0, 1], lowest, against the worse end", grammar_inside, "0.000", -0.03, -0.0075),
    high(5, "R^2 of a straight line through the log-odds on [0, 1]", lambda r: fit_log_odds(r)[2], "0.994", 0.97, 0.98),
    low(6, "KL to the mixed logits, of KL(neg, pos), at .25, .5, .75", divergence_share, "0.003", 0.02, 0.0092),
    low(6, "KL to the mixed logits, of that to mixed probabilities", divergence_ratio, "0.11", 1.0, 0.4),
    high(7, "P(positive) at alpha 1.25", beyond("positive"), "0.996", 0.97),
    high(7, "grammaticality at alpha 1.25 against the worse end", grammar_beyond, "-0.016", -0.06, -0.042),
    low(7, "grammaticality at alpha 2 against the worse end", lambda r: grammar_at(r, 2), "-0.42", -0.1, -0.26),
    high(8, "independent bases: barrier, nats per byte", barrier_of_independent, "2.42", 1.0, 2.5, strict=True),
    low(8, "random direction: shift of P(positive)", random_shift, "0.013", 0.05, strict=True),
    low(8, "random direction: rise of NLL, nats per byte", random_loss, "0.0001", 0.005, 0.002, strict=True),
    high(9, "both attributes at (1, 1): P(positive)", lambda r: both(r, "positive"), "0.962", 0.9, 0.94),
    high(9, "both attributes at (1, 1): P(formal)", lambda r: both(r, "formal"), "0.993", 0.9, 0.95),
    high(9, "both attributes at (1, 1): grammaticality", lambda r: both(r, "grammatical"), "0.814", 0.75, 0.76),
    low(9, "cross-talk on the attribute not touched", cross_talk, "0.049", 0.12, 0.053),
    low(10, "mean of the four fine-tunes: NLL against the base", soup, "-0.001", 0.003, 0.0028),
    low(11, "outputs with wrong bits", wrong_bits, "0", 0, exact=True),
    low(11, "bytes read, of the bytes of both inputs", reads, "1", 1, exact=True),
    low(11, "NLL against torch.lerp in memory", lambda r: r["engine"]["nll_off_torch_lerp"], "-", 1e-6, exact=True),
    low(12, "small changes in bf16: alpha 0.25 acts as", lambda r: stairs("nearest", 0.25)(r)["arrived"], "0.06", 0.1),
    low(12, "the same as the report tells it, difference", untold, "-", 0.02),
    low(12, "stochastic rounding: alpha 0.25 is off by", off_quarter("stochastic"), "0.00", 0.01),
    low(12, "float32: alpha 0.25 is off by", off_quarter("float32"), "0.00", 1e-4),
)
# The short form's models are raw, and its samples fewer: the margins are those set before.
QUICK = tuple(replace(c, margin=c.first) for c in CHECKS if c.number in (1, 2, 3, 11))
