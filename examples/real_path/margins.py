"""What must hold, in numbers. The margins were set before the three seeds were run, and are not changed by what came.

They come from one pilot run of other code (160 steps at a rate of 3e-5), whose numbers stand beside them where it had
any; this run trains less, so they are wide. Each check turns the results of one training seed into one number, and
passes if the mean over the seeds is within the margin; an exact one, if every seed is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Results = Mapping[str, Any]  # of a seed: walks, each a list of points; and `weights`


@dataclass(frozen=True)
class Check:
    number: int
    what: str
    value: Callable[[Results], float]
    at_most: bool
    margin: float
    pilot: str = "-"
    exact: bool = False  # a promise, and no statistic: it must hold for every seed

    @property
    def bound(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.margin:g}"

    def within(self, value: float) -> bool:
        return value <= self.margin if self.at_most else value >= self.margin


@dataclass(frozen=True)
class Verdict:
    check: Check
    values: tuple[float, ...]  # one for each seed

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def passed(self) -> bool:
        return all(map(self.check.within, self.values)) if self.check.exact else self.check.within(self.mean)


def judge(results: Sequence[Results], *, whole: bool = True) -> list[Verdict]:
    """Every check; where not `whole`, those of the short form."""
    return [Verdict(c, tuple(c.value(r) for r in results)) for c in (CHECKS if whole else QUICK)]


# --- numbers of one seed ---------------------------------------------------------------------------------------------


def at(points: Sequence[Results], **where: Any) -> Results:
    """The one point with these coordinates."""
    (found,) = (p for p in points if all(p[k] == v for k, v in where.items()))
    return found


def preference(p: Results) -> float:
    """By how much positive held-out text is likelier than negative text, in nats per token: sentiment without samples.

    All points are asked about the same text, so it has no sampling error between points.
    """
    return float(p["nll_negative"] - p["nll_positive"])


def inside(points: Sequence[Results]) -> list[Results]:
    return [p for p in points if 0 <= p["alpha"] <= 1]


def between(points: Sequence[Results]) -> list[Results]:
    return [p for p in points if 0 < p["alpha"] < 1]


def rank_correlation(values: Sequence[float]) -> float:
    """Spearman's, against the order in which the values stand; equal values share their mean rank."""
    x = np.asarray(values)
    ranks = np.array([(x < v).sum() + ((x == v).sum() - 1) / 2 for v in x])
    return float(np.corrcoef(ranks, np.arange(len(x)))[0, 1])


def step(key: str, low: float, high: float, walk: str = "line") -> Callable[[Results], float]:
    """How much a number grows from one alpha to another."""
    return lambda r: float(at(r[walk], alpha=high)[key] - at(r[walk], alpha=low)[key])


def over_chord(walk: str) -> Callable[[Results], float]:
    """The barrier: how far the loss on held-out text rises over the straight line between its ends."""

    def barrier(r: Results) -> float:
        a, b = (at(r[walk], alpha=x)["nll"] for x in (0, 1))
        return max(p["nll"] - ((1 - p["alpha"]) * a + p["alpha"] * b) for p in between(r[walk]))

    return barrier


def over_ends(r: Results) -> float:
    return max(p["nll"] for p in between(r["line"])) - max(at(r["line"], alpha=x)["nll"] for x in (0, 1))


def preference_step_down(r: Results) -> float:
    """The largest step down of the preference, of its whole way from 0 to 1."""
    steps = [preference(p) for p in inside(r["line"])]
    return max(a - b for a, b in pairwise(steps)) / (steps[-1] - steps[0])


def fluency(r: Results) -> float:
    """Distinct pairs of words between the ends: at the worst point, over the worse end."""
    ends = [at(r["line"], alpha=x)["distinct_2"] for x in (0, 1)]
    return min(p["distinct_2"] for p in inside(r["line"])) - min(ends)


def repetition(r: Results) -> float:
    ends = [at(r["line"], alpha=x)["repetition"] for x in (0, 1)]
    return max(p["repetition"] for p in inside(r["line"])) - max(ends)


def of_the_way(r: Results, p: Results) -> float:
    """Where a point's preference lies between those of neg (0) and pos (1)."""
    a, b = (preference(at(r["line"], alpha=x)) for x in (0, 1))
    return (preference(p) - a) / (b - a)


def control(name: str) -> Callable[[Results], float]:
    return lambda r: of_the_way(r, at(r["controls"], **{"is": name}))


def random_shift(r: Results) -> float:
    return float(abs(at(r["controls"], **{"is": "random"})["sentiment"] - at(r["line"], alpha=0)["sentiment"]))


def plane(key: str, a: tuple[float, float], b: tuple[float, float]) -> Callable[[Results], float]:
    """How much a number grows from one point (pos, short) of the plane to another."""

    def grown(r: Results) -> float:
        first, second = (at(r["plane"], pos=p, short=s)[key] for p, s in (a, b))
        return float(second - first)

    return grown


def rounded(form: str) -> Callable[[Results], float]:
    """Of the way that the preference has gone at alpha 0.2 in float32: how much is left of it in this form."""

    def share(r: Results) -> float:
        return of_the_way(r, at(r[form], alpha=0.2)) / of_the_way(r, at(r["line"], alpha=0.2))

    return share


