"""Every backend returns the reference's bytes, for every case, thread count and way of cutting a tensor.

No tolerance on stored values and counts. Sums of statistics may be taken in any order, so they are compared within the
rounding of such a sum.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import mmap

import numpy as np
import pytest

from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.reference import combine as reference
from tests.support import backends
from tests.support.backends import assert_same_bits
from tests.support.cases import CASES, Case, Guarded, fill, guarded

NONE = pytest.param("", marks=pytest.mark.skip(reason="the native module is not built"))
every_isa = pytest.mark.parametrize("isa", backends.usable() or [NONE])
WAYS = [pytest.param(isa, False, id=isa) for isa in backends.combining()]
WAYS += [pytest.param(isa, True, id=f"{isa}-streamed") for isa in backends.usable()]  # on a CPU, around the caches
every_backend = pytest.mark.parametrize("isa", backends.combining() or [NONE])
COUNTS = ("nan_in", "inf_in", "nan_out", "inf_out", "sampled", "changed")


@functools.lru_cache(maxsize=4)
def expected(case: Case) -> tuple[list[np.ndarray], list[reference.Stats | None]]:
    return case.reference()


def assert_same_stats(want: reference.Stats | None, got: dict[str, float]) -> None:
    """Counts equal; sums equal up to rounding. A copy is not measured."""
    if want is None:
        return
    assert {name: got[name] for name in COUNTS} == {name: getattr(want, name) for name in COUNTS}
    for name, scale in (("sum_pp", want.sum_pp), ("sum_dd", want.sum_dd), ("sum_od", want.scale_od)):
        assert_same_sum(getattr(want, name), got[name], want.sampled, scale, name)


def assert_same_sum(want: float, got: float, n: int, scale: float, name: str) -> None:
    """Two f64 sums of the same n terms in different orders, `scale` the sum of their magnitudes.

    The differences are the same numbers on both sides. A product is within eps/2 of the truth and a sum within
    (n - 1) eps/2, relative to `scale`: n eps between the two, and one more for terms of higher order. Where `scale`
    overflows, whether a sum does depends on its order.
    """
    if math.isnan(want) or math.isinf(want):
        assert math.isnan(got) if math.isnan(want) else got == want, f"{name}: expected {want}, got {got}"
    elif math.isfinite(scale):
        tolerance = (n + 1) * np.finfo(np.float64).eps * scale
        assert abs(got - want) <= tolerance, f"{name}: expected {want}, got {got}, tolerance {tolerance}"


def buffers(raws: list[np.ndarray], misalignment: int = 0) -> list[Guarded]:
    """Guarded copies of raw tensors."""
    copies = [Guarded(raw.size, misalignment) for raw in raws]
    for copy, raw in zip(copies, raws, strict=True):
        copy.view[:] = raw
    return copies


@pytest.mark.parametrize(("isa", "streamed"), WAYS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits(isa, case, streamed):
    """A backend returns the reference's bits and statistics, and writes nothing beside its outputs."""
    outs, stats = expected(case)
    inputs, outputs = guarded(case)
    got = backends.run_case(isa, case, inputs, outputs, streamed=streamed)
    for j, out in enumerate(outputs):
        assert_same_bits(outs[j], out.view, case.out_dtype, f"row {j}")
        assert out.intact(), f"row {j}: bytes beside the output were written"
        assert_same_stats(stats[j], got[j])
    for i, raw in enumerate(case.inputs()):
        assert inputs[i].intact() and np.array_equal(inputs[i].view, raw), f"input {i} was written"


# Large enough that each of 7 threads has something to do whatever the size of its share; not a multiple of anything.
BIG = 7 * 16 * CHUNK + 12345


@functools.cache
def big(rounding: str) -> tuple[Case, list[np.ndarray], list[np.ndarray], list[reference.Stats | None]]:
    """A case of three inputs and two rows, its inputs, and what it must give."""
    case = Case((BF16, F32), BF16, 3, 2, BIG, 2, "close", "average", rounding)
    return (case, case.inputs(), *case.reference())


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_change_bits(isa, rounding, threads):
    case, raws, outs, stats = big(rounding)
    inputs, outputs = buffers(raws, 2), [Guarded(2 * BIG, 6) for _ in outs]
    got = backends.run_case(isa, case, inputs, outputs, threads=threads)
    for j, out in enumerate(outputs):
        assert_same_bits(outs[j], out.view, case.out_dtype, f"row {j}")
        assert out.intact()
        assert_same_stats(stats[j], got[j])


