"""The shape of a metric along a path, from its values: barriers, monotonicity, smoothness, log-odds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Gap:
    """The largest distance of a metric from the chord on one side of it, and where.

    value  metric - chord, in the metric's unit; 0 if it is never on that side
    se     standard error over seeds, each seed with its own chord; None for one seed
    """

    at: float
    value: float
    se: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """A straight line by least squares: y = slope * x + intercept. r2: coefficient of determination, R^2."""

    slope: float
    intercept: float
    r2: float
    points: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The shape of a metric between the ends of a path, ends included.

    above, below  the largest gaps above and below the chord: for a loss `above` is the barrier, for a metric of which
                  more is better `below` is. None where an end was not evaluated
    spearman      rank correlation with alpha: 1 rises at every step, -1 falls. None where nothing changes
    step_up, step_down
                  the largest step between neighbours in each direction, both >= 0
    kink          the largest distance of a point from the line between its neighbours, as a share of the metric's
                  range: 0 is a straight line. None for fewer than 3 points or no finite range
    log_odds      the line through log(p / (1 - p)), of probabilities; points where p is 0 or 1 are left out

    Where the metric is NaN at any of the points, above, below, step_up, step_down and kink are NaN, and spearman and
    log_odds are None: a part of the points has no shape of its own.
    """

    points: int
    above: Gap | None
    below: Gap | None
    spearman: float | None
    step_up: float
    step_down: float
    kink: float | None
    log_odds: Line | None


def mean(values: Sequence[float]) -> float:
    if all(v == values[0] for v in values):
        return values[0]  # exactly: equal seeds have a standard error of 0
    try:
        return math.fsum(values) / len(values)
    except ValueError:  # Inf and -Inf in one sum
        return math.nan
    except OverflowError:  # of the sum alone: the mean lies between the values
        return math.fsum(v / len(values) for v in values)


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of the mean: the sample's standard deviation / sqrt(n). None for one value."""
    n = len(values)
    if n < 2:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan
    small, exponent = _scaled(values)
    middle = mean(small)
    return math.ldexp(math.sqrt(math.fsum((v - middle) ** 2 for v in small) / n / (n - 1)), exponent)


def _scaled(values: Sequence[float]) -> tuple[list[float], int]:
    """Finite values / 2**exponent, all within -1..1: their squares and differences do not overflow."""
    exponent = math.frexp(max(map(abs, values)))[1]
    return [math.ldexp(v, -exponent) for v in values], exponent


def shape(xs: Sequence[float], samples: Sequence[Sequence[float]], *, probability: bool) -> Shape:
    """The shape of a metric at the points with x in 0..1.

    xs       ascending, each once
    samples  for each x one value per seed, the seeds in the same order
    """
    inside = [(x, s) for x, s in zip(xs, samples, strict=True) if 0 <= x <= 1]
    xs, samples = [x for x, _ in inside], [s for _, s in inside]
    ys = [mean(s) for s in samples]
    steps = [0.0 if a == b else b - a for a, b in pairwise(ys)]  # equal: Inf - Inf is NaN
    # Python's max of NaN and others depends on their order.
    unknown = [math.nan] if any(map(math.isnan, ys)) else []
    above, below = gaps(xs, samples)
    return Shape(
        points=len(xs),
        above=above,
        below=below,
        spearman=spearman(xs, ys),
        step_up=max(unknown or [0.0, *steps]),
        step_down=max(unknown or [0.0, *(-s for s in steps)]),
        kink=_kink(xs, ys),
        log_odds=log_odds(xs, ys) if probability else None,
    )


def gaps(xs: Sequence[float], samples: Sequence[Sequence[float]]) -> tuple[Gap | None, Gap | None]:
    """The largest gaps above and below the chord from x = 0 to x = 1; None if one of them is missing."""
    at = dict(zip(xs, samples, strict=True))
    if 0.0 not in at or 1.0 not in at:
        return None, None
    every = [
        (x, [v - ((1 - x) * a + x * b) for v, a, b in zip(s, at[0.0], at[1.0], strict=True)]) for x, s in at.items()
    ]
    high = max(every, key=lambda pair: _or(mean(pair[1]), math.inf))
    low = min(every, key=lambda pair: _or(mean(pair[1]), -math.inf))
    above, below = (Gap(x, mean(d), standard_error(d)) for x, d in (high, low))
    return above, below