def stair(form: str) -> Callable[[Results], float]:
    return lambda r: float(at(r["weights"][form], alpha=0.25)["arrived"])


def off_quarter(form: str) -> Callable[[Results], float]:
    return lambda r: abs(stair(form)(r) - 0.25)


def untold(r: Results) -> float:
    p = at(r["weights"]["nearest"], alpha=0.25)
    return float(abs(p["told"] - p["arrived"]))


def beside_line(r: Results) -> float:
    return float(abs(at(r["methods"], **{"is": "slerp"})["nll"] - at(r["line"], alpha=0.5)["nll"]))


# --- the checks ------------------------------------------------------------------------------------------------------


def low(number: int, what: str, value: Callable[[Results], float], margin: float, pilot: str = "-",
        *, exact: bool = False) -> Check:  # fmt: skip
    """A check of a number that must be small."""
    return Check(number, what, value, True, margin, pilot, exact)


def high(number: int, what: str, value: Callable[[Results], float], margin: float, pilot: str = "-") -> Check:
    """A check of a number that must be large."""
    return Check(number, what, value, False, margin, pilot)


SENTIMENT = high(1, "sentiment (VADER) rises from alpha 0 to 1 by", step("sentiment", 0, 1), 0.2, "0.42")
BARRIER = low(3, "barrier: NLL over the chord between the ends, nats per token", over_chord("line"), 0.005, "-0.027")
ENDS = low(9, "lines that do not start and end with the bits of their ends",
           lambda r: float(not r["weights"]["ends_are_equal"]), 0, "0", exact=True)  # fmt: skip
CHECKS: tuple[Check, ...] = (
    SENTIMENT,
    high(1, "share of positive samples rises from alpha 0 to 1 by", step("positive", 0, 1), 0.12, "0.28"),
    low(1, "share of negative samples rises from alpha 0 to 1 by", step("negative", 0, 1), -0.08, "-0.19"),
    high(2, "rank correlation of sentiment with alpha on [0, 1]",
         lambda r: rank_correlation([p["sentiment"] for p in inside(r["line"])]), 0.85, "1"),
    high(2, "rank correlation of the preference for positive text with alpha on [-0.5, 1.5]",
         lambda r: rank_correlation([preference(p) for p in r["line"]]), 0.99),
    low(2, "largest step down of that preference on [0, 1], of its whole way", preference_step_down, 0.02),
    BARRIER,
    low(3, "NLL over the worse end between the ends, nats per token", over_ends, 0.002, "-0.027"),
    high(4, "sentiment rises from alpha 1 to 1.5 by", step("sentiment", 1, 1.5), -0.03, "0.05"),
    low(4, "sentiment rises from alpha 0 to -0.5 by", step("sentiment", 0, -0.5), 0.03, "-0.17"),
    high(5, "distinct pairs of words on [0, 1], lowest, over the worse end", fluency, -0.03),
    low(5, "repeated threes of words on [0, 1], highest, over the worse end", repetition, 0.02),
    low(6, "random direction, as long: sentiment moves by", random_shift, 0.1),
    low(6, "random direction: the preference goes, of the way from 0 to 1", lambda r: abs(control("random")(r)), 0.1),
    high(6, "labels shuffled: the preference goes, of the way from 0 to 1, at least", control("shuffled"), 0.2),
    low(6, "labels shuffled: the same, at most", control("shuffled"), 0.8),
    high(7, "both directions at (1, 1): sentiment over that at (-1, 1)", plane("sentiment", (-1, 1), (1, 1)), 0.15),
    high(7, "both directions at (1, 1): share of ended samples over that at (1, -1)",
         plane("ended", (1, -1), (1, 1)), 0.15),
    low(8, "bf16, rounded to nearest: alpha 0.25 acts in the weights as", stair("nearest"), 0.2, "0.074"),
    low(8, "the same as fastinterp tells it, difference", untold, 0.02),
    low(8, "bf16, rounded stochastically: alpha 0.25 is off by", off_quarter("stochastic"), 0.01),
    low(8, "float32: alpha 0.25 is off by", off_quarter("float32"), 1e-4),
    low(8, "bf16, nearest: at alpha 0.2 the preference has gone, of its way in float32", rounded("nearest"), 0.6),
    high(8, "bf16, stochastic: the same, at least", rounded("stochastic"), 0.8),
    low(8, "bf16, stochastic: the same, at most", rounded("stochastic"), 1.2),
    ENDS,
    low(10, "slerp at 0.5: NLL against the line's, nats per token", beside_line, 0.001),
    high(11, "LoRA: sentiment rises from alpha 0 to 1 by", step("sentiment", 0, 1, "lora"), 0.15),
    low(11, "LoRA: barrier, nats per token", over_chord("lora"), 0.005),
)  # fmt: skip
QUICK = (
    high(1, "sentiment (VADER) rises from alpha 0 to 1 by", step("sentiment", 0, 1), 0),
    high(2, "the preference for positive text rises from alpha 0 to 1 by",
         lambda r: preference(at(r["line"], alpha=1)) - preference(at(r["line"], alpha=0)), 0),
    BARRIER,
    low(8, "bf16, rounded to nearest: alpha 0.25 acts in the weights as", stair("nearest"), 0.2, "0.074"),
    low(8, "the same as fastinterp tells it, difference", untold, 0.02),
    ENDS,
)  # fmt: skip