@every_backend
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("cuts", [(1,), (64, 16384), (16383, 16385), (16384 * 3,), (5000, 5016, 40000), (40, 41, 42)])
def test_pieces_of_a_tensor_give_the_bits_of_the_whole(isa, rounding, cuts):
    """Cut anywhere, each piece told its first element: same bytes, and statistics that add up."""
    numel = 50000
    case = Case((BF16, F16), BF16, 2, 2, numel, 0, "close", "interpolate", rounding)
    outs, stats = expected(case)
    raws, edges = case.inputs(), (0, *cuts, numel)
    pieces = [np.empty(0, np.uint8) for _ in outs]
    total = [dict.fromkeys((*COUNTS, "sum_pp", "sum_dd", "sum_od"), 0.0) for _ in outs]
    for lo, hi in itertools.pairwise(edges):
        inputs = buffers([raw[2 * lo : 2 * hi] for raw in raws], 2 * lo % 64)
        outputs = [Guarded(2 * (hi - lo), 1) for _ in outs]
        for j, found in enumerate(backends.run_case(isa, case, inputs, outputs, first=lo)):
            total[j] = {name: value + found[name] for name, value in total[j].items()}
            pieces[j] = np.concatenate([pieces[j], outputs[j].view])
    for j, out in enumerate(outs):
        assert_same_bits(out, pieces[j], case.out_dtype, f"row {j}")
        assert_same_stats(stats[j], total[j])


@every_backend
@pytest.mark.parametrize("first", [2**31 - 100, 2**32 - 100, 2**34 - 37, 2**40 + 12345])
def test_random_words_deep_inside_a_huge_tensor(isa, first):
    """Element indices beyond 32 bits, and counters beyond 32 bits, are not cut off."""
    case = Case((F32,), BF16, 2, 1, 1000, 0, "normal", "interpolate", "stochastic")
    outs, _ = reference.combine(
        case.inputs(), case.dtypes, case.rows(), BF16, rounding="stochastic", keys=case.keys, first=first
    )
    inputs, outputs = guarded(case)
    backends.run_case(isa, case, inputs, outputs, first=first)
    assert_same_bits(outs[0], outputs[0].view, BF16, "row 0")


@every_backend
@pytest.mark.parametrize("source", [F32, F64], ids=str)
@pytest.mark.parametrize("out_dtype", [F16, F8_E4M3, F8_E5M2], ids=str)
def test_stochastic_rounding_far_below_the_smallest_value(isa, source, out_dtype):
    """A rare 1 among zeros as far as 60 dropped bits; nothing beyond."""
    smallest = 1 - reference.FORMATS[out_dtype].bias - reference.FORMATS[out_dtype].mantissa
    scales = np.repeat(2.0 ** np.arange(smallest - 14, smallest + 2), 4096)
    raw = (scales * np.resize([1, -1.5], scales.size)).astype(f"f{source.bits // 8}").view(np.uint8)
    outs, _ = reference.combine([raw], [source], [Row(0)], out_dtype, rounding="stochastic", keys=[9])
    inputs, outputs = buffers([raw]), [Guarded(outs[0].size, 0)]
    backends.run(isa, inputs, [source], [Row(0)], outputs, out_dtype, stochastic=True, keys=[9])
    assert_same_bits(outs[0], outputs[0].view, out_dtype, "row 0")


def check_rows(isa: str, raws: list[np.ndarray], dtypes: list[DType], rows: list[Row], out_dtype: DType) -> None:
    """These rows in one call give the reference's bits and statistics."""
    outs, stats = reference.combine(raws, dtypes, rows, out_dtype, stats_every=1)
    inputs, outputs = buffers(raws), [Guarded(out.size, 0) for out in outs]
    got = backends.run(isa, inputs, dtypes, rows, outputs, out_dtype, stats_every=1)
    for j, out in enumerate(outputs):
        assert_same_bits(outs[j], out.view, out_dtype, f"row {j}")
        assert_same_stats(stats[j], got[j])


@every_backend
def test_a_row_computes_in_float64_only_if_it_reads_float64(isa):
    """An output does not depend on which other outputs share its read."""
    rng = np.random.default_rng(1)
    dtypes = [F32, F32, F64]
    raws = [fill("normal", d, 1000, i, rng).view(np.uint8) for i, d in enumerate(dtypes)]
    rows = [
        Combine((0.7, 0.3, 0.0), sums_to_one=True).row(),
        Combine((0.7, 0.0, 0.3), sums_to_one=True).row(),
        Combine((0.3, 0.7, 0.0), sums_to_one=True).row(),
        Row(2),
    ]
    check_rows(isa, raws, dtypes, rows, F32)


@every_backend
@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_inputs_that_a_row_does_not_read_do_not_matter(isa, dtype):
    """NaN in an input of weight 0 reaches neither the output nor the counts."""
    rng = np.random.default_rng(2)
    raws = [fill("normal", dtype, 300, i, rng).view(np.uint8) for i in range(2)]
    nans = np.full(300, reference.FORMATS[dtype].nan, f"u{dtype.bits // 8}").view(np.uint8)
    check_rows(isa, [raws[0], nans, raws[1]], [dtype] * 3, [Combine((0.5, 0.0, 0.5), sums_to_one=True).row()], dtype)


