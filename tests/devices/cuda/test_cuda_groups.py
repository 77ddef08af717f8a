"""CUDA's kernel of sums by row or column, on the host: the bytes of the pump."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from fastinterp.ops.combine import GroupRow, philox_key
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32, F64, MERGING, DType
from fastinterp.ops.requests import GroupCombine
from fastinterp.ops.steps import GroupCombine as CombineStep
from tests.support import backends
from tests.support.devices.cuda_pieces import Rig, addressed, pump_written, written
from tests.support.pumps import code, raws, stored

COUNTS = ("nan_in", "inf_in", "nan_out", "inf_out", "sampled", "changed")
Shape = tuple[int, int]


def row_of(per: str, shape: Shape, n: int, k: int, base: int | None) -> GroupRow:
    """Weights of n inputs by group, some of them 0."""
    rng, groups = np.random.default_rng([n, k, *shape]), shape[0] if per == "row" else shape[1]
    weights = rng.normal(size=(groups, n)) * (rng.random((groups, n)) < 0.8)
    weights[0, -1] = 1e-60  # 0 as float32
    if base is not None:
        weights[:, base] = 0
    row = GroupCombine(array("d", weights.ravel()), n, per, base).row()  # type: ignore[arg-type]
    assert isinstance(row, GroupRow)
    return row


def step_of(per: Any, dtypes: Sequence[DType], out: DType, shape: Shape, rows: Sequence[GroupRow]) -> CombineStep:
    """Into one output per row."""
    return CombineStep(
        inputs=stored(dtypes), numel=math.prod(shape), columns=shape[1], per=per, sinks=tuple(range(len(rows))),
        offsets=(0,) * len(rows), out_dtype=code(out), rows=tuple(rows),
        keys=tuple(philox_key(3, k, "groups") for k in range(len(rows))),
    )  # fmt: skip


def check(
    per: str, dtypes: Sequence[DType], out_dtype: DType, shape: Shape, fill: str = "normal", offset: int = 0,
    most: int = 1 << 30, base: int | None = None, **options: Any,
) -> None:  # fmt: skip
    n, numel = len(dtypes), math.prod(shape)
    rows = [row_of(per, shape, n, 0, base), row_of(per, shape, max(2, n - 1), 1, None)]
    step = step_of(per, dtypes, out_dtype, shape, rows)
    options = {"stats_every": 2, "fp8_saturate": True, **options}
    data = raws(fill, dtypes, numel)
    want, expected = pump_written(step, data, **options)
    got, stats = written(step, data, offset, most, **options)
    for k in range(2):
        backends.assert_same_bits(want[k], got[k], out_dtype, f"{per} {dtypes} {shape}")
        if not options["stats_every"]:
            assert not any(stats[k].values())
            continue
        assert {name: stats[k][name] for name in COUNTS} == {name: expected[k][name] for name in COUNTS}
        for name in ("sum_pp", "sum_dd", "sum_od"):  # the order of a sum is free
            scale = expected[k]["sum_pp"] + expected[k]["sum_dd"] if name == "sum_od" else expected[k][name]
            if math.isfinite(scale) and math.isfinite(expected[k][name]):
                assert stats[k][name] == pytest.approx(expected[k][name], rel=0, abs=1e-11 * scale)


SHAPES = ((1, 1), (7, 1), (1, 7), (100, 3), (3, 331), (65, 64), (3, 16385), (701, 29))
every_per = pytest.mark.parametrize("per", ["row", "column"])


@every_per
@pytest.mark.parametrize(
    "shape", [(1, 1), (7, 1), (1, 7), (100, 3), (3, 331), (65, 64), (3, 16385), (701, 29)], ids=str
)
def test_every_size_in_pieces(shape, per):
    for most in (1, 200_000):
        check(per, [BF16, F32, BF16], BF16, shape, offset=2, most=most, stochastic=most == 1, stats_every=1)


@every_per
@pytest.mark.parametrize("fill", ["patterns", "close"])
@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_every_dtype(dtype, fill, per):
    for out in MERGING:
        check(per, [dtype, BF16, dtype], out, (11, 97), fill, offset=1, fp8_saturate=out is not dtype)
    check(per, [dtype, F16], dtype, (11, 97), fill, base=0, stochastic=True, stats_every=0)


@every_per
def test_many_inputs(per):
    dtypes = [(BF16, F8_E4M3, F32)[i % 3] for i in range(20)]
    check(per, dtypes, F16, (9, 211), base=0)
    check(per, [*dtypes, F64], BF16, (9, 211))


@pytest.mark.parametrize(("per", "first"), [("row", 5), ("row", 331), ("column", 700)])
def test_pieces_begin_anywhere(per, first):
    """In the middle of a row, too."""
    shape, n, count = (13, 97), 3, 400
    dtypes = [BF16] * n
    step = replace(step_of(per, dtypes, F32, shape, [row_of(per, shape, n, 0, None)]), keys=())
    data = raws("normal", dtypes, math.prod(shape))
    want, _ = pump_written(step, data)
    rig = Rig()
    output = rig.put(want[0][: 4 * count] * 0, 4)
    rig.run([addressed(rig, step, data, first, count, 2, outputs=(output,))])
    assert rig.get(output, 4 * count).tobytes() == want[0][4 * first : 4 * (first + count)].tobytes()


def test_what_is_refused():
    row = row_of("row", (2, 3), 2, 0, 0)
    step = step_of("row", [F32, F32], F32, (2, 3), [row])
    rig = Rig()
    output = rig.put(np.zeros(24, "u1"), 0)
    piece = addressed(rig, step, raws("normal", [F32, F32], 6), 0, 6, 0, outputs=(output,))
    for rows, words in (
        ((), "as many outputs"),
        ((dataclasses.replace(row, pivot=5),), "pivot"),
        ((dataclasses.replace(row, inputs=(2,)),), "term"),
        ((dataclasses.replace(row, totals=row.totals[:1], weights=row.weights[:1]),), "a total and a weight"),
        ((dataclasses.replace(row, totals=row.totals[:1]),), "buffer of 1 float64"),
        ((dataclasses.replace(row, totals=array("f", row.totals)),), "contiguous buffer of float64"),
    ):
        with pytest.raises(ValueError, match=words):
            rig.run([replace(piece, step=replace(step, rows=rows))])
