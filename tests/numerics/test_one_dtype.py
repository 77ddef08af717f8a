"""Inputs of one dtype, which kernels take in registers as far as they are finite: the bytes of the reference."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fastinterp.ops.dtypes import BF16, F16, F32, DType
from fastinterp.ops.requests import Mask, Score, Select
from fastinterp.ops.select import Coarse, Fine, step
from fastinterp.reference.select import ranked
from tests.numerics.test_groups import check_combine, check_measure
from tests.numerics.test_masked import CHOICES, ask_of, check, every_isa, options_of
from tests.numerics.test_masks import MASKS, check_masked_stats
from tests.numerics.test_select import SCORES, Counted, assert_counts, pumped
from tests.support.pumps import Raw, raws

one_dtype = pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
NONFINITE = {BF16: (0x7FC0, 0x7F80, 0xFF80), F16: (0x7E00, 0x7C00, 0xFC00), F32: (0x7FC00000, 0x7F800000, 0xFF800000)}


def with_nonfinite(data: Sequence[Raw], dtype: DType, count: int) -> list[Raw]:
    """The same with `count` elements of each input that are NaN or Inf, at other places in each."""
    changed = []
    for k, raw in enumerate(data):
        words = raw.view(np.dtype(f"u{dtype.bits // 8}")).copy()
        at = np.random.default_rng([count, k]).choice(words.size, count, replace=False)
        words[at] = np.resize(NONFINITE[dtype], count)
        changed.append(words.view(np.uint8))
    return changed


@every_isa
@one_dtype
@pytest.mark.parametrize("names", CHOICES)
def test_masked_sums(isa, names, dtype):
    """Of one to three models, all finite, and with a NaN or an Inf where a run has to end."""
    shape = (3, 701)
    for nonfinite in (0, 5):
        data = with_nonfinite(raws("close", [dtype] * 4, math.prod(shape)), dtype, nonfinite)
        asks: list[Any] = []
        for n in (2, 3, 4):
            choices = options_of(data[:n], [dtype] * n, shape)
            asks.append(ask_of(n, *(choices[name] for name in names)))
        check(isa, data, [dtype] * 4, asks, dtype, shape)


@every_isa
@one_dtype
def test_sums_that_overflow(isa, dtype):
    """A run ends where the sum of finite numbers is none that the dtype can store."""
    shape = (3, 500)
    data = raws("huge", [dtype] * 3, math.prod(shape))
    choices = options_of(data, [dtype] * 3, shape)
    check(isa, data, [dtype] * 3, [ask_of(3), ask_of(3, choices["sign_weights"], choices["shares"])], dtype, shape)


@every_isa
@one_dtype
@pytest.mark.parametrize("shape", [(1,), (64,), (257,), (16385,), (3, 1009)], ids=str)
@pytest.mark.parametrize("models", [1, 2, 3])
def test_masked_statistics(isa, dtype, shape, models):
    data = raws("close", [dtype] * (models + 1), math.prod(shape))
    for masks in (("all", "least", "random"), ("ranks", "band", "all")):
        some = tuple(MASKS[name] for name in masks[:models])
        check_masked_stats(isa, data, [dtype] * (models + 1), some, shape, 2)
        check_masked_stats(isa, data, [dtype] * (models + 1), some, shape, 2, l1=False)
    score = Score("variance", b"", 0x36000000)
    check_masked_stats(isa, data, [dtype] * (models + 1), (Mask(),) * models, shape, 2, score, squares=True)


@one_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 255), pytest.param((2, 16385), marks=pytest.mark.slow(4)), (5, 1025)], ids=str
)
@pytest.mark.parametrize("inputs", [1, 2, 3, 4])
def test_measures(dtype, shape, inputs):
    for kind in ("close", "patterns"):
        check_measure(kind, [dtype] * inputs, shape, inputs % 2 == 0)
        check_measure(kind, [dtype] * inputs, shape, inputs % 2 == 1)


@every_isa
@one_dtype
@pytest.mark.parametrize("kind", ["close", "patterns"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("inputs", [2, 3, 4, 5])
def test_histograms(isa, dtype, kind, score, inputs):
    shape = (5, 1031)
    numel, dtypes = math.prod(shape), [dtype] * inputs
    data = raws(kind, dtypes, numel)
    ask = Select(tuple((i, 1) for i in range(1, inputs)), SCORES[score](shape[0]))
    low = int(np.array(0.003, np.float32).view(np.uint32))
    requests = (Coarse(tuple(range(1, inputs))), Fine((1,), (0,), (3,)), Fine((1,), (low,), (low + (1 << 17),)))
    for request in requests:
        (counts,), _ = pumped([step(ask, request, (), numel, shape[1])], [data], dtypes, isa)
        for c, mags in zip(counts, ranked(data, dtypes, ask, shape), strict=False):
            assert_counts(c, Counted(mags, request, 0))


@every_isa
def test_factors_of_rows_are_those_of_their_elements(isa):
    """A run of elements that lie in several rows has the factor of each."""
    shape = (900, 5)
    data = raws("close", [BF16] * 2, math.prod(shape))
    factors = array("f", (0.25 * (1 + r % 7) for r in range(shape[0]))).tobytes()
    check(isa, data, [BF16] * 2, [ask_of(2, {"score": Score("divergence", factors, 0x3A000000)})], BF16, shape)


@one_dtype
@pytest.mark.parametrize("kind", ["close", "patterns"])
def test_sums_with_a_weight_for_each_row(dtype, kind):
    """Rows that are long enough for runs, which end in the middle of a step; every other chunk is sampled, in tiles."""
    check_combine(kind, [dtype] * 3, dtype, (71, 601), "row")