@every_backend
@pytest.mark.parametrize("out_dtype", MERGING, ids=str)
@pytest.mark.parametrize("saturate", [True, False])
def test_narrowing_around_every_rounding_boundary(isa, out_dtype, saturate):
    """f64 and f32 values at, just below and just above the midpoints of neighbouring small floats."""
    midpoints = []
    for small in (F16, F8_E4M3, F8_E5M2, BF16):
        fmt = reference.FORMATS[small]
        codes = np.arange(0, fmt.largest + 1, 1 if small.bits == 8 else 17).astype(f"u{small.bits // 8}")
        x = reference.widen(codes.view(np.uint8), small).astype(np.float64)
        midpoints.append((x[1:] + x[:-1]) / 2)
        midpoints.append(x[-1:] + (x[-1:] - x[-2:-1]) / 2)
    x = np.concatenate(midpoints)
    near = np.concatenate([x, np.nextafter(x, 0), np.nextafter(x, np.inf), x * (1 + 2.0**-23), x * (1 - 2.0**-24)])
    for source in (F64, F32):
        values = np.concatenate([near, -near]).astype(f"f{source.bits // 8}")
        raw = values.view(np.uint8)
        # A plain copy between dtypes, and a row that gets there by arithmetic.
        zeros, policy = np.zeros_like(raw), "saturate" if saturate else "nonfinite"
        rows = [Row(0), Row(1, 1.0, ((0, 1.0),))]
        outs, stats = reference.combine([raw, zeros], [source] * 2, rows, out_dtype, fp8_overflow=policy)
        inputs, outputs = buffers([raw, zeros]), [Guarded(outs[0].size, 0) for _ in rows]
        got = backends.run(isa, inputs, [source] * 2, rows, outputs, out_dtype, fp8_saturate=saturate, stats_every=16)
        for j, out in enumerate(outputs):
            assert_same_bits(outs[j], out.view, out_dtype, f"{source}, row {j}")
            assert_same_stats(stats[j], got[j])


@every_isa
def test_no_sampling(isa):
    """stats_every = 0 samples nothing and still counts NaN and Inf."""
    case = Case((BF16,), BF16, 2, 1, 65536, 0, "patterns", "interpolate")
    inputs, outputs = guarded(case)
    (got,) = backends.run_case(isa, case, inputs, outputs, stats_every=0)
    _, (want,) = reference.combine(case.inputs(), case.dtypes, case.rows(), BF16, stats_every=0)
    assert want is not None and want.nan_in == 2 * 2 * 127 and want.inf_in == 4 and want.sampled == 0
    assert_same_stats(want, got)


@every_isa
@pytest.mark.parametrize("dtype", MERGING, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 15, 16, 33, 255, 4099])
def test_reads_and_writes_nothing_beyond_a_page(isa, dtype, numel):
    """Every buffer ends where a page does and the next one is forbidden: reading on would kill the process here."""
    rng = np.random.default_rng(numel)
    raws = [fill("normal", dtype, numel, i, rng).view(np.uint8) for i in range(3)]
    rows = [Combine((1 / 3, 1 / 3, 1 / 3), sums_to_one=True).row()]
    walls = [Wall(raw.size) for raw in (*raws, raws[0])]
    for wall, raw in zip(walls, raws, strict=False):
        wall.view[:] = raw
    backends.run(isa, walls[:3], [dtype] * 3, rows, walls[3:], dtype, stats_every=1)
    assert_same_bits(reference.combine(raws, [dtype] * 3, rows, dtype)[0][0], walls[3].view, dtype, "row 0")


class Wall(Guarded):
    """A buffer that ends at the end of a page, before a page that nobody may touch."""

    def __init__(self, nbytes: int) -> None:
        page = mmap.PAGESIZE
        size = -(-nbytes // page) * page
        self._all = np.frombuffer(mmap.mmap(-1, size + page), np.uint8)
        self._start = size - nbytes
        self.view = self._all[self._start : size]
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self._all.ctypes.data + size), ctypes.c_size_t(page), 0):
            raise OSError(ctypes.get_errno(), "mprotect")


def test_every_case_is_told_apart_by_its_id():
    assert len({case.id for case in CASES}) == len(CASES)
    assert len(CASES) <= 250


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_table_holds_all_patterns(dtype):
    """Each input of a 65,536-element pattern case takes every 16-bit value."""
    cases = [c for c in CASES if c.in_dtypes == (dtype,) and c.numel == 65536 and c.fill == "patterns"]
    assert cases
    for case in cases:
        for raw in case.inputs():
            assert np.unique(raw.view(np.uint16)).size == 65536


def test_guards_notice_a_stray_byte():
    """The sentinels themselves work, on both sides and at the very edge."""
    for stray in (-1, 10):
        buffer = Guarded(10, 3)
        assert buffer.address % 64 == 3 and buffer.intact()
        ctypes.memset(buffer.address + stray, 0, 1)
        assert not buffer.intact()
