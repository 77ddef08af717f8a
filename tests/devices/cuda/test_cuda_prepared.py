"""Sums that are prepared once and run with many rows, by the emulated CUDA sources: the bytes of pieces made anew."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from fastinterp.backends.device import Piece
from fastinterp.backends.prepared import PreparedPieces
from fastinterp.errors import OutOfMemory
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Combine as CombineStep
from fastinterp.ops.steps import Measure
from tests.support.devices.emulated import deferred_cuda

F64, F32, F16, BF16 = 0, 1, 2, 3
ROWS = [
    Combine((0.25, 0.5, -1.5)).row(),
    Combine((0.0, 0.7, 0.1), base=0).row(),
    Combine((0.3, 0.0, 0.7), sums_to_one=True).row(),
    Row(2),
    Row(1, total=0.5),
]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Device 0 of an emulated runtime, which does nothing before it is waited for."""
    device, runtime = deferred_cuda(monkeypatch)
    device.runtime = runtime
    yield device
    assert runtime.wrong() == ""


class Models:
    """Models of tensors of some dtypes in memory of the host, and a place for each sum."""

    def __init__(self, shapes: list[tuple[int, int, int]], inputs: int = 3):
        """shapes: number of elements, dtype code, bytes behind a multiple of 16; of each tensor."""
        rng = np.random.default_rng(5)
        self._held: list[np.ndarray] = []
        self.outs: list[np.ndarray] = []
        self.pieces: list[Piece] = []
        for numel, code, off in shapes:
            arrays = [self._array(rng, numel, code, off) for _ in range(inputs + 1)]
            self.outs.append(arrays[inputs])
            step = CombineStep(
                inputs=tuple(Stored(i, 0, code) for i in range(inputs)), numel=numel, sinks=(0,), offsets=(0,),
                out_dtype=code, rows=(Row(0),),
            )  # fmt: skip
            places = [array.ctypes.data for array in arrays]
            self.pieces.append(Piece(step=step, inputs=tuple(places[:inputs]), outputs=(places[inputs],), numel=numel))

    def _array(self, rng: np.random.Generator, numel: int, code: int, off: int) -> np.ndarray:
        size = numel * CODE_BYTES[code]
        self._held.append(rng.integers(0, 256, size + 64, dtype=np.uint8))
        start = -self._held[-1].ctypes.data % 16 + off
        return self._held[-1][start : start + size]

    def sums(self, prepared: Any, queue: Any, row: Row) -> list[bytes]:
        for out in self.outs:
            out[:] = 255
        prepared.run(queue, row)
        queue.record().wait()
        return [out.tobytes() for out in self.outs]


MIXED = [(257, BF16, 0), (8, F32, 0), (31, F16, 2), (9, F64, 0), (0, BF16, 0), (64, BF16, 1)]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_bytes_of_pieces(cuda, row):
    models, queue = Models(MIXED), cuda.queue()
    want = models.sums(PreparedPieces(models.pieces), queue, row)
    prepared = cuda.prepare(models.pieces)
    models.sums(prepared, queue, ROWS[0])  # another row before
    assert models.sums(prepared, queue, row) == want


@pytest.mark.parametrize(("count", "by_pieces"), [(1, 1), (40, 1), (600, 2)])
def test_one_launch_whatever_their_number(cuda, count, by_pieces):
    """Pieces are arguments of their launch, in one with little room or much, or in two; a table is on the device."""
    models, queue = Models([(33, BF16, 0)] * count), cuda.queue()
    before = cuda.runtime.calls("launch")
    want = models.sums(PreparedPieces(models.pieces), queue, ROWS[1])
    between = cuda.runtime.calls("launch")
    assert models.sums(cuda.prepare(models.pieces), queue, ROWS[1]) == want
    assert between - before == by_pieces
    assert cuda.runtime.calls("launch") - between == 1
    alone = Models([(33, BF16, 0)])  # the same numbers as the first
    assert alone.sums(cuda.prepare(alone.pieces), queue, ROWS[1])[0] == want[0]


