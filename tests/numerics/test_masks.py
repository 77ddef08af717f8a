"""Masked statistics, and the definitions of masks, ranks and terms."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
from msgspec.structs import replace

from fastinterp._C import Masks
from fastinterp.ops import steps
from fastinterp.ops.combine import philox_key
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, DType
from fastinterp.ops.masked import (
    NOTHING,
    filled_masks,
    masked_output,
    measured_inputs,
    measured_masked,
    read_inputs,
    terms,
    word_limits,
)
from fastinterp.ops.requests import ALL_BITS, Mask, MaskedCombine, MeasuredMasked, MeasureMasked, Score
from fastinterp.reference import combine as reference
from fastinterp.reference import masked as reference_masked
from tests.numerics.test_masked import NAME, SEED, SHAPES, Shape, of
from tests.support import backends
from tests.support.cases import Guarded
from tests.support.pumps import Raw, guarded, masked_step, memory, raws, run, stats_step, stored

every_isa = pytest.mark.parametrize("isa", backends.usable())

# --- statistics ------------------------------------------------------------------------------------------------------

MASKS = {
    "all": Mask(),
    "least": Mask(min_bits=0x3A000000),
    "random": Mask(probability=0.4),
    "ranks": Mask(probability=0.5, rank_slope=0.2),
    "band": Mask(0x39000000, 0x3C000000, 0.7),
}


@every_isa
@pytest.mark.parametrize("shape", [*SHAPES, (300, 1009), (1, 300007)], ids=str)
def test_masked_stats(isa, shape):
    dtypes = [BF16, F32, BF16, F16, BF16, BF16]
    check_masked_stats(isa, raws("normal", dtypes, math.prod(shape)), dtypes, tuple(MASKS.values()), shape, 2)


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("dtypes", [(F64, BF16, F64), (F8_E4M3, F8_E5M2, F16)], ids=str)
def test_masked_stats_on_threads(isa, dtypes, threads):
    shape = (301, 1013)
    data = raws("close", dtypes, math.prod(shape))
    check_masked_stats(isa, data, dtypes, (MASKS["ranks"], MASKS["band"]), shape, threads)
    check_masked_stats(isa, data, dtypes, (MASKS["least"], MASKS["random"]), shape, threads)
    check_masked_stats(isa, data, dtypes, (None, MASKS["random"]), shape, threads)
    check_masked_stats(isa, data, dtypes, (MASKS["ranks"], Mask()), shape, threads, Score("variance", b"", 0x38000000))
    factors = array("f", (0.5 + r % 3 for r in range(shape[0]))).tobytes()
    check_masked_stats(
        isa, data, dtypes, (MASKS["least"], Mask()), shape, threads, Score("divergence", factors, 0x3A000000)
    )


def check_masked_stats(
    isa: str,
    data: Sequence[Raw],
    dtypes: Sequence[DType],
    masks: tuple[Mask | None, ...],
    shape: Shape,
    threads: int,
    score: Score | None = None,
    **wanted: bool,
) -> None:
    ask = MeasureMasked((Mask(), *masks), score, **wanted)
    sources = guarded(data)
    step = stats_step(ask, dtypes, shape, name=NAME, seed=SEED)
    got = measured_masked(ask, *run(isa, [step], memory(sources), [], threads=threads).answers()[0])
    assert got == expected(tuple(raw.tobytes() for raw in data), tuple(dtypes), ask, shape)


@lru_cache(maxsize=8)  # the same on every instruction set
def expected(data: tuple[bytes, ...], dtypes: tuple[DType, ...], ask: MeasureMasked, shape: Shape) -> MeasuredMasked:
    raws = [np.frombuffer(raw, np.uint8) for raw in data]
    return reference_masked.measure_masked(raws, dtypes, ask, shape, name=NAME, seed=SEED)


def test_masked_stats_by_hand():
    data = of([0] * 4, [1, 2, 0, 4], [1, 0, 0, -8])
    ask = MeasureMasked((Mask(), Mask(min_bits=0x40000000), Mask(max_bits=0x3F800000)))
    measured = reference_masked.measure_masked(data, [F32] * 3, ask, (4,))
    assert measured == MeasuredMasked((0.0, 7.0, 9.0), (0.0, 6.0, 1.0), (0, 2, 3), (0, 1, 1), (0.0, 20.0, 1.0))
    lone = dataclasses.replace(ask, masks=(Mask(), None, ask.masks[2]))
    measured = reference_masked.measure_masked(data, [F32] * 3, lone, (4,))
    assert measured == MeasuredMasked((0.0, 0.0, 9.0), (0.0, 0.0, 1.0), (0, 0, 3), (0, 0, 0), (0.0, 0.0, 1.0))
    with pytest.raises(ValueError, match="every model needs a mask"):
        measured_inputs(dataclasses.replace(lone, score=Score("variance")))


@every_isa
@pytest.mark.parametrize("wanted", [{"l1": False}, {"squares": False}, {"l1": False, "squares": False}], ids=str)
def test_what_is_not_asked_is_0(isa, wanted):
    dtypes, shape = [BF16, F32, BF16], (11, 1009)
    data = raws("normal", dtypes, math.prod(shape))
    check_masked_stats(isa, data, dtypes, (MASKS["ranks"], MASKS["least"]), shape, 2, **wanted)


@every_isa
@pytest.mark.parametrize(
    "columns", [255, 256, 1024, 5000, 8193, *(pytest.param(n, marks=pytest.mark.slow) for n in (262144, 262145))]
)
def test_ranks_of_few_and_of_many_magnitudes(isa, columns):
    """All in one bin, all equal, in steps of bf16, over all powers of two: counted, searched for and sorted."""
    shape, rng = (7, columns), np.random.default_rng(columns)
    close = 1 + 2.0**-20 * rng.integers(0, 8, columns)
    steps = rng.integers(-40, 40, columns) * 2.0**-9
    wide = rng.normal(size=columns) * 2.0 ** rng.integers(-120, 120, columns)
    near = 2.0**-9 * rng.normal(size=columns)
    rows = np.array([close, np.ones(columns), steps, wide, near, np.zeros(columns), -close])
    data = of(np.zeros(shape).ravel(), rows.ravel())
    mask = Mask(probability=0.5, rank_slope=0.45)
    check_masked_stats(isa, data, [F32] * 2, (mask,), shape, 2)
    rows[rng.random(shape) < 0.1] = np.nan
    check_masked_stats(
        isa, of(np.zeros(shape).ravel(), rows.ravel()), [F32] * 2, (mask,), shape, 2, l1=False, squares=False
    )


@pytest.mark.slow
@every_isa
@pytest.mark.parametrize("shape", [(300007,), (301, 1013), (0, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("limit", [math.inf, 0.5])
def test_precomputed_masks_give_the_same_bytes(isa, shape, limit):
    """The sum draws and sorts nothing again; where it limits the deltas, it must."""
    dtypes, numel = [BF16] * 4, math.prod(shape)
    data = raws("close", dtypes, numel)
    masks = (Mask(), MASKS["ranks"], MASKS["band"], Mask(probability=0.3, min_bits=0x3A000000))
    survey, combine = (
        MeasureMasked(masks, squares=False),
        MaskedCombine((0.0, 0.5, -0.5, 1.0), masks=masks, limit=limit),
    )
    places = list(filled_masks(survey).values())
    assert places == [-1, 0, 1, 2]
    filled, sources, sink = Masks(3, numel), guarded(data), Guarded(2 * numel, 3)
    fills = steps.MaskFill(filled, tuple(places))
    filling = replace(stats_step(survey, dtypes, shape, name=NAME, seed=SEED), fills=fills)
    run(isa, [filling], memory(sources), [])
    precomputed = {(i, masks[i], SEED): steps.MaskPlace(filled, places[i]) for i in (1, 2, 3)}
    step = masked_step([combine], dtypes, BF16, shape, name=NAME, seed=SEED, precomputed=precomputed)
    assert [term.precomputed_mask is not None for term in step.outputs[0].terms] == [limit == math.inf] * 3
    run(isa, [step], memory(sources), memory([sink]))
    want, _ = reference_masked.masked(data, dtypes, combine, BF16, shape, name=NAME, seed=SEED)
    backends.assert_same_bits(want, sink.view, BF16, "with masks")


def test_which_masks_are_filled():
    masks = (Mask(), Mask(min_bits=5), Mask(probability=0.5), Mask(), Mask(probability=0.5, rank_slope=0.1))
    assert list(filled_masks(MeasureMasked(masks)).values()) == [-1, -1, 0, -1, 1]
    assert list(filled_masks(MeasureMasked(masks, Score("variance"))).values()) == [-1] * 5
    assert filled_masks(MeasureMasked((*masks[:3], None, masks[4]))) == {0: -1, 1: -1, 2: 0, 4: 1}


def test_numbers_of_keeps():
    """Fair bits in both halves, and the low halves from another space than the high ones."""
    numbers = reference_masked.mask_numbers(7, 1 << 16)
    word = reference.philox(np.array([[16 * 3 + 5, 0, 0, 0], [16 * 3 + 5, 0, 1, 0]], np.uint32), 7)[:, 2]
    assert numbers[3 * 128 + 2 * 16 + 5] == (int(word[0]) & 0xFFFF) << 16 | int(word[1]) & 0xFFFF
    assert numbers[3 * 128 + 64 + 2 * 16 + 5] == int(word[0]) >> 16 << 16 | int(word[1]) >> 16
    for bit in range(32):
        assert abs(np.mean(numbers >> np.uint32(bit) & np.uint32(1)) - 0.5) < 5 * 0.5 / 256


@every_isa
def test_the_low_half_decides_where_the_high_one_is_the_limits(isa):
    """Limits that lie on an element's number, and just above it."""
    numbers = reference_masked.mask_numbers(philox_key(SEED, 2, NAME), 4000)
    data = of(np.zeros(4000), np.ones(4000))
    for e in (0, 63, 64, 127, 3999):
        for limit in (int(numbers[e]), int(numbers[e]) + 1):
            ask = MeasureMasked((Mask(), Mask(probability=limit / 2**32)), squares=False)
            check_masked_stats(isa, data, [F32] * 2, ask.masks[1:], (4000,), 1)
            measured = reference_masked.measure_masked(data, [F32] * 2, ask, (4000,), name=NAME, seed=SEED)
            assert measured.count[1] == int(np.sum(numbers < limit))