def _or(value: float, instead: float) -> float:
    return instead if math.isnan(value) else value


def spearman(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Rank correlation; equal values share the mean of their ranks. None if one of them is constant, or NaN occurs."""
    if len(xs) < 2 or any(map(math.isnan, ys)):
        return None
    a, b = _ranks(xs), _ranks(ys)
    middle = (len(xs) - 1) / 2
    da, db = [r - middle for r in a], [r - middle for r in b]
    norm = math.sqrt(math.fsum(d * d for d in da) * math.fsum(d * d for d in db))
    return math.fsum(p * q for p, q in zip(da, db, strict=True)) / norm if norm else None


def _ranks(values: Sequence[float]) -> list[float]:
    return [sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def _kink(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    if any(map(math.isnan, ys)):
        return math.nan
    span = max(ys) - min(ys) if ys else 0.0
    if len(xs) < 3 or not 0 < span < math.inf:
        return None
    distances = []
    for i in range(1, len(xs) - 1):
        t = (xs[i] - xs[i - 1]) / (xs[i + 1] - xs[i - 1])
        distances.append(abs(ys[i] - ((1 - t) * ys[i - 1] + t * ys[i + 1])))
    return max(distances) / span


def log_odds(xs: Sequence[float], ps: Sequence[float]) -> Line | None:
    """The line through log(p / (1 - p)), or None for fewer than 3 points strictly between 0 and 1, or a NaN."""
    if any(map(math.isnan, ps)):
        return None
    used = [(x, math.log(p / (1 - p))) for x, p in zip(xs, ps, strict=True) if 0 < p < 1]
    return fit([x for x, _ in used], [y for _, y in used]) if len(used) >= 3 else None


def fit(xs: Sequence[float], ys: Sequence[float]) -> Line:
    """The line of least squares; xs not all equal."""
    x0, y0 = mean(xs), mean(ys)
    sxx = math.fsum((x - x0) ** 2 for x in xs)
    sxy = math.fsum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True))
    syy = math.fsum((y - y0) ** 2 for y in ys)
    slope = sxy / sxx
    return Line(slope, y0 - slope * x0, sxy * sxy / (sxx * syy) if syy else 1.0, len(xs))


def monotone(ys: Sequence[float]) -> list[float]:
    """The nearest sequence that never falls, by least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # mean, count
    for y in ys:
        pool = (y, 1)
        while pools and pools[-1][0] > pool[0]:
            value, count = pools.pop()
            pool = ((value * count + pool[0] * pool[1]) / (count + pool[1]), count + pool[1])
        pools.append(pool)
    return [value for value, count in pools for _ in range(count)]


def respaced(xs: Sequence[float], ys: Sequence[float], count: int) -> list[float]:
    """`count` values of x, the first and the last of xs among them, between which y moves by equal steps.

    y is made monotone first, and linear between its points. Raises: ValueError, if it is constant then.
    """
    ys, _ = _scaled(ys)
    rising = mean(ys[len(ys) // 2 :]) >= mean(ys[: (len(ys) + 1) // 2])
    smooth = monotone(ys if rising else [-y for y in ys])
    low, high = smooth[0], smooth[-1]
    if not high > low:
        raise ValueError("y is constant")
    spaced = [xs[0]]
    for k in range(1, count - 1):
        wanted = low + (high - low) * k / (count - 1)
        i = next(i for i in range(1, len(xs)) if smooth[i] >= wanted)
        t = (wanted - smooth[i - 1]) / (smooth[i] - smooth[i - 1])
        spaced.append(xs[i - 1] + t * (xs[i] - xs[i - 1]))
    return [*spaced, xs[-1]]
