"""CUDA's kernels of measures, on the host: the answers of the pump, to the bit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from fastinterp.backends.device import Piece
from fastinterp.errors import OutOfMemory
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING
from fastinterp.ops.steps import Measure
from tests.support.devices.cuda_pieces import answers, pump_answers, same
from tests.support.devices.emulated import deferred_cuda
from tests.support.pumps import raws, stored


def step_of(kind: str, per: Any, dtypes: Any, shape: tuple[int, ...]) -> Measure:
    deltas = kind == "measure_deltas"
    return Measure(inputs=stored(dtypes), numel=math.prod(shape), columns=max(1, shape[-1]), deltas=deltas, per=per)


def check(kind: str, per: str, dtypes: Any, shape: tuple[int, ...], fill: str = "normal", **cut: int) -> None:
    data = raws(fill, dtypes, math.prod(shape))
    step = step_of(kind, per, dtypes, shape)
    assert same(answers(step, data, **cut), pump_answers(step, data))


SHAPES = (
    (0,), (1,), (7,), (255,), (256,), (257,), (16383,), (16384,), (16385,), (40009,), (0, 5), (7, 1), (100, 3),
    (65, 257), (3, 16385), (129, 300), (64 * 17, 5),
)  # fmt: skip


@pytest.mark.parametrize("per", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_size(shape, per):
    check("measure_deltas", per, [BF16, F32, BF16], shape)
    check("measure", per, [BF16, BF16], shape, offset=3)


@pytest.mark.parametrize("kind", ["measure", "measure_deltas"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 13])
def test_any_number_of_inputs(n, kind):
    for per in ("tensor", "column"):
        check(kind, per, [(BF16, F16, F32)[i % 3] for i in range(n)], (65, 130), offset=n % 3)
    check(kind, "row", [(F64, BF16)[i % 2] for i in range(n)], (2, 333))


@pytest.mark.parametrize("offset", [0, 1, 2, 8])
@pytest.mark.parametrize("dtype", MERGING, ids=str)
@pytest.mark.parametrize("fill", ["patterns", "close"])
def test_every_dtype_at_every_alignment(fill, dtype, offset):
    """Sums of many patterns are NaN; those of rows are of a few patterns each."""
    for per, shape in (("tensor", (1, 811)), ("row", (40, 7)), ("column", (7, 40))):
        check("measure", per, [dtype, dtype], shape, fill, offset=offset)
        check("measure_deltas", per, [dtype, F8_E5M2], shape, fill, offset=offset)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_whole_units(dtype, n):
    """Of one dtype, that end with a whole unit: in the first lines that are staged, in later ones, in every row."""
    for kind in ("measure", "measure_deltas"):
        for numel in (8, 248, 2048, 8200, 16376, 33 * 256 + 16):
            check(kind, "tensor", [dtype] * n, (numel,))
        check(kind, "row", [dtype] * n, (3, 4104))
        check(kind, "column", [dtype] * n, (70, 264))


@pytest.mark.parametrize("per", ["tensor", "row", "column"])
def test_tiny_float64(per):
    """Products that vanish leave a sum of -0, which the elements behind the last one must not turn."""
    shape = (2, 300)
    tiny = np.full(600, 1e-170)
    data = [tiny.view(np.uint8), (-tiny).view(np.uint8)]
    step = step_of("measure", per, [F64, F64], shape)
    assert same(answers(step, data), pump_answers(step, data))


@pytest.mark.parametrize("most", [1, 200_000, 1_000_000])
@pytest.mark.parametrize("per", ["tensor", "row", "column"])
def test_pieces_fold_to_the_tensor(per, most):
    check("measure_deltas", per, [BF16, F8_E4M3, F16], (331, 107), most=most)
    check("measure", per, [F32, F32], (3, 33_001), most=most)


# --- memory of measures by column ------------------------------------------------------------------------------------


def by_columns(cuda: Any, limit: int, n: int, shape: tuple[int, int]) -> int:
    """The launches of a measure by column of `n` inputs on a device of so many bytes, once its answer is checked."""
    device, runtime = cuda
    runtime.reset(runtime.DEFERRED, 1, limit)
    step = step_of("measure", "column", [BF16] * n, shape)
    data = raws("normal", [BF16] * n, math.prod(shape))
    queue = device.queue()
    piece = Piece(step=step, inputs=tuple(raw.ctypes.data for raw in data), numel=math.prod(shape))
    (pending,) = queue.run([piece])
    queue.record().wait()
    assert same(pending.answer(), pump_answers(step, data))
    assert runtime.wrong() == "" and runtime.used() == 0
    return int(runtime.calls("launch"))


def test_columns_are_measured_some_at_a_time(monkeypatch):
    """Blocks of rows have 64 MB of sums at most: of 13 inputs, 104 sums and 13 counts, those of 71,000 columns."""
    assert by_columns(deferred_cuda(monkeypatch), 1 << 30, 13, (1, 72_000)) == 2


@pytest.mark.parametrize(("room", "passes"), [(1100, 1), (1099, 3), (512, 3), (511, 5), (256, 5)])
def test_less_memory_is_more_passes_over_columns(monkeypatch, room, passes):
    """Of 1100 columns. room: columns of which there are bytes for the sums of two blocks of rows and of both."""
    sums = 8 * (3 + 2 + 2)
    cuda = deferred_cuda(monkeypatch)
    assert by_columns(cuda, sums * (1100 + 3 * room), 2, (65, 1100)) == 2 * passes  # each measures and folds


def test_too_little_memory_for_256_columns_is_an_error(monkeypatch):
    sums = 8 * (3 + 2 + 2)
    with pytest.raises(OutOfMemory, match="cudaMallocAsync failed on cuda:0, 43008 bytes"):
        by_columns(deferred_cuda(monkeypatch), sums * (1100 + 3 * 255), 2, (65, 1100))
