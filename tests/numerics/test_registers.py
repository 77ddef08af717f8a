"""Sums in one pass over registers: the bytes and counts of the tiles, up to the edges of every dtype."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fastinterp.ops.combine import Row
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, DType
from tests.support import backends
from tests.support.cases import Guarded, fill

SMALL = [F32, F16, BF16, F8_E4M3, F8_E5M2]
vectors = pytest.mark.parametrize("isa", [isa for isa in backends.usable() if isa != "scalar"])
# As float32 bits: around the halves between the largest finite number of a dtype and what would follow it, and NaN
# whose payload a carry would run through.
EDGES = [
    edge + step
    for edge in (0x477FF000, 0x7F7F8000, 0x7F7FFFFF, 0x43E00000, 0x43E80000, 0x47600000, 0x47700000, 0x43F00000)
    for step in (-1, 0, 1)
] + [0x7FFFFFFF, 0x7FC0FFF0, 0x7F800001, 0x7FC00000, 0x7F800000, 0x74FFFFFF, 0x75000000, 0x00000001, 0x007FFFFF]


def check(isa: str, raws: list[np.ndarray], dtypes: list[DType], rows: list[Row], out: DType, **options: Any) -> None:
    """The rows by `isa`, streamed or not, and by the plain loops of `scalar`, which has no pass over registers."""
    inputs = [Guarded(raw.size, 16 * i) for i, raw in enumerate(raws)]
    for buffer, raw in zip(inputs, raws, strict=True):
        buffer.view[:] = raw
    size = raws[0].size // (dtypes[0].bits // 8) * (out.bits // 8)
    want, plain, streamed = ([Guarded(size, 0) for _ in rows] for _ in range(3))
    counts = backends.run("scalar", inputs, dtypes, rows, want, out, stats_every=0, **options)
    for buffers, way in ((plain, False), (streamed, True)):
        found = backends.run(isa, inputs, dtypes, rows, buffers, out, stats_every=0, streamed=way, **options)
        for k, buffer in enumerate(buffers):
            backends.assert_same_bits(want[k].view, buffer.view, out, f"row {k}, streamed: {way}")
            assert buffer.intact()
        assert found == counts


@vectors
@pytest.mark.parametrize("out", SMALL, ids=str)
@pytest.mark.parametrize("saturate", [True, False])
def test_edges_of_every_dtype(isa, out, saturate):
    """Each edge alone among ordinary numbers, of either sign, at a place of its own."""
    for sign, (place, edge) in itertools.product((0, 1 << 31), enumerate(EDGES)):
        values = np.linspace(-3, 3, 256, dtype=np.float32)
        values.view(np.uint32)[5 * place + 1] = edge | sign
        pivot = np.zeros(256, np.float32)
        check(isa, [pivot.view("u1"), values.view("u1")], [F32, F32], [Row(0, 1.0, ((1, 1.0),))], out,
              fp8_saturate=saturate)  # fmt: skip


@vectors
@pytest.mark.parametrize("dtype", SMALL, ids=str)
@pytest.mark.parametrize("out", SMALL, ids=str)
def test_all_codes(isa, dtype, out):
    """Every code of a dtype of up to 16 bits, every exponent of the wide one, as pivot and as other input."""
    width = dtype.bits // 8
    codes = np.arange(1 << min(dtype.bits, 16), dtype=f"u{width}") << (16 if dtype is F32 else 0)
    codes = np.concatenate([codes, codes])  # and a whole number of steps
    raws = [np.roll(codes, by).view("u1") for by in (0, 1, 77)]
    for weights in ((0.5,), (0.25, -0.5)):
        row = Row(0, 1.0 if len(weights) == 1 else 0.75, tuple(enumerate(weights, 1)))
        check(isa, raws[: len(weights) + 1], [dtype] * (len(weights) + 1), [row], out)


@vectors
@pytest.mark.parametrize("out", [F8_E4M3, F8_E5M2], ids=str)
@pytest.mark.parametrize("saturate", [True, False])
def test_rounding_to_fp8(isa, out, saturate):
    """Each upper half of a float32, with lower halves that show ties and what is next to them."""
    uppers = np.arange(1 << 16, dtype=np.uint32) << 16
    values = np.concatenate([uppers | lower for lower in (0x0000, 0x0001, 0x8000, 0xFFFF)]).view("u1")
    zeros = np.zeros_like(values)
    check(isa, [zeros, values], [F32, F32], [Row(0, 1.0, ((1, 1.0),))], out, fp8_saturate=saturate)


@vectors
@pytest.mark.parametrize("dtype", [F8_E4M3, F8_E5M2], ids=str)
@pytest.mark.parametrize("saturate", [True, False])
@pytest.mark.parametrize("weight", [0.5, 0.3, -1.5, 2.0**-140, 2.0**125])
def test_every_pair_of_fp8_codes(isa, dtype, saturate, weight):
    """All pairs, of numbers alone and with NaN and infinities among them, at ordinary weights and at extreme ones."""
    codes = np.arange(256, dtype=np.uint8)
    numbers = codes[(codes & 0x7F) < (0x7F if dtype is F8_E4M3 else 0x7C)]
    for some in (numbers, codes):
        pairs = [np.repeat(some, some.size), np.tile(some, some.size)]
        rows = [Row(0, total, ((1, weight),)) for total in (1.0, 0.9)]
        for together in (rows[:1], rows[1:], rows):
            check(isa, pairs, [dtype, dtype], together, dtype, fp8_saturate=saturate)


@vectors
@pytest.mark.parametrize("n", [2, 3, 8, 9, 64])
@pytest.mark.parametrize("out", SMALL, ids=str)
def test_mixed_dtypes_and_lengths(isa, n, out):
    """Inputs of different dtypes; lengths around a step; a part that begins within a chunk."""
    dtypes = [SMALL[i % len(SMALL)] for i in range(n)]
    for numel in (1, 31, 32, 63, 64, 65, 500, 20000):
        raws = [
            fill("normal", dtype, numel, i, np.random.default_rng([numel, i])).view(np.uint8)
            for i, dtype in enumerate(dtypes)
        ]
        row = Row(n // 2, -0.5, tuple((i, 1 / n) for i in range(n) if i != n // 2))
        check(isa, raws, dtypes, [row], out, first=16384 - 40)


def _rows(n: int) -> list[Row]:
    """More than one pass makes: all inputs, some of them, another order, other pivots, copies between them."""
    all_of = [tuple((i, (1 + i * k / 8) / n) for i in range(1, n)) for k in range(9)]
    found = [Row(0, 1.0 if k % 3 else 0.75, terms) for k, terms in enumerate(all_of)]
    found[2:2] = [Row(0), Row(0, 1.0, ((n - 1, -0.5),)), Row(0, 1.0, all_of[1][::-1])]
    return [*found, Row(1), Row(1, 1.0, ((0, 0.25),)), Row(0, -1.0, ((1, 0.25),)), Row(1, 2.0, ((0, -0.25),))]


@vectors
@pytest.mark.parametrize("n", [2, 3, 8, pytest.param(64, marks=pytest.mark.slow(5))])
@pytest.mark.parametrize("out", SMALL, ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_rows_of_one_pivot(isa, n, out, mixed):
    """Many rows at once, as many as a pass makes, and more; inputs of one dtype, and of several."""
    dtypes = [SMALL[i % len(SMALL)] if mixed else out for i in range(n)]
    for numel in (63, 64, 500, 20000):
        raws = [
            fill("normal", dtype, numel, i, np.random.default_rng([numel, i])).view(np.uint8)
            for i, dtype in enumerate(dtypes)
        ]
        for rows in (_rows(n)[:2], _rows(n)[:8], _rows(n)):
            check(isa, raws, dtypes, rows, out, first=16384 - 40)


@vectors
@pytest.mark.parametrize("out", SMALL, ids=str)
def test_rows_that_are_not_finite(isa, out):
    """NaN and Inf in every row, in one alone, and in one of the second pass alone: counted once, nothing is stale."""
    numel = 4096
    raws = [fill("normal", out, numel, i, np.random.default_rng(i)).view(np.uint8) for i in range(4)]
    odd = fill("patterns", out, 64, 0, np.random.default_rng(9)).view(np.uint8)
    for at, raw in enumerate(raws):
        raw[(640 + 300 * at) * (out.bits // 8) :][: odd.size] = odd
    rows = [Row(0, 1.0, ((1, 0.5),))] * 9 + [Row(0, 1.0, ((2, 0.5),)), Row(0, 1.0, ((3, 3e38),))]
    for some in (rows, rows[::-1], rows[-2:]):
        check(isa, raws, [out] * 4, some, out)


@vectors
def test_a_row_has_as_many_terms_as_a_call_has_inputs_at_most(isa):
    values = [np.full(256, i, np.float32).view("u1") for i in (1, 2)]
    for terms in (64, 65):
        row = Row(0, 1.0, ((1, 0.25),) * terms)
        if terms == 64:
            check(isa, values, [F32, F32], [row], F32)
        else:
            with pytest.raises(ValueError, match="a row has at most 64 terms, got 65"):
                check(isa, values, [F32, F32], [row], F32)
