"""How CUDA's combine puts pieces into launches, emulated on the host. More of its bytes: test_same_bits.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from fastinterp import _C
from fastinterp.backends.device import Piece
from fastinterp.errors import BackendError, OutOfMemory
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32, F64, DType
from fastinterp.ops.operands import Decoder, Stored
from fastinterp.ops.steps import Divergence, Measure
from tests.numerics.test_same_bits import Wall
from tests.support.backends import assert_same_bits
from tests.support.cases import Guarded
from tests.support.devices import cuda_host
from tests.support.devices.cuda_combine import piece_of
from tests.support.pumps import code, raws, stored

if why := cuda_host.missing():
    pytest.skip(why, allow_module_level=True)

HALF = Combine((0.5, 0.5), sums_to_one=True).row()


class Rig:
    """A queue of an emulated device, and sums of arrays that lie anywhere: an emulated kernel reads any address."""

    def __init__(self, mode: int = cuda_host.Fake.DEFERRED) -> None:
        self.fake = cuda_host.fake()
        self.fake.reset(mode)
        self.device = cuda_host.module().Device(0)
        self.queue = self.device.queue()

    def run(self, pieces: Sequence[Piece]) -> list[list[dict[str, float]]]:
        """The statistics of each piece."""
        pending = self.queue.run(pieces)
        self.queue.record().wait()
        assert self.fake.wrong() == ""
        return [p.stats() for p in pending]


class Case:
    """Inputs, rows and guarded outputs of one piece."""

    def __init__(
        self,
        dtype: DType,
        n: int,
        rows: Sequence[Row],
        numel: int,
        offset: int = 0,
        kind: str = "patterns",
        **more: Any,
    ) -> None:
        self.dtype, self.rows, self.numel = dtype, list(rows), numel
        self.inputs = [Guarded(raw.size, offset) for raw in raws(kind, [dtype] * n, numel)]
        for held, raw in zip(self.inputs, raws(kind, [dtype] * n, numel), strict=True):
            held.view[:] = raw
        self.outputs = [Guarded(numel * dtype.bits // 8, offset) for _ in rows]
        self.more = more

    def piece(self) -> Piece:
        return piece_of(
            [x.address for x in self.inputs], [self.dtype] * len(self.inputs), self.rows,
            [x.address for x in self.outputs], out_dtype=code(self.dtype), numel=self.numel, **self.more,
        )  # fmt: skip

    def check(self) -> list[dict[str, float]]:
        """The bytes are those of the CPU. Returns its statistics."""
        wanted = [Guarded(x.view.size, 0) for x in self.outputs]
        given = self.piece()
        stats = _C.combine(
            list(given.inputs), list(given.codes), self.rows, [x.address for x in wanted], code(self.dtype), self.numel,
            stats_every=self.more.get("stats_every", 0),
        )  # fmt: skip
        for j, (want, got) in enumerate(zip(wanted, self.outputs, strict=True)):
            assert_same_bits(want.view, got.view, self.dtype, f"row {j}")
            assert got.intact()
        return stats


def test_a_model_of_291_tensors_is_one_launch_without_memory():
    rig = Rig()
    cases = [Case(BF16, 2, [HALF], 1 + 37 * i % 700) for i in range(291)]
    rig.run([case.piece() for case in cases])
    assert (rig.fake.calls("launch"), rig.fake.calls("cudaMallocAsync")) == (1, 0)
    for case in cases:
        case.check()


@pytest.mark.parametrize("offset", [0, 1])
def test_what_does_not_fit_becomes_several_launches(offset):
    rig = Rig()
    cases = [Case(F16, 3, [Row(0, 1.0, ((1, 0.2), (2, 0.3)))], i % 50, offset) for i in range(900)]
    rig.run([case.piece() for case in cases])
    assert 3 <= rig.fake.calls("launch") <= 7
    for case in cases:
        case.check()


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("n", range(1, 10))
def test_any_number_of_inputs_around_the_ends_of_vectors_and_tiles(dtype, n):
    """A row of nine has no kernel of its own: the general one takes it."""
    rig = Rig()
    rows = [Row(0, 1.0, tuple((i, 0.1 * i) for i in range(1, n))), Row(0, 0.7, tuple((i, 0.5) for i in range(1, n, 2)))]
    cases = [Case(dtype, n, rows, numel, stats_every=1) for numel in (1, 7, 8, 9, 255, 8191, 8192, 8200, 32775)]
    stats = rig.run([case.piece() for case in cases])
    assert rig.fake.calls("launch") == (2 if n < 9 else 3)  # one for the samples
    for case, got in zip(cases, stats, strict=True):
        for own, want in zip(got, case.check(), strict=True):
            assert {k: own[k] for k in own if "sum" not in k} == {k: want[k] for k in want if "sum" not in k}


ROWS = {
    "a sweep with its ends": ([Row(0), Row(1), *(Row(0, 1.0, ((1, t),)) for t in (0.25, 0.5, 0.75, 1.5))], 1, 2),
    "pivots of their own": ([Row(1, 1.0, ((0, 0.3),)), Row(2, 1.0, ((0, 0.3), (1, 0.2))), Row(0, 0.0)], 3, 0),
    "another order": ([Row(0, 1.0, ((1, 0.3), (2, 0.4))), Row(0, 1.0, ((2, 0.4), (1, 0.3)))], 1, 0),
    "a term twice, and the pivot as one": ([Row(0, 1.0, ((1, 0.3), (1, 0.3))), Row(1, 0.5, ((1, 0.3),))], 1, 0),
    "a weight that float32 has not": ([Row(0, 1.0, ((1, 1e-60), (2, 0.5))), Row(0, 1.0 + 2**-40)], 1, 0),
}


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_rows_of_every_form(rows):
    """Rows that agree on a pivot and an order share one read; the others are as another piece."""
    rig, (given, launches, copies) = Rig(), ROWS[rows]
    case = Case(BF16, 3, given, 4099)
    rig.fake.reset(cuda_host.Fake.EAGER)
    rig.run([case.piece()])
    assert (rig.fake.calls("launch"), rig.fake.calls("cudaMemcpyAsync")) == (launches, copies)
    case.check()


def test_more_rows_than_fit_into_one_table():
    """64 inputs and 256 rows are 260 kB of coefficients; a table has 30."""
    rig = Rig()
    rows = [Row(j % 64, 1.0, tuple((i, 0.01 * (i - j)) for i in range(64) if i != j % 64)) for j in range(256)]
    case = Case(F32, 64, rows, 97, 4, "normal", stats_every=1)
    stats = rig.run([case.piece()])
    assert 16 < rig.fake.calls("launch") < 40
    for own, want in zip(stats[0], case.check(), strict=True):
        assert own["changed"] == want["changed"] and own["sum_pp"] == pytest.approx(want["sum_pp"], rel=1e-12)


def test_without_statistics_nothing_is_counted():
    rig = Rig()
    case = Case(F32, 2, [HALF], 1000)
    assert set(rig.run([case.piece()])[0][0].values()) == {0}
    assert rig.fake.calls("cudaMemsetAsync") == 0
    case.more["stats_every"] = 3
    stats = rig.run([case.piece()])[0][0]
    assert stats["nan_in"] > 0 and stats["sampled"] == 1000


def test_samples_of_pieces_are_those_of_the_tensor():
    """Pieces that begin within chunks, with every third chunk sampled."""
    rig, numel, every = Rig(), 9 * _C.CHUNK + 777, 3
    whole = Case(BF16, 2, [HALF, Row(0)], numel, 0, "close", stats_every=every)
    pieces, edges = [], [0, 8, 5000, 2 * _C.CHUNK, 6 * _C.CHUNK + 16, numel]
    for lo, hi in itertools.pairwise(edges):
        piece = whole.piece()
        inputs, outputs = (tuple(a + 2 * lo for a in some) for some in (piece.inputs, piece.outputs))
        pieces.append(replace(piece, inputs=inputs, outputs=outputs, numel=hi - lo, first=lo))
    stats = rig.run(pieces)
    want = whole.check()
    for j in range(2):
        for name, value in want[j].items():
            assert sum(s[j][name] for s in stats) == pytest.approx(value, rel=1e-12), name


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64, F8_E4M3], ids=str)
@pytest.mark.parametrize("numel", [1, 16, 4096, 4099])
def test_reads_and_writes_nothing_beyond_a_page(dtype, numel):
    """Every buffer ends where a page does: to go on would kill the process here."""
    rig, given = Rig(), raws("normal", [dtype] * 2, numel)
    walls = [Wall(raw.size) for raw in (*given, given[0])]
    for wall, raw in zip(walls, given, strict=False):
        wall.view[:] = raw
    addresses = [wall.address for wall in walls]
    rig.run([piece_of(addresses[:2], [dtype] * 2, [HALF], addresses[2:], out_dtype=code(dtype), numel=numel)])
    want = Guarded(given[0].size, 0)
    _C.combine(addresses[:2], [code(dtype)] * 2, [HALF], [want.address], code(dtype), numel)
    assert_same_bits(want.view, walls[2].view, dtype, "row 0")


def test_sums_can_be_part_of_a_graph_but_statistics_cannot():
    rig = Rig()
    case = Case(BF16, 2, [HALF], 100)
    rig.fake.capture(rig.queue.handle, True)
    rig.queue.run([case.piece()])
    case.more["stats_every"] = 1
    with pytest.raises(BackendError, match=r"statistics need memory of cuda:0, which cannot be part of a CUDA graph"):
        rig.queue.run([case.piece()])


def test_an_answer_that_nobody_waited_for_is_no_other_ones_memory():
    """Its memory is used again only when the device is done with it."""
    rig = Rig()
    before = rig.fake.host_blocks()
    cases = [Case(BF16, 2, [HALF], 1000, stats_every=1) for _ in range(3)]
    for case in cases[:2]:
        rig.queue.run([case.piece()])  # what it will answer is dropped at once
    assert rig.fake.host_blocks() == before + 2
    stats = rig.run([cases[2].piece()])
    assert stats[0][0]["sampled"] == 1000 and rig.fake.host_blocks() == before + 3
    rig.run([cases[2].piece()])
    assert rig.fake.host_blocks() == before + 3


def test_failures_name_call_device_and_bytes_and_leave_no_memory():
    rig = Rig(cuda_host.Fake.EAGER)
    case = Case(BF16, 2, [HALF], 1000, stats_every=1)
    rig.fake.fail("cudaMallocAsync", rig.fake.MEMORY_ALLOCATION)
    with pytest.raises(OutOfMemory, match=r"cudaMallocAsync failed on cuda:0, 72 bytes: out of memory"):
        rig.queue.run([case.piece()])
    for n in (1, 2):
        rig.fake.fail("launch", rig.fake.LAUNCH_FAILURE, n)
        with pytest.raises(BackendError, match=r"the launch of .*combine failed on cuda:0: unspecified launch failure"):
            rig.queue.run([case.piece()])
        assert rig.fake.used() == 0
    rig.run([case.piece()])
    case.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "1 to 64 inputs, got 0"),
        ({"inputs": (Stored(0, 0, 77),)}, "no dtype has code 77"),
        ({"rows": ()}, "as many outputs as sinks"),
        ({"rows": (Row(2),)}, "none of the inputs"),
        ({"rows": (Row(0, 1.0, ((-1, 0.5),)),)}, "none of the inputs"),
        ({"keys": (1, 2)}, "a key per output"),
        ({"sinks": (0,) * 257}, "1 to 256 outputs, got 257"),
        ({"offsets": ()}, "as many offsets"),
    ],
)
def test_steps_that_make_no_sense_are_refused(change, message):
    piece = Case(BF16, 2, [HALF], 8).piece()
    with pytest.raises(ValueError, match=message):
        Rig().queue.run([replace(piece, step=replace(piece.step, **change))])
    assert cuda_host.fake().calls("launch") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"numel": -1}, "must not be negative"),
        ({"inputs": (0,)}, "an address per input"),
        ({"outputs": (0, 0)}, "an address per output"),
        ({"step": Divergence(inputs=stored([BF16] * 2), numel=8), "outputs": ()}, "no kernel here .* kind divergence"),
        ({"step": Measure(inputs=(Stored(0, 0, 1, Decoder("x", 8)),) * 2, numel=8), "outputs": ()}, "encoded inputs"),
    ],
)
def test_pieces_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Rig().queue.run([replace(Case(BF16, 2, [HALF], 8).piece(), **change)])
    assert cuda_host.fake().calls("launch") == 0
