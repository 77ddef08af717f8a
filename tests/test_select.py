"""Order statistics: the reference against counting."""

from __future__ import annotations

import numpy as np
import pytest

from fastinterp.compute.dtypes import F32
from fastinterp.compute.reference_select import pick, select
from fastinterp.compute.requests import ALL_BITS, Select, Selected


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32).view(np.uint8)


def bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


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
