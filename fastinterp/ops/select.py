"""Exact order statistics from histograms: which histograms to request, and what follows from them. No I/O, no arrays.

The magnitudes of float32 numbers are ordered as their bits are, so the k-th largest of N follows from counts:

    sample   coarse bins (the upper 16 of 31 bits) of every s-th strip                        a few percent of a read
    fine     over all elements: how many lie above a bracket, and every value inside it       one read

The sample says where the k-th largest lies, up to an error; the fine counts are exact and show whether it does lie
there. Where it does not, first the bracket next to the first one is tried, then all elements are counted in coarse
bins, after which one coarse bin is a bracket that cannot miss. So an answer takes about one read, and at most four.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastinterp.ops.contract import STRIP
from fastinterp.ops.masked import score_of
from fastinterp.ops.operands import Operand
from fastinterp.ops.requests import ALL_BITS, Select, Selected
from fastinterp.ops.steps import Bracket, Histogram

COARSE_BITS = 15  # of a magnitude that a coarse bin drops
COARSE_BINS = (ALL_BITS >> COARSE_BITS) + 1
MOST_BINS = 8  # coarse ones in a bracket: 2^18 counts, which stay in a second-level cache

# Strips in a sample. Small magnitudes lie so thin on the scale of their bits that MOST_BINS of them hold few elements:
# ranks near the bottom need a sharper estimate.
SAMPLE, LARGE_SAMPLE, LOW_RANK = 512, 2048, 0.75
# The bracket reaches MARGIN standard deviations of the estimate to either side, those of elements drawn at random times
# CLUSTER: neighbours share rows, rows differ in scale, and so a strip tells less than as many scattered elements.
MARGIN, CLUSTER = 4.0, 4.0


@dataclass(frozen=True, slots=True)
class Coarse:
    """Request for counts in COARSE_BINS bins, magnitude >> COARSE_BITS, of every strip s with s % every == 0.

    vectors  the inputs whose deltas are ranked; (0,) is the score
    """

    vectors: tuple[int, ...]
    every: int = 1

    @property
    def bins(self) -> int:
        return len(self.vectors) * COARSE_BINS


@dataclass(frozen=True, slots=True)
class Fine:
    """Request for counts of every single magnitude low[j]..high[j] of vectors[j], of all elements; `vectors` ascend."""

    vectors: tuple[int, ...]
    low: tuple[int, ...]
    high: tuple[int, ...]

    @property
    def bins(self) -> int:
        return sum(high - low + 1 for low, high in zip(self.low, self.high, strict=True))


class Counts(Protocol):
    """The answer for one vector: _C.Counts, or a sum of those of several tensors."""

    @property
    def elements(self) -> int: ...  # that were looked at
    @property
    def above(self) -> int: ...  # the highest bin
    @property
    def zero(self) -> int: ...  # magnitudes that are 0, in a bin or not
    def rank(self, k: int) -> tuple[int, int]:
        """The bin of the k-th largest counted element, and how many are in it or above it, in bins.

        (-1, all that are in bins) if those are fewer than k.
        """
        ...

    def at_least(self, first: int) -> int: ...  # how many counted elements are in bin `first` or above it, in bins


def step(select: Select, request: Coarse | Fine, inputs: Sequence[Operand], numel: int, columns: int) -> Histogram:
    """The step of a request for one tensor.

    inputs   all of the model's, input 0 the base
    columns  length of a row: the last dimension, or all elements of a 0-d or 1-d tensor
    It needs `request.bins` counters of 4 bytes in each thread, and up to 16 bytes for each that is not 0 while its
    answer is held.
    """
    if isinstance(request, Coarse):
        every, brackets = request.every, [Bracket(i, 0, ALL_BITS, COARSE_BITS) for i in request.vectors]
    else:
        places = zip(request.vectors, request.low, request.high, strict=True)
        every, brackets = 1, [Bracket(i, low, high, 0) for i, low, high in places]
    return Histogram(
        inputs=tuple(inputs), numel=numel, columns=columns, every=every, brackets=tuple(brackets),
        score=score_of(select.score),
    )  # fmt: skip


def elements_read(request: Coarse | Fine, numel: int) -> int:
    """Elements of each input of one tensor that the request reads."""
    if isinstance(request, Fine) or request.every == 1:
        return numel
    whole, rest = divmod(numel, STRIP)
    sampled = -(-whole // request.every) * STRIP
    return sampled + (rest if whole % request.every == 0 else 0)


Selecting = Generator[Coarse | Fine, Sequence[Counts], tuple[Selected, ...]]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One rank: of which vector, and k, a count or a fraction of what is not 0."""

    vector: int
    k: float
    nonzero: bool

    def rank(self, elements: int, zero: int) -> int:
        return math.floor(self.k * (elements - zero)) if self.nonzero else int(self.k)