# --- definitions -----------------------------------------------------------------------------------------------------


def test_magnitudes():
    x = np.array([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, -math.nan, 1e300, 1 + 2.0**-24])
    want = [0, 0, 0x3F800000, 0x3F800000, 0x7F800000, 0x7F800000, ALL_BITS, ALL_BITS, 0x7F800000, 0x3F800000]
    assert list(reference_masked.magnitudes(x)) == want


def test_ranks_of_ties_are_shared():
    mag = np.array([5, 1, 5, 9, 0, 0, 0], np.uint32)
    assert list(reference_masked.twice_ranks(mag[:4], 4)) == [3, 0, 3, 6]
    assert list(reference_masked.twice_ranks(mag[:6], 2)) == [2, 0, 0, 2, 1, 1]


def test_word_limits():
    assert word_limits(Mask()) == (2**32, 2**32)
    assert word_limits(Mask(probability=0.25)) == (2**30, 2**30)
    assert word_limits(Mask(probability=0.9, rank_slope=0.3)) == (round(0.6 * 2**32), 2**32)


def test_who_is_read():
    masks = tuple(Mask(min_bits=i) for i in range(4))
    ask = MaskedCombine((0.0, 1.0, 0.0, 2.0), masks=masks)
    assert terms(ask) == [(1, masks[1]), (3, masks[3])] and read_inputs(ask) == [0, 1, 3]
    scored = dataclasses.replace(ask, score=Score("variance"))
    assert terms(scored) == [(1, masks[1]), (2, NOTHING), (3, masks[3])]
    assert terms(dataclasses.replace(ask, sign_weights=(0.0, 0.0, 1.0, 0.0)))[1] == (2, masks[2])
    assert terms(MaskedCombine((0.0, 0.0), score=Score("variance"))) == []
    assert read_inputs(MaskedCombine((0.0, 1.0, 1.0), importance=(3, 4, 5))) == [0, 1, 2, 4, 5]


