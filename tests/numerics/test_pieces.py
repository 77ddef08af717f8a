"""Pieces of steps: their answers, from runs of the pump over slices, join to the whole tensor's, to the bit."""

from __future__ import annotations

import math
from array import array
from itertools import accumulate
from typing import Any

import numpy as np
import pytest

from fastinterp._C import CHUNK, STRIP, Counts, Masks, fold
from fastinterp.backends import pieces
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32, F64, DType
from fastinterp.ops.requests import ALL_BITS
from tests.support.cases import Guarded
from tests.support.pumps import code, guarded, memory, raws, run

KEEP = {"least": 0x39000000, "most": ALL_BITS, "lo": 1 << 32, "hi": 1 << 32, "key": 0}


def keys_of(kind: str, n: int) -> dict[str, Any]:
    if kind == "kept":
        return {"keeps": [KEEP] * n, "score": None, "l1": True, "squares": True}
    if kind == "histogram":
        return {"ranked": [(1, 0, ALL_BITS, 15), (n - 1, 0x38000000, 0x3C000000, 9)], "every": 1, "score": None}
    kind, _, per = kind.partition(" by ")
    return {"per": per or "tensor"} if kind != "divergence" else {}


def bytes_of(answer: Any) -> list[Any]:
    if isinstance(answer, list):
        return [(c.elements, c.above, c.zero, c.bins.tobytes()) for c in answer]
    return [part.tobytes() for part in answer]


KINDS = [f"{kind}{per}" for kind in ("measure", "measure_deltas") for per in ("", " by row", " by column")]
KINDS += ["kept", "histogram", "divergence"]
SHAPES = ((5, 40009), (1000, 77), (129, 4), (1, 3 * CHUNK + 1), (64, 1), (3, 5), (2 * CHUNK, 1))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_answer_as_the_whole_does(kind, shape):
    dtypes: list[DType] = [BF16, F32, F16] if kind != "divergence" else [BF16, F64]
    numel, columns = math.prod(shape), shape[-1]
    data = raws("normal", dtypes, numel)
    step = {
        "kind": kind.partition(" ")[0], "numel": numel, "columns": columns, **keys_of(kind, len(dtypes)),
        "inputs": [(i, 0, code(d)) for i, d in enumerate(dtypes)],
    }  # fmt: skip
    sources = guarded(data)
    (want,) = run("", [step], memory(sources), []).answers()
    for most in (1, 400_000, 1 << 30):
        cuts = pieces.cut(step, most)
        assert [0, *accumulate(count for _, count in cuts)] == [*(first for first, _ in cuts), numel]
        at = [
            {
                **step, "numel": count, "columns": count if kind in ("kept", "histogram") else columns,
                "inputs": [(i, first * d.bits // 8, code(d)) for i, d in enumerate(dtypes)],
            }
            for first, count in cuts
        ]  # fmt: skip
        answers = run("", at, memory(sources), []).answers()
        assert bytes_of(pieces.join(step, answers)) == bytes_of(want), cuts


def test_where_tensors_are_cut():
    """As many bytes as allowed, but whole rows, chunks and strips, and powers of two of them where sums fold."""
    inputs = [(0, 0, BF16.code), (1, 0, F8_E4M3.code), ([(0, 0, 10)], F32.code, array("q"))]
    step = {"kind": "combine", "inputs": inputs, "numel": 10 * CHUNK + 1, "columns": 2000, "sinks": [0, 1],
            "out_dtype": F64.code}  # fmt: skip
    assert pieces.element_bytes(step) == 23
    assert pieces.cut(step, 23 * 7 * CHUNK) == [(0, 7 * CHUNK), (7 * CHUNK, 3 * CHUNK + 1)]
    assert pieces.cut({**step, "numel": 0}, 1) == [(0, 0)]
    for name in ("sinks", "out_dtype"):
        del step[name]
    assert pieces.element_bytes(step) == 7

    def lengths(most: int, **keys: Any) -> set[int]:
        return {count for _, count in pieces.cut({**step, "numel": 1_000_000, **keys}, most)[:-1]}

    for kind in ("measure", "measure_deltas", "kept"):
        assert lengths(7 * (4 * CHUNK - 1), kind=kind) == {2 * CHUNK} and lengths(1, kind=kind) == {CHUNK}
    assert lengths(7 * 11999, kind="measure", per="row") == {10000}
    assert lengths(7 * 11999, kind="divergence") == {10000} and lengths(1, kind="divergence") == {2000}
    assert lengths(7 * 400_000, kind="measure", per="column") == {2 * 64 * 2000}
    assert lengths(7 * 11999, kind="histogram") == {11999 // STRIP * STRIP}


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
    assert pieces.join_stats([first, second]) == [{"nan_in": 3, "sum_pp": 0.75}, {"nan_in": 5, "sum_pp": 3.0}]
    assert pieces.join_stats([[], []]) == []
    assert pieces.join({"kind": "combine"}, [None, None]) is None


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
    keep = {"least": 0, "most": ALL_BITS, "lo": 1 << 31, "hi": 1 << 31, "key": 77}
    data, masks = raws("normal", dtypes, numel), Masks(1, numel)
    inputs = [(i, 0, code(d)) for i, d in enumerate(dtypes)]
    term = {"input": 1, "weight": 0.5, "vote": 0.0, "share": 0.0, "alone": 0.0, "importance": -1, "keep": keep,
            "known": (masks, 0)}  # fmt: skip
    output = {"base": 0, "terms": [term], "votes": False, "divides": False, "alone": False, "least_share": 0.0,
              "other_share": 1.0, "limit": math.inf, "score": None}  # fmt: skip
    step = {"kind": "masked", "inputs": inputs, "numel": numel, "columns": numel, "sinks": [0], "offsets": [0],
            "out_dtype": BF16.code, "masked": [output]}  # fmt: skip
    kept = {"kind": "kept", "inputs": inputs, "numel": numel, "columns": numel, "keeps": [KEEP, keep], "score": None,
            "l1": False, "squares": False, "masks": (masks, [-1, 0])}  # fmt: skip
    sources, sinks = guarded(data), [Guarded(2 * numel, 5) for _ in range(2)]
    with pytest.raises(ValueError, match="none of the masks"):
        run("", [step], memory(sources), memory(sinks[:1]))
    run("", [dict(pieces.for_pump(step))], memory(sources), memory(sinks[:1]))
    assert pieces.for_pump(kept) is kept
    filled = [masks.filled]
    run("", [kept], memory(sources), [])
    assert [*filled, masks.filled] == [False, True] and pieces.for_pump(step) == step
    run("", [step], memory(sources), memory(sinks[1:]))
    assert sinks[0].view.tobytes() == sinks[1].view.tobytes() != data[0].tobytes()


def test_keeps_by_rank_are_told():
    def has(kind: str, lo: int) -> bool:
        keeps = [{**KEEP, "lo": lo, "hi": 1 << 31}] * 2
        return pieces.has_ranks({"kind": kind, "keeps": keeps, "masked": [{"terms": [{"keep": k} for k in keeps]}]})

    assert has("kept", 5) and has("masked", 5)
    assert not has("kept", 1 << 31) and not has("masked", 1 << 31) and not has("measure", 5)
