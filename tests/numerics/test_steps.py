"""Pieces of steps: their answers, from runs of the pump over slices, join to the whole tensor's, to the bit."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from fastinterp import _C
from fastinterp._C import Counts, Masks, fold
from fastinterp.ops import contract, steps
from fastinterp.ops.combine import MAX_INPUTS, MAX_OUTPUTS
from fastinterp.ops.contract import CHUNK, STRIP
from fastinterp.ops.dtypes import BF16, CODE_BYTES, F8_E4M3, F16, F32, F64, DType
from fastinterp.ops.operands import Gathered, Stored
from fastinterp.ops.requests import ALL_BITS, MaskedCombine
from fastinterp.ops.steps import Bracket, MaskTest
from tests.support.cases import Guarded
from tests.support.pumps import code, guarded, masked_step, memory, raws, run, stored

TEST = MaskTest(0x39000000, ALL_BITS)
BRACKETS = (Bracket(1, 0, ALL_BITS, 15), Bracket(2, 0x38000000, 0x3C000000, 9))
PERS: tuple[steps.Per, ...] = ("tensor", "row", "column")
KINDS: dict[str, Callable[..., steps.Step]] = {
    f"{'deltas' if deltas else 'inputs'} by {per}": partial(steps.Measure, deltas=deltas, per=per)
    for deltas in (False, True)
    for per in PERS
} | {
    "masked_stats": partial(steps.MaskedStats, tests=(TEST,) * 3, score=None, l1=True, squares=True),
    "histogram": partial(steps.Histogram, brackets=BRACKETS),
    "divergence": steps.Divergence,
}


def bytes_of(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        return [(c.elements, c.above, c.zero, c.bins.tobytes()) for c in answer]
    return [part.tobytes() for part in answer]


SHAPES = ((5, 40009), (1000, 77), (129, 4), (1, 3 * CHUNK + 1), (64, 1), (3, 5), (2 * CHUNK, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_answer_as_the_whole_does(kind, shape):
    dtypes: list[DType] = [BF16, F32, F16] if kind != "divergence" else [BF16, F64]
    numel, columns = math.prod(shape), shape[-1]
    data = raws("normal", dtypes, numel)
    step = KINDS[kind](inputs=stored(dtypes), numel=numel, columns=columns)
    sources = guarded(data)
    (want,) = run("", [step], memory(sources), []).answers()
    for most in (1, 400_000, 1 << 30):
        cuts = step.cut(most)
        assert [0, *accumulate(count for _, count in cuts)] == [*(first for first, _ in cuts), numel]
        at = [
            replace(
                step, numel=count, columns=count if kind in ("masked_stats", "histogram") else columns,
                inputs=stored(dtypes, [first * d.bits // 8 for d in dtypes]),
            )
            for first, count in cuts
        ]  # fmt: skip
        answers = run("", at, memory(sources), []).answers()
        assert bytes_of(step.join(answers)) == bytes_of(want), cuts


def test_where_tensors_are_cut():
    """As many bytes as allowed, but whole rows, chunks and strips, and powers of two of them where sums fold."""
    gathered = Gathered(((0, 0, 10),), code(F32), array("q"))
    inputs = (Stored(0, 0, code(BF16)), Stored(1, 0, code(F8_E4M3)), gathered)
    combine = steps.Combine(
        inputs=inputs, numel=10 * CHUNK + 1, columns=2000, sinks=(0, 1), offsets=(0, 0), out_dtype=code(F64), rows=()
    )
    assert combine.element_bytes == 23
    assert combine.cut(23 * 7 * CHUNK) == [(0, 7 * CHUNK), (7 * CHUNK, 3 * CHUNK + 1)]
    assert combine.cut(1, 0) == replace(combine, numel=0).cut(1) == [(0, 0)]

    def lengths(most: int, kind: Callable[..., steps.Step], **keys: Any) -> set[int]:
        step = kind(inputs=inputs, numel=1_000_000, columns=2000, **keys)
        assert step.element_bytes == 7
        return {count for _, count in step.cut(most)[:-1]}

    for kind in ("inputs by tensor", "deltas by tensor", "masked_stats"):
        assert lengths(7 * (4 * CHUNK - 1), KINDS[kind]) == {2 * CHUNK} and lengths(1, KINDS[kind]) == {CHUNK}
    assert lengths(7 * 11999, steps.Measure, per="row") == {10000}
    assert lengths(7 * 11999, steps.Divergence) == {10000} and lengths(1, steps.Divergence) == {2000}
    assert lengths(7 * 400_000, steps.Measure, per="column") == {2 * 64 * 2000}
    assert lengths(7 * 11999, KINDS["histogram"]) == {11999 // STRIP * STRIP}


def test_answers_that_do_not_fit_are_refused():
    one, two = (array("d", [1.0]), array("q", [1])), (array("d", [1.0, 2.0]), array("q", [1]))
    for bad in ([], [one, two], [one, (one[0], array("q"))], [(array("d"), array("q"))]):
        with pytest.raises(ValueError, match="answers"):
            fold(bad)
    with pytest.raises(ValueError, match="contiguous buffer of float64"):
        fold([(array("f", [1.0, 2.0]), array("q"))])


def test_statistics_add():
    first = [{"nan_in": 1, "sum_pp": 0.5}, {"nan_in": 0, "sum_pp": 1.0}]
    second = [{"nan_in": 2, "sum_pp": 0.25}, {"nan_in": 5, "sum_pp": 2.0}]
    assert steps.join_stats([first, second]) == [{"nan_in": 3, "sum_pp": 0.75}, {"nan_in": 5, "sum_pp": 3.0}]
    assert steps.join_stats([[], []]) == []
    combine = steps.Combine(inputs=stored([F32]), numel=1, sinks=(0,), offsets=(0,), out_dtype=code(F32), rows=())
    assert combine.join([None, None]) is None


def test_counts_from_bins():
    bins = np.zeros(40, np.uint32)
    bins[[0, 17, 39]] = 5, 2, 0xFFFFFFFF
    made = Counts(1 << 33, 3, 5, bins)
    assert (made.elements, made.above, made.zero, list(made.bins)) == (1 << 33, 3, 5, bins.tolist())
    made.add(Counts(1, 1, 0, bins))
    assert made.bins[39] == 2 * 0xFFFFFFFF and made.rank(1) == (39, 2 * 0xFFFFFFFF) and made.above == 4
    with pytest.raises(ValueError, match="different bins"):
        made.add(Counts(0, 0, 0, bytes(4)))
    for bad in (b"", b"abc", np.zeros(3)):
        with pytest.raises(ValueError, match=r"bin|uint32"):
            Counts(0, 0, 0, bad)


def test_masks_that_nobody_filled_are_drawn_again():
    """What the pump writes from masks, and without them."""
    dtypes, numel = [BF16, BF16], 1000
    test = MaskTest(0, ALL_BITS, 1 << 31, 1 << 31, 77)
    data, masks = raws("normal", dtypes, numel), Masks(1, numel)
    term = steps.MaskedTerm(
        input=1, weight=0.5, sign_weight=0.0, share=0.0, sole_weight=0.0, importance=-1, test=test,
        precomputed_mask=steps.MaskPlace(masks, 0),
    )  # fmt: skip
    output = steps.MaskedOutput(
        base=0, terms=(term,), elects_signs=False, divides=False, has_sole_weights=False, least_share=0.0,
        other_share=1.0, limit=math.inf, score=None,
    )  # fmt: skip
    step = steps.MaskedSum(
        inputs=stored(dtypes), numel=numel, columns=numel, sinks=(0,), offsets=(0,), out_dtype=code(BF16),
        outputs=(output,),
    )  # fmt: skip
    stats = steps.MaskedStats(
        inputs=stored(dtypes), numel=numel, columns=numel, tests=(TEST, test), score=None, l1=False, squares=False,
        fills=steps.MaskFill(masks, (-1, 0)),
    )  # fmt: skip
    sources, sinks = guarded(data), [Guarded(2 * numel, 5) for _ in range(2)]
    with pytest.raises(ValueError, match="none of the masks"):
        run("", [step], memory(sources), memory(sinks[:1]))
    drawn = step.with_filled_masks()
    assert drawn.outputs[0].terms[0].precomputed_mask is None
    run("", [drawn], memory(sources), memory(sinks[:1]))
    filled = [masks.filled]
    run("", [stats], memory(sources), [])
    assert [*filled, masks.filled] == [False, True] and step.with_filled_masks() is step
    run("", [step], memory(sources), memory(sinks[1:]))
    assert sinks[0].view.tobytes() == sinks[1].view.tobytes() != data[0].tobytes()


def test_masks_by_rank_are_told():
    def by_rank(low: int) -> tuple[bool, bool]:
        ask = MaskedCombine((0.0, 1.0))
        masked = masked_step([ask], [F32, F32], F32, (4,), name="", seed=0)
        test = MaskTest(0, ALL_BITS, low, 1 << 31)
        (output,) = masked.outputs
        output = replace(output, terms=(replace(output.terms[0], test=test),))
        stats = KINDS["masked_stats"](inputs=stored([F32] * 3), numel=4)
        return replace(masked, outputs=(output,)).by_rank, replace(stats, tests=(test,) * 3).by_rank

    assert by_rank(5) == (True, True) and by_rank(1 << 31) == (False, False)
    assert not steps.Measure(inputs=stored([F32]), numel=1).by_rank


def test_constants_are_those_of_the_compiled_code():
    assert (contract.CHUNK, contract.LANES, contract.STRIP, contract.BLOCK_ROWS) == (
        _C.CHUNK, _C.LANES, _C.STRIP, _C.BLOCK_ROWS,
    )  # fmt: skip
    assert (MAX_INPUTS, MAX_OUTPUTS) == (_C.MAX_INPUTS, _C.MAX_OUTPUTS)
    assert CODE_BYTES == _C.DTYPE_BYTES