def test_without_a_term_it_is_a_copy():
    data = of([-0.0, math.nan], [1.0, 1.0])
    got, stats = reference_masked.masked(data, [F32] * 2, MaskedCombine((0.0, 0.0)), F32, (2,))
    assert stats is None and np.array_equal(got, data[0])
    with pytest.raises(ValueError, match="copy of its base"):
        masked_output(MaskedCombine((0.0, 0.0)), name=NAME, seed=SEED, inputs=[0, 1])


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (MaskedCombine((1.0, 1.0)), "base carries no weight"),
        (MaskedCombine((0.0, 1.0), sign_weights=(1.0,)), "sign_weights has 1 entries for 2 weights"),
        (MaskedCombine((0.0, 1.0), importance=(2, 3), sign_weights=(0.0, 1.0)), "importance goes with neither"),
        (MaskedCombine((0.0, 1.0), masks=(Mask(), Mask(rank_slope=-0.1))), "rank_slope of a mask"),
    ],
)
def test_contradictions_are_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        terms(ask)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"columns": 7}, "whole rows"),
        ({"columns": 0}, "whole rows"),
        ({"outputs": ()}, "as many outputs as sinks"),
        ({"inputs": stored([F32])}, "none of the inputs"),
    ],
)
def test_the_pump_refuses_steps_that_make_no_sense(change, words):
    step = masked_step([MaskedCombine((0.0, 1.0))], [F32, F32], F32, (4, 3), name=NAME, seed=SEED)
    buffer = Guarded(48, 0)
    with pytest.raises(ValueError, match=words):
        run("scalar", [replace(step, **change)], memory([buffer, buffer]), memory([buffer]))
