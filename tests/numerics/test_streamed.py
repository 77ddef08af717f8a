"""Outputs stored around the caches: the bytes and statistics of those that are not, and nothing beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16, F32, DType
from fastinterp.ops.steps import Combine as CombineStep
from tests.support import backends, pumps
from tests.support.cases import ALPHAS, Guarded, fill

every_isa = pytest.mark.parametrize("isa", backends.usable())
SWEEP = [Row(0, 1.0, ((1, a),)) for a in ALPHAS if a] * 2  # more than are made of one load


def check(isa: str, raws: list[np.ndarray], dtype: DType, rows: list[Row], at: list[int], **options: Any) -> None:
    """The rows, each output `at` so many bytes from a line: streamed or not, the same."""
    inputs = [Guarded(raw.size, 16 * i) for i, raw in enumerate(raws)]
    for buffer, raw in zip(inputs, raws, strict=True):
        buffer.view[:] = raw
    plain, streamed = ([Guarded(raws[0].size, at[k % len(at)]) for k in range(len(rows))] for _ in range(2))
    dtypes = [dtype] * len(raws)
    want = backends.run(isa, inputs, dtypes, rows, plain, dtype, streamed=False, **options)
    got = backends.run(isa, inputs, dtypes, rows, streamed, dtype, streamed=True, **options)
    for k in range(len(rows)):
        backends.assert_same_bits(plain[k].view, streamed[k].view, dtype, f"row {k}")
        assert streamed[k].intact(), f"row {k}: bytes beside the output were written"
    assert [stats(s) for s in got] == [stats(s) for s in want]


def stats(found: dict[str, float]) -> dict[str, str]:
    """As text, where a NaN equals itself."""
    return {name: repr(value) for name, value in found.items()}


def raws(dtype: DType, numel: int, kind: str = "normal", count: int = 2) -> list[np.ndarray]:
    return [fill(kind, dtype, numel, i, np.random.default_rng([numel, i])).view(np.uint8) for i in range(count)]


@every_isa
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("at", [[0], [16], [4], [62], [1], [0, 0, 4], [3, 20, 35]], ids=str)
@pytest.mark.parametrize("numel", [15, 16, 31, 32, 33, 511, 512, 513, 16384, 40001])
def test_pairs_at_any_address(isa, dtype, at, numel):
    """Whole lines and what is left before and behind them; outputs that begin lines together, and that do not."""
    for rows in (SWEEP[:1], SWEEP[:3], SWEEP):
        check(isa, raws(dtype, numel), dtype, rows, at, stats_every=0)


@every_isa
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("kind", ["patterns", "huge", "subnormal", "close"])
def test_numbers_of_every_kind(isa, dtype, kind):
    """NaN, infinities and overflow anywhere, and counted; tiles with and without them, sampled and not."""
    mixed = raws(dtype, 65536)
    for raw, odd in zip(mixed, raws(dtype, 65536, kind), strict=True):
        raw[20000:40000] = odd[20000:40000]
    for first in (0, 16384 - 100):
        check(isa, mixed, dtype, [*SWEEP[:4], Row(1), Row(0, -0.75, ((1, 0.5),))], [32], stats_every=2, first=first)


@every_isa
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("weight", [2.0**20, -(2.0**20), 2.0**21, 1e38, 1e-40])
@pytest.mark.parametrize("place", ["weight", "total"])
def test_weights_of_every_size(isa, dtype, weight, place):
    """Large weights overflow numbers that are not large themselves."""
    row = Row(0, 1.0, ((1, weight),)) if place == "weight" else Row(0, weight, ((1, 0.5),))
    width = dtype.bits // 8
    ascending = np.geomspace(2.0**80, 2.0**126, 8192).astype(np.float32)  # tiles that may overflow, and that may not
    large = []
    for x in (ascending, -ascending):
        codes = x.view(np.uint32) if dtype is F32 else x.view(np.uint32) >> 16
        large.append(codes.astype(f"u{width}").view(np.uint8))
    for inputs in (raws(dtype, 4096), large):
        check(isa, inputs, dtype, [row], [0], stats_every=0)
        check(isa, inputs, dtype, [SWEEP[0], row], [0], stats_every=0)


@every_isa
def test_rows_that_are_not_all_of_one_pair(isa):
    """Other inputs, more terms, copies: between pairs and alone."""
    three = raws(BF16, 5000, count=3)
    pair, other = SWEEP[0], Row(0, 1.0, ((2, 0.3),))
    sums, swapped = Row(0, 1.0, ((1, 0.3), (2, -0.5))), Row(1, 1.0, ((0, 0.3),))
    for rows in (
        [pair, other],
        [pair, swapped],
        [pair, sums],
        [Row(2), pair, Row(0)],
        [Row(2)],
        [Row(2), sums],
        [sums],
    ):
        check(isa, three, BF16, rows, [0], stats_every=0)


@every_isa
@pytest.mark.parametrize("streams", [False, True])
def test_outputs_of_the_pump_in_memory(isa, streams):
    """Two outputs, below and above the size from which they are streamed."""
    numel = (8 << 20) + (12345 if streams else -12345)  # of 2 bytes, for each of two
    data = np.random.default_rng(0).integers(0x3C00, 0x3F00, (2, numel), np.uint16).view(np.uint8)
    inputs = pumps.guarded([*data])
    got, want = ([Guarded(2 * numel, 16) for _ in range(2)] for _ in range(2))
    backends.run(isa, inputs, [BF16] * 2, SWEEP[:2], want, BF16, streamed=False, stats_every=0)
    step = CombineStep(
        inputs=pumps.stored([BF16] * 2), numel=numel, sinks=(0, 1), offsets=(0, 0), out_dtype=pumps.code(BF16),
        rows=tuple(SWEEP[:2]),
    )  # fmt: skip
    pumps.run(isa, [step], pumps.memory(inputs), pumps.memory(got), read_bytes=65536, write_bytes=131072)
    for k in range(2):
        backends.assert_same_bits(want[k].view, got[k].view, BF16, f"output {k}")
        assert got[k].intact()
