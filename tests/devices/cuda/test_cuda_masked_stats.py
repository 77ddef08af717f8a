"""CUDA's kernel of masked statistics, on the host: the answers of the pump, to the bit."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence

import pytest

from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.ops.requests import Mask, MeasureMasked, Score
from fastinterp.ops.steps import MaskedStats
from tests.numerics.test_masked import NAME, SEED, Shape
from tests.support.devices.cuda_pieces import Rig, addressed, answers, pump_answers, same
from tests.support.pumps import raws, stats_step

MASKS = (Mask(), Mask(min_bits=0x3A000000), Mask(probability=0.4), Mask(0x39000000, 0x3C000000, 0.7), Mask(1, 0))


def step_of(ask: MeasureMasked, dtypes: Sequence[DType], shape: Shape) -> MaskedStats:
    return stats_step(ask, dtypes, shape, name=NAME, seed=SEED)


def check(
    dtypes: Sequence[DType], masks: Sequence[Mask | None], shape: Shape, fill: str = "normal",
    score: Score | None = None, wanted: dict[str, bool] | None = None, **cut: int,
) -> None:  # fmt: skip
    data = raws(fill, dtypes, math.prod(shape))
    step = step_of(MeasureMasked((Mask(), *masks), score, **(wanted or {})), dtypes, shape)
    assert same(answers(step, data, **cut), pump_answers(step, data))


SIZES = [(0,), (1,), (255,), (257,), (2047,), (2049,), (16384,), (16385,), (3, 17001)]


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_every_size(shape):
    check([BF16, F32, BF16, F16, BF16], MASKS[:4], shape)
    check([BF16, F32, BF16, F16, BF16, BF16], MASKS, shape, offset=1)


@pytest.mark.parametrize("dtype", MERGING, ids=str)
@pytest.mark.parametrize("fill", ["patterns", "close"])
def test_every_dtype(fill, dtype):
    check([dtype, BF16, dtype], MASKS[2:4], (3, 1009), fill, offset=3)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 10, 33])
def test_any_number_of_inputs(n):
    dtypes = [(BF16, F8_E4M3, F64, F8_E5M2)[i % 4 if i % 5 else 0] for i in range(n)]
    masks = [MASKS[i % len(MASKS)] for i in range(n - 1)]
    check(dtypes, masks, (5, 811))
    if n > 1:
        check(dtypes, masks, (5, 811), score=Score("variance", b"", 0x38000000))
        check(dtypes, [None, *masks[1:]], (5, 811))


def test_scores_and_what_is_not_asked():
    dtypes, shape = [BF16, F32, BF16], (11, 3001)
    factors = array("f", (0.5 + r % 3 for r in range(shape[0]))).tobytes()
    check(dtypes, MASKS[1:3], shape, score=Score("divergence", factors, 0x3A000000), most=1)
    for wanted in ({"l1": False}, {"squares": False}, {"l1": False, "squares": False}):
        check(dtypes, MASKS[2:4], shape, wanted=wanted)


@pytest.mark.parametrize("most", [1, 5 * 2 * CHUNK, 1 << 30])
def test_pieces_fold_to_the_tensor(most):
    check([BF16, F8_E4M3, F16], MASKS[2:4], (331, 307), most=most)


def test_what_is_refused():
    step = step_of(MeasureMasked((Mask(), Mask(probability=0.5, rank_slope=0.1))), [BF16, BF16], (2, 8))
    rig, data = Rig(), raws("normal", [BF16, BF16], 16)
    with pytest.raises(ValueError, match="by rank"):
        rig.run([addressed(rig, step, data, 0, 16, 0)])
    step = step_of(MeasureMasked((Mask(), Mask())), [BF16, BF16], (2, 8))
    with pytest.raises(ValueError, match="begins with a chunk"):
        rig.run([addressed(rig, step, data, 8, 8, 0)])
