"""Sums as plain values, as receipts have them: the same sum comes back; and nothing in a damaged one is trusted."""

from __future__ import annotations

import json
from array import array

import pytest

from fastinterp.ops.combine import Combine
from fastinterp.ops.plain_sums import LARGEST, plain_sum, sum_of
from fastinterp.ops.requests import GroupCombine, Mask, MaskedCombine, Score, Sum

GROUPS = {"row": 3, "column": 5}
SUMS: dict[str, Sum] = {
    "plain": Combine((1 / 3, -2e-300, 0.7)),
    "base": Combine((0.0, 0.1, 5e-324), base=0),
    "pivot": Combine((0.25, 0.75, 0.0), sums_to_one=True, pivot=1),
    "rows": GroupCombine(array("d", [0.1, 0.2, 0.7] * 3), 3, "row", None, True),
    "columns": GroupCombine(array("d", [0.0, 0.2, 1 / 3] * 5), 3, "column", 0),
    "masks": MaskedCombine((0.0, 1 / 3, 0.5), (Mask(), Mask(7), Mask(1, 99, 0.3, 0.1)), sign_weights=(0.0, 1.0, 2.0)),
    "shares": MaskedCombine((0.0, 1.0, 1.0), shares=(0.0, 0.5, 0.5), least_share=1e-8, other_share=2.0, limit=0.25),
    "score": MaskedCombine((0.0, 1.0), (Mask(), Mask()), score=Score("divergence", bytes(range(12)), 3)),
    "importance": MaskedCombine((0.5, 0.5), importance=(2, 2)),
    "sole": MaskedCombine((0.0, 0.5, 0.5), sole_weights=(0.0, 1.0, 1.0)),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_same_sum_comes_back(name):
    text = json.dumps(plain_sum(SUMS[name]), allow_nan=False)
    assert sum_of(json.loads(text), 3, GROUPS) == SUMS[name]


def test_large_ones_have_no_plain_form():
    """Weights by row of 64 KiB, and no more, are stored."""
    rows = LARGEST // 8
    assert plain_sum(GroupCombine(array("d", [0.5] * rows), 1, "row")) is not None
    assert plain_sum(GroupCombine(array("d", [0.5] * (rows + 1)), 1, "row")) is None
    assert plain_sum(MaskedCombine((0.0, 1.0), score=Score("divergence", bytes(LARGEST + 1)))) is None


DAMAGED = {
    "no object": [1],
    "no kind": {},
    "two kinds": {"combine": {"weights": [1.0]}, "masked": {"weights": [0.0]}},
    "unknown kind": {"eval": {}},
    "unknown content": {"combine": 3},
    "no weights": {"combine": {}},
    "empty weights": {"combine": {"weights": []}},
    "words": {"combine": {"weights": ["a"]}},
    "too many inputs": {"combine": {"weights": [0.25] * 4}},
    "infinite": {"combine": {"weights": [1e999, 0.5]}},
    "beyond float32": {"masked": {"weights": [0.0, 1e300]}},
    "base out of range": {"combine": {"weights": [0.5, 0.5], "base": 7}},
    "base with a weight": {"combine": {"weights": [0.5, 0.5], "base": 0}},
    "pivot out of range": {"combine": {"weights": [0.5, 0.5], "pivot": -1}},
    "masks of another length": {"masked": {"weights": [0.0, 0.5], "masks": [{}]}},
    "base of a mask": {"masked": {"weights": [0.5, 0.5]}},
    "bits": {"masked": {"weights": [0.0, 0.5], "masks": [{}, {"min_bits": 2**40}]}},
    "negative bits": {"masked": {"weights": [0.0, 0.5], "masks": [{}, {"min_bits": -1}]}},
    "probability": {"masked": {"weights": [0.0, 0.5], "masks": [{}, {"probability": 2.0}]}},
    "importance out of range": {"masked": {"weights": [0.5, 0.5], "importance": [9, 9]}},
    "factors of other rows": {"masked": {"weights": [0.0, 0.5], "score": {"kind": "divergence", "factors": "AAAA"}}},
    "kind of score": {"masked": {"weights": [0.0, 0.5], "score": {"kind": "other"}}},
    "other groups": {"groups": {"weights_f64": "AAAAAAAA8D8=", "n": 1, "per": "row"}},
    "cut weights": {"groups": {"weights_f64": "AAAA", "n": 1, "per": "row"}},
    "no base64": {"groups": {"weights_f64": "%%%", "n": 1, "per": "row"}},
    "per": {"groups": {"weights_f64": "AAAAAAAA8D8=", "n": 1, "per": "tensor"}},
    "none": {"groups": {"weights_f64": "", "n": 0, "per": "row"}},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_ones_are_refused(name):
    with pytest.raises(ValueError):
        sum_of(DAMAGED[name], 3, GROUPS)
