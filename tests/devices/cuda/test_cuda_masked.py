"""CUDA's kernels of masked sums, on the host: the bytes of the pump."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastinterp.ops.combine import philox_key
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.ops.requests import Mask, MaskedCombine, Score
from fastinterp.ops.steps import MaskedSum
from tests.numerics.test_masked import NAME, SEED, Shape, ask_of, least_of, options_of
from tests.support import backends
from tests.support.devices.cuda_pieces import Rig, addressed, pump_written, written
from tests.support.pumps import Raw, masked_step, raws

COUNTS = ("nan_in", "inf_in", "nan_out", "inf_out", "sampled", "changed")
SUMS = ("sum_pp", "sum_dd", "sum_od")


def step_of(dtypes: Sequence[DType], asks: Sequence[MaskedCombine], out_dtype: DType, shape: Shape) -> MaskedSum:
    keys = [philox_key(SEED, k, NAME) for k in range(len(asks))]
    return masked_step(asks, dtypes, out_dtype, shape, name=NAME, seed=SEED, keys=keys)


def check(
    data: Sequence[Raw],
    dtypes: Sequence[DType],
    asks: Sequence[MaskedCombine],
    out_dtype: DType,
    shape: Shape,
    offset: int = 0,
    most: int = 1 << 30,
    **options: Any,
) -> None:
    step = step_of(dtypes, asks, out_dtype, shape)
    options = {"stats_every": 2, "fp8_saturate": True, **options}
    want, expected = pump_written(step, data, **options)
    got, stats = written(step, data, offset, most, **options)
    for k, ask in enumerate(asks):
        backends.assert_same_bits(want[k], got[k], out_dtype, f"{ask}")
        if not options["stats_every"]:
            assert not any(stats[k].values())
            continue
        assert {name: stats[k][name] for name in COUNTS} == {name: expected[k][name] for name in COUNTS}
        for name in SUMS:  # the order of a sum is free
            if math.isfinite(expected[k][name]):
                scale = math.sqrt(expected[k]["sum_pp"] * expected[k]["sum_dd"]) + expected[k]["sum_dd"]
                scale = expected[k][name] if name != "sum_od" else scale
                assert stats[k][name] == pytest.approx(expected[k][name], rel=0, abs=1e-11 * scale + 1e-300)


COMBINED: dict[str, tuple[str, ...]] = {
    "ties": ("least", "sign_weights", "shares"),
    "dare": ("random", "sign_weights", "shares"),
    "band": ("band", "sole_weights", "limit", "divergence"),
    "all": ("random", "some_vote", "shares", "sole_weights", "variance", "limit"),
    "variance": ("variance", "sign_weights", "shares"),
    "limit": ("limit", "random"),
    "plain": (),
}


@pytest.mark.parametrize("names", COMBINED.values(), ids=COMBINED.keys())
@pytest.mark.parametrize("kind", ["close", "patterns"])
def test_options(kind, names):
    """Two to seven models: few terms in registers, and many; two outputs of different inputs."""
    dtypes, shape = [BF16, F16, BF16, F32, BF16, F8_E4M3, BF16], (7, 701)
    data = raws(kind, dtypes, math.prod(shape))
    for n in (2, 3, 5, 7):
        choices = options_of(data[:n], dtypes[:n], shape)
        ask = ask_of(n, *(choices[name] for name in names))
        check(data, dtypes, [ask, dataclasses.replace(ask, weights=(0.0, *(0.3,) * (n - 1)))], BF16, shape, n)


@pytest.mark.parametrize("names", [*COMBINED.values(), ("sign_weights",), ("least", "sign_weights", "limit")], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_bf16_alone(n, names):
    """A kernel for each number of terms: units of finite numbers, of differences that are 0, and with NaN and Inf."""
    dtypes, shape = [BF16] * n, (3, 1777)
    for kind in ("normal", "close", "patterns"):
        data = raws(kind, dtypes, math.prod(shape))
        choices = options_of(data, dtypes, shape)
        for k, special in enumerate((0x7FC0, 0x7F80, 0xFF80)):  # each alone in its unit
            data[n - 1].view(np.uint16)[640 * k + 3] = special
            data[0].view(np.uint16)[1280 * k + 5] = special
        ask = ask_of(n, *(choices[name] for name in names))
        check(data, dtypes, [ask], BF16, shape, most=1 << 30 if kind == "normal" else 4096)


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_every_dtype(dtype, offset):
    dtypes, shape = [dtype] * 3, (3, 331)
    data = raws("patterns", dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    for out in MERGING:
        ask = ask_of(3, *(choices[name] for name in COMBINED["dare" if out is dtype else "band"]))
        for options in ({}, {"fp8_saturate": False, "stochastic": True}):
            check(data, dtypes, [ask], out, shape, offset, **options)


@pytest.mark.parametrize("shape", [(0,), (1,), (127,), (128,), (129,), (16385,), (100, 3), (3, 20011)], ids=str)
def test_every_size_in_pieces(shape):
    dtypes = [BF16, F32, BF16]
    data = raws("normal", dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    ask = ask_of(3, *(choices[name] for name in COMBINED["dare"]))
    if math.prod(shape):
        ask = dataclasses.replace(ask, score=choices["divergence"]["score"])
    for most, stats_every in ((1, 1), (300_000, 3), (1 << 30, 0)):
        check(data, dtypes, [ask], BF16, shape, 2, most, stochastic=True, stats_every=stats_every)


@pytest.mark.parametrize("first", [5, 1000, CHUNK - 3])
def test_pieces_begin_anywhere(first):
    """A part of a tensor, which is cut at no multiple of anything, has the bytes that it has in the tensor."""
    dtypes, shape = [BF16] * 3, (2, 9973)
    data = raws("normal", dtypes, math.prod(shape))
    choices = options_of(data, dtypes, shape)
    asks = [ask_of(3, choices["random"], choices["divergence"])]
    step = step_of(dtypes, asks, F16, shape)
    want, _ = pump_written(step, data, stochastic=True)
    rig, count = Rig(), 1777
    output = rig.put(want[0][: 2 * count] * 0, 2)
    rig.run([addressed(rig, step, data, first, count, 6, outputs=(output,))])
    assert rig.get(output, 2 * count).tobytes() == want[0][2 * first : 2 * (first + count)].tobytes()


def test_importances():
    """Models 0, 2 and 4 with the elements of 1, 3 and 5 as further weights; some of them 0, or NaN."""
    dtypes, shape = [BF16, F32, BF16, F32, F16, F64], (5, 409)
    for n, importance in ((3, (3, 4, 5)), (2, (2, 3))):
        weights = (0.5, -0.25, 1.5)[:n]
        data = raws("patterns", dtypes, math.prod(shape))
        ask = MaskedCombine(weights, importance=importance)
        check(data, dtypes, [ask], F32, shape, 1)
        data = raws("normal", dtypes, math.prod(shape))
        check(data[:5], dtypes[:5], [MaskedCombine(weights[:2], importance=(2, 3))], BF16, shape)


def test_shares_that_cancel():
    """A sum of shares that is 0 counts as the other one, whatever the least is."""
    dtypes, shape = [BF16] * 3, (3, 257)
    ask = ask_of(3, {"shares": (0.0, 1.0, -1.0), "other_share": 4.0, "masks": (Mask(), Mask(probability=0.5), Mask())})
    check(raws("normal", dtypes, math.prod(shape)), dtypes, [ask], F32, shape)


def test_many_terms():
    n = 40
    dtypes, shape = [(BF16, F8_E5M2)[i % 2] for i in range(n)], (3, 257)
    data = raws("close", dtypes, math.prod(shape))
    masks = (Mask(), *(Mask(min_bits=low, probability=0.5) for low in least_of(data, dtypes, 0.2)[1:]))
    ask = dataclasses.replace(ask_of(n), masks=masks, sign_weights=(0.0, *(1.0,) * (n - 1)), score=Score("variance"))
    check(data, dtypes, [ask], F32, shape)
    factors = array("f", (1.0, 2.0, 0.5)).tobytes()
    check(data, dtypes, [dataclasses.replace(ask, score=Score("divergence", factors, 0x39000000))], BF16, shape)


def test_low_halves_of_random_numbers():
    """Limits whose high half is met by some elements, so that the other half decides."""
    dtypes, numel = [BF16, BF16], 500_000
    mask = Mask(probability=3 * 2.0**-17)
    check(raws("normal", dtypes, numel), dtypes, [dataclasses.replace(ask_of(2), masks=(Mask(), mask))], F32, (numel,))
