"""CUDA's kernel of histograms, on the host: the counts of the pump."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from fastinterp.ops.contract import STRIP
from fastinterp.ops.dtypes import BF16, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.ops.requests import ALL_BITS
from fastinterp.ops.select import COARSE_BITS
from fastinterp.ops.steps import Bracket, Histogram, Score
from tests.support.devices.cuda_pieces import Rig, addressed, answers, pump_answers, same
from tests.support.pumps import columns_of, raws, stored

COARSE = (0, ALL_BITS, COARSE_BITS)
FINE = (0x3B000000, 0x3B03FFFF, 0)
SMALL = Histogram(inputs=stored([BF16, BF16]), numel=64, columns=8, brackets=(Bracket(1, *COARSE),))


def check(
    dtypes: Sequence[DType], ranked: Sequence[tuple[int, int, int, int]], shape: tuple[int, ...], fill: str = "close",
    every: int = 1, score: Any = None, **cut: int,
) -> None:  # fmt: skip
    data = raws(fill, dtypes, math.prod(shape))
    step = Histogram(
        inputs=stored(dtypes), numel=math.prod(shape), columns=columns_of(shape), every=every, score=score,
        brackets=tuple(Bracket(*one) for one in ranked),
    )  # fmt: skip
    assert same(answers(step, data, **cut), pump_answers(step, data))


@pytest.mark.parametrize("fill", ["close", "patterns", "normal"])
@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_every_dtype(dtype, fill):
    check([dtype, BF16, dtype], [(1, *COARSE), (2, *COARSE), (2, *FINE)], (3, 1709), fill, offset=1)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("numel", [0, 1, 7, 511, 512, 513, 3 * STRIP, 40_009])
def test_every_size_in_pieces(numel, every):
    for most in (1, 50_000):
        check([BF16, F32], [(1, *COARSE), (1, 0x3A000000, 0x3B00FFFF, 8)], (numel,), every=every, most=most, offset=2)


def test_ties_and_many_bins():
    """One magnitude all over; and as many as there are elements, more than fit where a block counts."""
    check([BF16, BF16], [(1, *COARSE), (1, 0, 0, 0), (1, 1, 5, 1)], (9_000,), "zeros")
    check([F32, F32], [(1, 0x3F000000, 0x3F7FFFFF, 2), (1, *COARSE)], (20_000,), "normal")
    check([F64, F8_E5M2], [(1, *COARSE)], (3_000,), "normal")


def test_scores():
    shape = (7, 1501)
    factors = array("f", (0.5 + r % 3 for r in range(shape[0]))).tobytes()
    for dtypes in ([BF16, F32, F16], [BF16] * 7, [F64, BF16]):
        ranked = [(0, *COARSE), (0, 0x30000000, 0x3003FFFF, 0)]
        check(dtypes, ranked, shape, score=Score("variance", 0), most=1, offset=3)
        check(dtypes, ranked, shape, score=Score("divergence", 0, factors), every=3)


def test_more_brackets_than_a_launch_has():
    ranked = [(1 + i // 40, 0x3A000000 + (i << 20), 0x3A0FFFFF + (i << 20), 8) for i in range(70)]
    check([BF16, BF16, F16], ranked, (5_000,), "normal")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"brackets": ()}, "needs brackets"), ({"brackets": (Bracket(0, *COARSE),)}, "none of the inputs"),
        ({"every": 0}, "strip"), ({"brackets": (Bracket(1, 2, 1, 0),)}, "no such bracket"), ({"columns": 0}, "columns"),
        ({"score": Score("divergence", 0, bytes(4))}, "a factor per row"),
    ],
)  # fmt: skip
def test_what_is_refused(change, words):
    rig = Rig()
    piece = addressed(rig, SMALL, raws("normal", [BF16, BF16], 64), 0, 64, 0)
    with pytest.raises(ValueError, match=words):
        rig.run([replace(piece, step=replace(SMALL, **change))])


def test_pieces_begin_with_a_strip():
    rig = Rig()
    piece = addressed(rig, SMALL, raws("normal", [BF16, BF16], 64), 5, 59, 0)
    with pytest.raises(ValueError, match="begins with a strip"):
        rig.run([piece])