@dataclass(frozen=True, slots=True)
class _Bracket:
    """Coarse bins first..last."""

    first: int
    last: int

    @property
    def low(self) -> int:
        return self.first << COARSE_BITS

    @property
    def high(self) -> int:
        return (self.last + 1 << COARSE_BITS) - 1


def sample_every(numel: int, ranks: Sequence[float]) -> int:
    """Which share of the strips is sampled for these ranks, as fractions of all elements.

    Odd, since tensors repeat themselves at powers of two (heads, rotary pairs, experts), and a sample in step with
    that would see one kind of row only.
    """
    strips, wanted = -(-numel // STRIP), LARGE_SAMPLE if max(ranks) > LOW_RANK else SAMPLE
    if strips < 2 * SAMPLE:
        return 1
    return max(strips // wanted, 3) | 1


def selecting(select: Select, numel: int) -> Selecting:
    """Answer a Select for a tensor, or with `whole` for a model, of `numel` elements.

    The one that drives it answers each request with one Counts per vector, in order. Returns one Selected per rank.
    Raises: ValueError, if a rank is none of the elements'.
    """
    wanted = [_Wanted(vector, k, select.nonzero) for vector, k in select.ranks]
    for w in wanted:
        if not (0 <= w.k <= 1 if w.nonzero else 1 <= w.k <= numel):
            raise ValueError(f"no rank {w.k} among {numel} elements")
    selected: dict[_Wanted, Selected] = {}
    if numel == 0:
        return tuple(Selected(ALL_BITS + 1, 0) for _ in wanted)
    every = sample_every(numel, [w.k if w.nonzero else w.k / numel for w in wanted])
    rest = sorted(set(wanted), key=lambda w: w.vector)
    if every > 1:
        rest = yield from _from_sample(rest, numel, every, selected)
    if rest:
        counts = yield from _coarse(rest, 1)
        brackets = {}
        for w in rest:
            c = counts[w.vector]
            k = w.rank(numel, c.zero)
            if k:
                bin_, _ = c.rank(k)
                brackets[w] = _Bracket(bin_, bin_)
            else:
                selected[w] = Selected(ALL_BITS + 1, 0)
        missed = yield from _fine(brackets, numel, selected)
        if missed:
            raise RuntimeError("coarse and fine counts disagree: an input has changed while it was read")
    return tuple(selected[w] for w in wanted)


def _coarse(wanted: Sequence[_Wanted], every: int) -> Generator[Coarse, Sequence[Counts], dict[int, Counts]]:
    vectors = tuple(sorted({w.vector for w in wanted}))
    counts = yield Coarse(vectors, every)
    return dict(zip(vectors, counts, strict=True))


def _from_sample(
    wanted: Sequence[_Wanted], numel: int, every: int, selected: dict[_Wanted, Selected]
) -> Generator[Coarse | Fine, Sequence[Counts], list[_Wanted]]:
    """Answer what a sample brackets, into `selected`. Returns what needs the coarse counts of all elements."""
    samples = yield from _coarse(wanted, every)
    brackets = {}
    for w in wanted:
        bracket = estimate(samples[w.vector], w, numel)
        if bracket:
            brackets[w] = bracket
    missed = yield from _fine(brackets, numel, selected)
    nearby = {}
    for w, short in missed.items():
        bracket = next_to(brackets[w], short, samples[w.vector], numel)
        if bracket:
            nearby[w] = bracket
    yield from _fine(nearby, numel, selected)
    return [w for w in wanted if w not in selected]


def _fine(
    brackets: dict[_Wanted, _Bracket], numel: int, selected: dict[_Wanted, Selected]
) -> Generator[Fine, Sequence[Counts], dict[_Wanted, int]]:
    """Count inside the brackets; what lies in its bracket goes to `selected`.

    Returns how far the others' brackets miss: elements above the bracket that the rank needs to be above it, positive,
    or elements below it, negative.
    """
    places = sorted({(w.vector, b.low, b.high) for w, b in brackets.items()})
    if not places:
        return {}
    vectors, low, high = zip(*places, strict=True)
    answers = yield Fine(vectors, low, high)
    counts = dict(zip(places, answers, strict=True))
    missed = {}
    for w, b in brackets.items():
        c = counts[w.vector, b.low, b.high]
        k = w.rank(numel, c.zero)
        if k == 0:
            selected[w] = Selected(ALL_BITS + 1, 0)
        elif c.above >= k:
            missed[w] = c.above - k + 1
        else:
            bin_, count = c.rank(k - c.above)
            if bin_ < 0:
                missed[w] = -(k - c.above - count)
            else:
                selected[w] = Selected(b.low + bin_, c.above + count)
    return missed


def estimate(sample: Counts, wanted: _Wanted, numel: int) -> _Bracket | None:
    """The bracket in which the sample of m elements sees the rank, or None if it would likely miss there.

    The fraction f = k / numel of all elements is at least as large as the k-th largest. Of m elements drawn at random
    as many as m*f are, with variance m*f*(1 - f). With `nonzero`, k is estimated too: f = share * (1 - z), where the
    sampled fraction z of zeros has variance z*(1 - z)/m, which adds at most m * share^2 * z*(1 - z). The bracket is
    that of all sample ranks within MARGIN * CLUSTER deviations, cut to MOST_BINS around the estimate. What is left of
    it must reach one deviation to either side, else counting all elements is cheaper than a likely miss.
    """
    m = sample.elements
    if wanted.nonzero:
        z = sample.zero / m
        f, more = wanted.k * (1 - z), wanted.k**2 * z * (1 - z)
    else:
        f, more = wanted.k / numel, 0.0
    deviation = math.sqrt(m * (f * (1 - f) + more)) + 1  # one more for the steps of whole ranks

    def bin_at(rank: float) -> int:
        return sample.rank(min(max(round(rank), 1), m))[0]

    def window(deviations: float) -> _Bracket:
        return _Bracket(bin_at(f * m + deviations * deviation), bin_at(f * m - deviations * deviation))

    wide, least, middle = window(MARGIN * CLUSTER), window(1.0), bin_at(f * m)
    first = max(wide.first, middle - MOST_BINS // 2 + 1)
    last = min(wide.last, first + MOST_BINS - 1)
    first = max(wide.first, last - MOST_BINS + 1)
    return _Bracket(first, last) if first <= least.first and least.last <= last else None


def next_to(bracket: _Bracket, short: int, sample: Counts, numel: int) -> _Bracket | None:
    """The bracket above or below one that missed by `short` elements (see _fine), or None if that would likely miss.

    The exact counts of the first bracket have replaced the sample's error in the rank by its error over a short
    distance: the sample must see half as many again as are still short there, and four deviations of their number.
    """
    if short > 0:
        following = _Bracket(bracket.last + 1, min(bracket.last + MOST_BINS, COARSE_BINS - 1))
    else:
        following = _Bracket(max(bracket.first - MOST_BINS, 0), bracket.first - 1)
    if following.first > following.last:
        return None
    expected = abs(short) / numel * sample.elements
    seen = sample.at_least(following.first) - sample.at_least(following.last + 1)
    return following if seen >= 1.5 * expected + 4 * math.sqrt(expected) else None
