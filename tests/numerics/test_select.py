"""Order statistics: the reference against counting, native histograms against numpy, and which histograms are asked."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from fastinterp import _C
from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.ops import select as selecting_module
from fastinterp.ops import steps
from fastinterp.ops.contract import CHUNK, STRIP
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, DType
from fastinterp.ops.operands import Stored
from fastinterp.ops.requests import ALL_BITS, Score, Select, Selected
from fastinterp.ops.select import COARSE_BITS, Coarse, Fine, elements_read, selecting, step
from fastinterp.ops.steps import Bracket, Step
from fastinterp.reference.select import pick, ranked, select
from tests.support import backends
from tests.support.cases import fill
from tests.support.pumps import code

Raw = np.ndarray[Any, np.dtype[np.uint8]]
Mags = np.ndarray[Any, np.dtype[np.uint32]]
every_isa = pytest.mark.parametrize("isa", backends.usable())


def f32(*values: float) -> Raw:
    return np.array(values, np.float32).view(np.uint8)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


# --- the reference ---------------------------------------------------------------------------------------------------


def test_reference_keeps_all_ties():
    base, x = f32(0, 0, 0, 0, 0, 0), f32(1, -2, 2, 0.5, np.nan, 0)
    want = {1: (ALL_BITS, 1), 2: (bits(2), 3), 3: (bits(2), 3), 4: (bits(1), 4), 6: (0, 6)}
    for k, (least, kept) in want.items():
        assert select([base, x], [F32, F32], Select(((1, k),)), (6,)) == (Selected(least, kept),)


def test_reference_ranks_a_fraction_of_what_is_not_zero():
    base, x = f32(0, 0, 0, 0, 0, 0), f32(1, -2, 2, 0.5, np.nan, 0)
    asked = Select(((1, 0.4), (1, 0.19), (1, 1.0)), nonzero=True)
    assert select([base, x], [F32, F32], asked, (2, 3)) == (
        Selected(bits(2), 3), Selected(ALL_BITS + 1, 0), Selected(bits(0.5), 5),
    )  # fmt: skip


@pytest.mark.parametrize("k", [0, 4])
def test_reference_refuses_ranks_that_do_not_exist(k):
    with pytest.raises(ValueError, match=f"rank {k} of 3 elements"):
        pick(np.zeros(3, np.uint32), k, nonzero=False)


# --- native histograms -----------------------------------------------------------------------------------------------


def pumped(
    steps: Sequence[Step], data: Sequence[Sequence[Raw]], dtypes: Sequence[DType], isa: str, threads: int = 2
) -> tuple[list[Any], int]:
    """The answers of steps over tensors in memory at odd addresses, one step each, and the bytes read."""
    held: list[Raw] = []
    sources: list[tuple[str, int, int]] = []
    whole: list[Step] = []
    for made, tensor in zip(steps, data, strict=True):
        inputs = []
        for i, (raw, dtype) in enumerate(zip(tensor, dtypes, strict=True)):
            odd = np.concatenate([np.zeros(2 * i + 1, np.uint8), raw])
            held.append(odd)
            inputs.append(Stored(len(sources), 2 * i + 1, code(dtype)))
            sources.append(("memory", odd.ctypes.data, odd.size))
        whole.append(replace(made, inputs=tuple(inputs)))
    options = PumpOptions(isa=isa, threads=threads, write_bytes=4096, read_bytes=4096, prefetch=True)
    pump = Pump(sources, [], whole, options)
    pump.start()
    assert pump.wait(60)
    pump.join()
    assert pump.error() is None
    return pump.answers(), pump.bytes_read


def raws(kind: str, dtypes: Sequence[DType], numel: int, seed: int = 0) -> list[Raw]:
    rng = [np.random.default_rng([seed, i]) for i in range(len(dtypes))]
    return [fill(kind, d, numel, i, rng[i]).view(np.uint8) for i, d in enumerate(dtypes)]


def columns_of(shape: Sequence[int]) -> int:
    return shape[-1] if len(shape) > 1 else int(np.prod(shape))


def natively(
    data: Sequence[Raw], dtypes: Sequence[DType], ask: Select, shape: Sequence[int], isa: str, threads: int = 2
) -> tuple[tuple[Selected, ...], list[Coarse | Fine]]:
    """The answer by the pump, and what was asked on the way. What is read is as announced."""
    numel = data[0].size * 8 // dtypes[0].bits
    asking, asked = selecting(ask, numel), []
    try:
        request = next(asking)
        while True:
            asked.append(request)
            made = step(ask, request, (), numel, columns_of(shape))
            (counts,), read = pumped([made], [data], dtypes, isa, threads)
            inputs = dtypes if ask.score else [dtypes[i] for i in {0, *request.vectors}]
            assert read == elements_read(request, numel) * sum(d.bits // 8 for d in inputs)
            request = asking.send(counts)
    except StopIteration as done:
        return done.value, asked


SCORES: dict[str, Callable[[int], Score | None]] = {
    "deltas": lambda rows: None,
    "variance": lambda rows: Score("variance"),
    "divergence": lambda rows: Score("divergence", array("f", (1.1**r / 3 for r in range(rows))).tobytes()),
}


@every_isa
@pytest.mark.parametrize("kind", ["close", "normal", "subnormal", "huge", "patterns"])
@pytest.mark.parametrize(
    "dtypes",
    [(BF16, BF16), (F32, BF16, F64), (F64, F32, F8_E5M2), (F16, F8_E4M3, F32, F16)],
    ids=lambda ds: "+".join(map(str, ds)),
)
@pytest.mark.parametrize("score", SCORES)
def test_histograms_count_what_numpy_counts(isa, kind, dtypes, score):
    """Coarse bins, and fine ones at the bottom, in the middle and at the top, of every vector."""
    shape = (17, 1031)
    ask = Select(tuple((i, 1) for i in range(1, len(dtypes))), SCORES[score](shape[0]))
    numel, data = 17 * 1031, raws(kind, dtypes, 17 * 1031)
    requests: list[Coarse | Fine] = [Coarse(tuple(i for i, _ in ask.ranks))]
    for low, width in ((0, 3), (bits(0.003), 1 << 17), (ALL_BITS - 9, 9)):
        requests.append(Fine((1,), (low,), (low + width,)))
    for request in requests:
        (counts,), _ = pumped([step(ask, request, (), numel, shape[1])], [data], dtypes, isa)
        for c, mags in zip(counts, ranked(data, dtypes, ask, shape), strict=False):
            assert_counts(c, Counted(mags, request, 0))


@every_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("numel", [0, 1, 15, 17, 16383, 16385, 17 * CHUNK + 77])
def test_histograms_of_sizes_and_samples(isa, threads, numel):
    data, ask = raws("close", (BF16, BF16, BF16), numel), Select(((1, 1), (2, 1)))
    values = ranked(data, (BF16,) * 3, ask, (numel,))
    for every in (1, 2, 3):
        request = Coarse((1, 2), every)
        (counts,), read = pumped([step(ask, request, (), numel, 1)], [data], (BF16,) * 3, isa, threads)
        assert read == 6 * elements_read(request, numel)
        for c, mags in zip(counts, values, strict=True):
            assert_counts(c, Counted(mags, request, 0))


class Counted:
    """What a histogram must say of `mags`: the oracle, and the answers where only the questions are tested."""

    def __init__(self, mags: Mags, request: Coarse | Fine, index: int) -> None:
        low, high, shift, every = 0, ALL_BITS, COARSE_BITS, 1
        if isinstance(request, Fine):
            low, high, shift = request.low[index], request.high[index], 0
        else:
            every = request.every
        mags = mags[np.arange(mags.size) // selecting_module.STRIP % every == 0]  # type: ignore[attr-defined]
        self.elements, self.above, self.zero = mags.size, int((mags > high).sum()), int((mags == 0).sum())
        inside = mags[(mags >= low) & (mags <= high)]
        self.bins = np.bincount((inside - np.uint32(low)) >> shift, minlength=((high - low) >> shift) + 1)

    def rank(self, k: int) -> tuple[int, int]:
        down = np.cumsum(self.bins[::-1])
        at = int(np.searchsorted(down, k))
        return (self.bins.size - 1 - at, int(down[at])) if at < down.size else (-1, int(down[-1]))

    def at_least(self, first: int) -> int:
        return int(self.bins[max(first, 0) :].sum())


def assert_counts(got: Any, want: Counted) -> None:
    assert (got.elements, got.above, got.zero) == (want.elements, want.above, want.zero)
    assert np.array_equal(np.asarray(got.bins), want.bins)
    total = int(want.bins.sum())
    for k in (1, total // 3 + 1, total, total + 1):
        assert got.rank(k) == want.rank(k)
    for first in (0, want.bins.size // 2, want.bins.size):
        assert got.at_least(first) == want.at_least(first)


def test_counts_of_tensors_add_up():
    data, ask, request = raws("close", (F32, F32), 70000), Select(((1, 1),), whole=True), Coarse((1,))
    halves = [[raw[:120000] for raw in data], [raw[120000:] for raw in data]]
    steps = [step(ask, request, (), half[0].size // 4, 1) for half in halves]
    ((total,), (more,)), _ = pumped(steps, halves, (F32, F32), backends.usable()[0])
    total.add(more)
    assert_counts(total, Counted(ranked(data, (F32, F32), ask, (70000,))[0], request, 0))
    (other,) = pumped(
        [step(ask, Fine((1,), (0,), (5,)), (), 3, 1)], [[raw[:12] for raw in data]], (F32, F32), "scalar"
    )[0]
    with pytest.raises(ValueError, match="different bins"):
        total.add(other[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"brackets": (Bracket(0, 0, 1, 0),)}, "none of the inputs"),
        ({"brackets": (Bracket(2, 0, 1, 0),)}, "none of the inputs"),
        ({"brackets": (Bracket(1, 2, 1, 0),)}, "no such bracket"),
        ({"brackets": ()}, "needs brackets"),
        ({"every": 0}, "needs brackets"),
        ({"score": steps.Score("divergence", 0), "columns": 1}, "a factor per row"),
    ],
)
def test_histograms_refuse(change, message):
    made = replace(step(Select(((1, 1),)), Coarse((1,)), [Stored(0, 0, code(F32))] * 2, 3, 3), **change)
    with pytest.raises(ValueError, match=message):
        Pump([("memory", 0, 0)], [], [made], PumpOptions(isa="scalar"))


# --- select ----------------------------------------------------------------------------------------------------------


@every_isa
@pytest.mark.parametrize("kind", ["close", "normal", "patterns", "zeros"])
@pytest.mark.parametrize(
    ("dtypes", "shape"),
    [((BF16, BF16), (1,)), ((F32, BF16, F64), (3, 5)), ((F16, F32), (40, 1031))],
    ids=str,
)
def test_select_is_the_references(isa, kind, dtypes, shape):
    numel = int(np.prod(shape))
    data = raws(kind, dtypes, numel)
    last = len(dtypes) - 1
    for ask in (
        Select(tuple((i, k) for i in (1, last) for k in (1, (numel + 4) // 5, (numel + 1) // 2, numel))),
        Select(tuple((i, k) for i in (1, last) for k in (0.0, 0.2, 0.9, 1.0)), nonzero=True),
        Select(((0, 1), (0, (numel + 7) // 8)), Score("variance")),
        Select(((0, (numel + 1) // 2),), SCORES["divergence"](numel // columns_of(shape))),
        Select(((0, 0.25),), Score("variance"), nonzero=True),
    ):
        got, _ = natively(data, dtypes, ask, shape, isa)
        assert got == select(data, dtypes, ask, shape)


@every_isa
@pytest.mark.parametrize("threads", [1, 7])
def test_select_on_any_number_of_threads(isa, threads):
    data, ask = raws("close", (BF16, BF16), 37 * CHUNK + 3), Select(((1, 9999), (1, 300000)))
    assert natively(data, (BF16, BF16), ask, (1,), isa, threads)[0] == select(data, (BF16, BF16), ask, (1,))


def driven(ask: Select, values: Mags) -> tuple[tuple[Selected, ...], list[Coarse | Fine]]:
    """The answer from counts by numpy, of input 1."""
    asking, asked = selecting(ask, values.size), []
    try:
        request = next(asking)
        while True:
            asked.append(request)
            request = asking.send([Counted(values, request, j) for j in range(len(request.vectors))])
    except StopIteration as done:
        return done.value, asked


def answered(ask: Select, values: Mags, most: int) -> list[Coarse | Fine]:
    """What was asked for an exact answer; it took at most `most` whole reads."""
    got, asked = driven(ask, values)
    assert got == tuple(pick(values, k, ask.nonzero) for _, k in ask.ranks)
    assert sum(isinstance(r, Fine) or r.every == 1 for r in asked) <= most
    assert all(
        high - low < 1 << 18 for r in asked if isinstance(r, Fine) for low, high in zip(r.low, r.high, strict=True)
    )
    return asked


def mags(values: Any) -> Mags:
    return np.abs(np.asarray(values, np.float32)).view(np.uint32)


@pytest.mark.slow
@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("share", [0.002, 0.2, 0.5, 0.9])
def test_one_read_and_a_sample_for_well_mixed_values(nonzero, share):
    """Normal, continuous or heavily tied, with rows of slightly different scale."""
    rng = np.random.default_rng(3)
    scale = np.repeat(np.exp(0.05 * rng.normal(size=1024)), 1024)
    x = rng.normal(size=1 << 20) * scale
    for values in (x, np.round(2 * x)):
        k = share if nonzero else int(share * x.size)
        asked = answered(Select(((1, k), (1, k)), nonzero=nonzero), mags(values), 1)
        assert [type(r) for r in asked] == [Coarse, Fine]


def test_a_sample_that_misleads_is_noticed():
    """The sampled strips hold values of their own: the first guess fails, and the answer is exact all the same."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=100 * CHUNK)
    every = selecting_module.sample_every(x.size, [0.3])
    sampled = np.arange(x.size) // STRIP % every == 0
    for factor in (1e-3, 1e3):
        asked = answered(Select(((1, 30 * CHUNK),)), mags(np.where(sampled, factor * x, x)), 3)
        assert [type(r) for r in asked] == [Coarse, Fine, Coarse, Fine]
        assert isinstance(asked[2], Coarse) and asked[2].every == 1