@pytest.mark.parametrize("code", [BF16, F16, F32])
@pytest.mark.parametrize("inputs", range(1, 10))
def test_any_number_of_inputs_and_tiles(cuda, inputs, code):
    """Tensors of several tiles, with a rest or none, in any order of the inputs; of nine inputs, without a table."""
    per_vector, tile = (4, 2048 * 4) if code == F32 else (8, 2048 * 8)
    shapes = [(n, code, 0) for n in (1, per_vector - 1, tile, tile + 1, 2 * tile + per_vector + 3, tile - per_vector)]
    models, queue = Models(shapes, inputs), cuda.queue()
    order = [(3 * i + 1) % inputs if inputs % 3 else inputs - 1 - i for i in range(inputs)]
    row = Row(order[0], total=0.75, terms=tuple((i, 0.25 * (k - 2)) for k, i in enumerate(order[1:])))
    assert models.sums(cuda.prepare(models.pieces), queue, row) == models.sums(
        PreparedPieces(models.pieces), queue, row
    )


def test_a_run_carries_weights_alone(cuda):
    """The table was sent when it was prepared: a run copies nothing, and its memory goes with it."""
    models, queue = Models([(33, BF16, 0), (8, F32, 0)]), cuda.queue()
    used, copies = cuda.runtime.used(), cuda.runtime.calls("cudaMemcpyAsync")
    prepared = cuda.prepare(models.pieces)
    assert cuda.runtime.used() - used == 2 * 8 * (3 + 3)  # of each: tile, elements, output, three inputs
    assert cuda.runtime.calls("cudaMemcpyAsync") - copies == 2
    prepared.run(queue, ROWS[0])
    prepared.run(queue, ROWS[1])
    assert cuda.runtime.calls("cudaMemcpyAsync") - copies == 2
    del prepared  # though the device has not done them yet
    assert cuda.runtime.used() == used
    queue.record().wait()
    assert [out.tobytes() for out in models.outs] == models.sums(PreparedPieces(models.pieces), queue, ROWS[1])


def test_a_graph_outlives_its_table(cuda):
    """Launches that are captured carry all addresses, as many as fit into each, and read no memory of the table."""
    models, queue = Models([(33, BF16, 0)] * 600), cuda.queue()
    prepared = cuda.prepare(models.pieces)
    want = models.sums(prepared, queue, ROWS[1])
    before = cuda.runtime.calls("launch")
    cuda.runtime.capture(queue.handle, True)
    assert models.sums(prepared, queue, ROWS[1]) == want
    cuda.runtime.capture(queue.handle, False)
    assert cuda.runtime.calls("launch") - before == 2


def test_no_memory_for_a_table_is_an_error(cuda):
    models = Models(MIXED)
    cuda.runtime.fail("cudaMalloc", cuda.runtime.MEMORY_ALLOCATION)
    with pytest.raises(OutOfMemory, match="cudaMalloc failed on cuda:0, 48 bytes"):
        cuda.prepare(models.pieces)


def test_threads_that_share_it_do_not_mix_rows(cuda):
    models, queue = Models(MIXED), cuda.queue()
    prepared = cuda.prepare(models.pieces)
    every = {tuple(models.sums(prepared, queue, row)) for row in ROWS}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda row: prepared.run(queue, row), ROWS * 20))
    queue.record().wait()
    assert tuple(out.tobytes() for out in models.outs) in every


def test_nothing_is_allocated_so_graphs_can_hold_it(cuda):
    models, queue = Models(MIXED), cuda.queue()
    prepared = cuda.prepare(models.pieces)
    prepared.run(queue, ROWS[0])
    before = [cuda.runtime.calls(call) for call in ("cudaMallocAsync", "cudaMalloc", "cudaHostAlloc")]
    prepared.run(queue, ROWS[1])
    assert [cuda.runtime.calls(call) for call in ("cudaMallocAsync", "cudaMalloc", "cudaHostAlloc")] == before
    queue.record().wait()


def test_what_cannot_be_prepared_is_refused(cuda):
    models, queue = Models(MIXED[:1]), cuda.queue()
    (piece,) = models.pieces
    measured = Piece(step=Measure(inputs=piece.step.inputs, numel=piece.numel), inputs=piece.inputs, numel=piece.numel)
    sampled = Piece(step=piece.step, inputs=piece.inputs, outputs=piece.outputs, numel=piece.numel, stats_every=32)
    for wrong in (measured, sampled):
        with pytest.raises(ValueError, match="sums of one output each, without statistics"):
            cuda.prepare([wrong])
    with pytest.raises(ValueError, match="a row's term is none of the inputs"):
        cuda.prepare([piece]).run(queue, Row(0, terms=((3, 1.0),)))
    cuda.prepare([]).run(queue, ROWS[0])  # no tensors at all