@pytest.mark.parametrize("factor", [0.97, 1.03])
def test_a_near_miss_looks_beside_the_first_bracket(factor):
    rng = np.random.default_rng(5)
    x = rng.normal(size=100 * CHUNK)
    every = selecting_module.sample_every(x.size, [0.3])
    sampled = np.arange(x.size) // STRIP % every == 0
    asked = answered(Select(((1, 30 * CHUNK),)), mags(np.where(sampled, factor * x, x)), 2)
    first, second = asked[1:]
    assert isinstance(first, Fine) and isinstance(second, Fine)
    assert second.low[0] == first.high[0] + 1 if factor < 1 else second.high[0] == first.low[0] - 1


@pytest.mark.slow
@pytest.mark.parametrize("order", ["up", "down", "one large chunk"])
def test_sorted_values(order):
    x = np.sort(np.abs(np.random.default_rng(6).standard_t(2, size=60 * CHUNK)))
    if order == "down":
        x = x[::-1]
    elif order == "one large chunk":
        x = np.roll(x, -CHUNK)
    for k in (1, 7, CHUNK // 2, CHUNK, 30 * CHUNK, 59 * CHUNK, x.size):
        answered(Select(((1, k),)), mags(x), 4)


def test_strips_are_the_modules():
    assert (_C.STRIP, _C.CHUNK) == (STRIP, CHUNK)


@pytest.mark.parametrize("value", [0.0, 1.5, np.inf, np.nan])
def test_values_that_are_all_equal(value):
    x = mags(np.full(40 * CHUNK, value))
    x[x > bits(np.inf)] = ALL_BITS
    answered(Select(((1, 1), (1, x.size // 2), (1, x.size))), x, 1)
    answered(Select(((1, 0.0), (1, 0.3), (1, 1.0)), nonzero=True), x, 1)


@pytest.mark.parametrize(("k", "nonzero"), [(0, False), (4, False), (2.0, True), (-0.1, True)])
def test_ranks_that_do_not_exist_are_refused(k, nonzero):
    with pytest.raises(ValueError, match=f"no rank {k} among 3 elements"):
        next(selecting(Select(((1, k),), nonzero=nonzero), 3))


@st.composite
def lumps(draw: Any) -> Mags:
    """Up to 600 magnitudes in runs of equal or close ones."""
    runs = draw(
        st.lists(
            st.tuples(st.integers(0, ALL_BITS), st.integers(1, 60), st.integers(0, 1 << 17)), min_size=1, max_size=10
        )
    )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    parts = [start + rng.integers(0, spread + 1, count) for start, count, spread in runs]
    return np.minimum(np.concatenate(parts), ALL_BITS).astype(np.uint32)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(values=lumps(), places=st.lists(st.floats(0, 1), min_size=1, max_size=4), nonzero=st.booleans())
def test_any_values_in_any_order(values, places, nonzero):
    """With strips of 8 elements, so that small arrays are sampled, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selecting_module, "STRIP", 8)
        patch.setattr(selecting_module, "SAMPLE", 4)
        ranks = tuple((1, p if nonzero else 1 + int(p * (values.size - 1))) for p in places)
        answered(Select(ranks, nonzero=nonzero), values, 4)
