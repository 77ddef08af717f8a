"""Kernels of accelerators give the reference's bytes: every kind of step, on a GPU if there is one.

Without one, the kernels of CUDA are emulated (tests/support/devices/cuda_host), and those of Triton do not run.
test_triton.py runs this file in a process of its own where they are interpreted: Triton decides that at its import.

    TRITON_INTERPRET=1 python -m pytest tests/devices/test_gpu.py -k "triton and not sanitized and not 291"

Cases are those of the shared tables that are small enough for an interpreter: every other one of up to 8 inputs and 3
outputs, and a few of the rest; CUDA's sums have them all in test_same_bits.py. No mask by rank is tested, since no
kernel draws those. Those that are named sanitized are for compute-sanitizer: of each kind of kernel a few.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from fastinterp import _C
from fastinterp.ops import operands, steps
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from fastinterp.ops.requests import Mask, MaskedCombine, MeasureMasked, Score, Select
from fastinterp.reference import combine as reference
from fastinterp.reference import groups as reference_groups
from fastinterp.reference.select import select
from tests.numerics import test_groups, test_masked, test_masks, test_select
from tests.numerics.test_same_bits import assert_same_stats
from tests.support import backends, pumps
from tests.support.backends import assert_same_bits
from tests.support.cases import CASES, Case, Guarded, guarded
from tests.support.devices.cuda_combine import piece_of
from tests.support.devices.device_pump import DevicePump, Loan
from tests.support.pumps import code, memory, raws, run, stored

DEVICES: list[Any] = [*backends.on_devices()] or [
    pytest.param("", marks=pytest.mark.skip(reason="neither a GPU nor a C++ compiler is here"))
]
SMALL = [case for i, case in enumerate(CASES) if (case.n <= 8 and case.k <= 3 and i % 2 == 0) or i % 32 == 0]


@pytest.fixture(params=DEVICES, autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What the other modules run is run by the device."""
    with backends.device(request.param, monkeypatch) as opened:
        monkeypatch.setattr(DevicePump, "device", opened)
        for module in (pumps, test_groups, test_select):
            monkeypatch.setattr(module, "Pump", DevicePump)
        yield opened


class Lent:
    """The buffers of a case on a device, and the piece that is the whole of it."""

    def __init__(self, device: Any, queue: Any, case: Case):
        self.case, (self.inputs, self.outputs) = case, guarded(case)
        given, made = ([Loan.of(device, queue, x) for x in some] for some in (self.inputs, self.outputs))
        self.loans = [(loan, False) for loan in given] + [(loan, True) for loan in made]
        self.piece = piece_of(
            [loan.address for loan in given], case.dtypes, case.rows(), [loan.address for loan in made],
            code(case.out_dtype), case.numel, case.keys if case.rounding == "stochastic" else (),
            stats_every=case.stats_every, fp8_saturate=case.fp8_overflow == "saturate",
        )  # fmt: skip

    def check(self, stats: Sequence[dict[str, float]]) -> None:
        """What came back is the reference's. Loans look after guards and inputs."""
        for loan, written in self.loans:
            loan.back(written)
        outs, wanted = self.case.reference()
        for j, out in enumerate(self.outputs):
            assert_same_bits(outs[j], out.view, self.case.out_dtype, f"{self.case} row {j}")
            assert_same_stats(wanted[j], stats[j])


def check_cases(device: Any, cases: Sequence[Case]) -> None:
    """All in one run, so that those that are alike share a launch."""
    queue = device.queue()
    lent = [Lent(device, queue, case) for case in cases]
    pending = queue.run([one.piece for one in lent])
    queue.record().wait()
    for one, done in zip(lent, pending, strict=True):
        assert done.answer() is None
        one.check(done.stats())


@pytest.mark.parametrize("some", range(16))
def test_same_bits(device, some):
    check_cases(device, SMALL[some::16])


def test_many_tensors_in_one_launch(device):
    """Of every size, aligned and not, with and without a tail."""
    sizes = [1, 15, 16, 17, 0, 4096, 8191, 8192, 8193, 20000]
    for dtype in (BF16, F16, F32):
        cases = [Case((dtype,), dtype, 2, 1, numel, off, "normal", "interpolate") for numel in sizes for off in (0, 1)]
        check_cases(device, cases)


def test_a_model_of_291_tensors(device):
    sizes = [8192, *([4096, 4096, 64, 11008, 64] * 58)[:289], 8192]
    check_cases(device, [Case((BF16,), BF16, 2, 1, numel, 0, "close", "interpolate") for numel in sizes])


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("n", range(1, 9))
def test_whole_vectors_and_what_is_left_of_them(device, n, dtype):
    """As the CPU has it: one to five rows, at addresses that are and are not multiples of 16; interpreted, a part."""
    numel, ways = 20011, list(itertools.product((0, 16, 8), (1, 2, 5)))
    if device.label == "Triton's interpreter":
        ways = ways[:2]
    data = raws("patterns", [dtype] * n, numel)
    rows = [Combine(tuple((1 + i + k) / 7 for i in range(n))).row() for k in range(5)]
    for offset, k in ways:
        inputs = [Guarded(raw.size, offset) for raw in data]
        for held, raw in zip(inputs, data, strict=True):
            held.view[:] = raw
        found, wanted = ([Guarded(data[0].size, at) for _ in range(k)] for at in (offset, 0))
        step = steps.Combine(
            inputs=stored([dtype] * n), rows=tuple(rows[:k]), numel=numel, sinks=tuple(range(k)), offsets=(0,) * k,
            out_dtype=code(dtype),
        )  # fmt: skip
        run("", [step], memory(inputs), memory(found))
        addresses, outs = ([x.address for x in some] for some in (inputs, wanted))
        _C.combine(addresses, [code(dtype)] * n, rows[:k], outs, code(dtype), numel)
        for j in range(k):
            assert_same_bits(wanted[j].view, found[j].view, dtype, f"row {j} of {k}")


def test_pieces_of_a_tensor(device):
    """Random words and sampled chunks are those of the tensor, wherever it is cut."""
    case = Case((BF16,), F8_E4M3, 2, 2, 100003, 3, "normal", "extrapolate", "stochastic")
    queue = device.queue()
    whole = Lent(device, queue, case)
    pieces = []
    for first, count in ((0, 16384), (16384, 49152), (65536, 34467)):
        addresses = tuple(address + 2 * first for address in whole.piece.inputs)
        outs = tuple(out + first for out in whole.piece.outputs)
        pieces.append(replace(whole.piece, inputs=addresses, outputs=outs, numel=count, first=first))
    done = queue.run(pieces)
    queue.record().wait()
    parts = [pending.stats() for pending in done]
    whole.check([{n: sum(stats[j][n] for stats in parts) for n in parts[0][j]} for j in range(2)])


# --- weights by row and by column ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize(
    ("dtypes", "out"), [((BF16, BF16, BF16), BF16), ((F16, F32, F8_E5M2), F16), ((F32, F64, BF16), F64)], ids=str
)
@pytest.mark.parametrize("kind", ["close", "patterns"])
def test_weights_by_group(per, dtypes, out, kind):
    from fastinterp.ops.combine import GroupRow

    columns, rows = 119, 37
    data = raws(kind, list(dtypes), rows * columns)
    groups, rng = rows if per == "row" else columns, np.random.default_rng(5)
    asked = []
    for total in (1.0, 0.9):
        weights = rng.normal(size=groups * 2)
        weights[rng.random(groups * 2) < 0.3] = 0  # skipped, not multiplied
        asked.append(GroupRow(0, array("d", [total] * groups), (2, 1), array("d", weights)))
    sources, sinks = pumps.guarded(data), [Guarded(rows * columns * out.bits // 8, 5 + k) for k in range(2)]
    step = steps.GroupCombine(
        inputs=stored(dtypes), numel=rows * columns, sinks=(0, 1), offsets=(0, 0), out_dtype=code(out),
        columns=columns, per=per, keys=(3, 4), rows=tuple(asked),
    )  # fmt: skip
    for rounding in ("nearest", "stochastic"):
        pump = run("", [step], memory(sources), memory(sinks), stochastic=rounding == "stochastic")
        outs, stats = reference_groups.combine_groups(
            data, list(dtypes), asked, out, per, columns, rounding=rounding, keys=[3, 4], stats_every=2
        )
        for j in range(2):
            assert_same_bits(outs[j], sinks[j].view, out, f"row {j}")
            assert sinks[j].intact()
            assert_same_stats(stats[j], pump.stats()[0][j])


# --- measures --------------------------------------------------------------------------------------------------------

TENSORS = [((BF16, F32, F16), 3 * 16384 + 5), ((BF16, F8_E4M3, F64), 1003), ((BF16,) * 6, 300), ((BF16, F32), 0)]


def measured(dtypes, numel, deltas, kind="normal", **keys):
    data = raws(kind, dtypes, numel)
    step = steps.Measure(inputs=stored(dtypes), numel=numel, deltas=deltas, **keys)
    sources = pumps.guarded(data)
    return data, run("", [step], memory(sources), []).answers()[0]


def assert_same_answer(want, got) -> None:
    for expected, found in zip(want, got, strict=True):
        expected, found = np.asarray(expected).ravel(), np.asarray(found)
        nan = np.isnan(expected)
        assert np.array_equal(nan, np.isnan(found))
        assert np.where(nan, 0, expected).tobytes() == np.where(nan, 0, found).tobytes()


@pytest.mark.parametrize("deltas", [False, True])
@pytest.mark.parametrize(("dtypes", "numel"), TENSORS, ids=str)
def test_measures(dtypes, numel, deltas):
    data, got = measured(dtypes, numel, deltas)
    assert_same_answer(reference.measure(data, dtypes, deltas), got)


def test_measures_of_pieces_fold(monkeypatch):
    """5 chunks in pieces of 2: as the whole tensor's."""
    monkeypatch.setattr(DevicePump, "most", 2 * 16384 * 4)
    data, got = measured([BF16, BF16], 4 * 16384 + 77, True, "close")
    assert_same_answer(reference.measure(data, [BF16, BF16], True), got)


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("per", ["row", "column"])
def test_measures_by_row_and_column(per, columns, monkeypatch):
    dtypes, numel = [BF16, F32], 70 * columns
    reference_of = reference_groups.measure_rows if per == "row" else reference_groups.measure_columns
    data, got = measured(dtypes, numel, True, per=per, columns=columns)
    assert_same_answer(reference_of(data, dtypes, True, columns), got)
    monkeypatch.setattr(DevicePump, "most", 64 * columns * 8)
    data, got = measured(dtypes, numel, False, "patterns", per=per, columns=columns)
    assert_same_answer(reference_of(data, dtypes, False, columns), got)


def test_measures_of_rows_of_several_chunks():
    data, got = measured([BF16, BF16], 40000, True, per="row", columns=20000)
    assert_same_answer(reference_groups.measure_rows(data, [BF16, BF16], True, 20000), got)


# --- histograms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deltas", "variance", "divergence"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16, BF16), (F64, F8_E4M3, F16)], ids=str)
def test_order_statistics(kind, dtypes):
    """By the histograms that they are asked for, sampled and whole."""
    shape = (61, 811)
    data = raws("close", list(dtypes), math.prod(shape))
    score = test_select.SCORES[kind](shape[0])
    ranks = ((1, 5000), (2, 1)) if score is None else ((0, 5000), (0, 7))
    ask = Select(ranks, score)
    found, _ = test_select.natively(data, list(dtypes), ask, shape, "")
    assert found == select(data, list(dtypes), ask, shape)


# --- masks -----------------------------------------------------------------------------------------------------------

NAMES: list[tuple[str, ...]] = [(), *((name,) for name in test_masked.OPTIONS), *test_masked.COMBINED]
NAMES = [names for names in NAMES if not {"ranks", "clipped"} & set(names)]


@pytest.mark.parametrize("kind", ["close", "patterns"])
@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_sums_with_masks(names, kind):
    dtypes, shape = [BF16, F16, BF16, F32], (7, 701)
    data = raws(kind, dtypes, math.prod(shape))
    choices = test_masked.options_of(data, dtypes, shape)
    test_masked.check("", data, dtypes, [test_masked.ask_of(4, *(choices[name] for name in names))], BF16, shape)


@pytest.mark.parametrize(("dtype", "out"), [(F64, BF16), (BF16, F64), (F8_E4M3, F8_E5M2), (F32, F8_E4M3)], ids=str)
def test_sums_with_masks_of_every_dtype(dtype, out):
    dtypes, shape = [dtype, BF16, dtype], (3, 331)
    data = raws("patterns", dtypes, math.prod(shape))
    choices = test_masked.options_of(data, dtypes, shape)
    ask = test_masked.ask_of(3, choices["random"], choices["sign_weights"], choices["shares"])
    test_masked.check("", data, dtypes, [ask], out, shape, rounding="stochastic", fp8_overflow="nonfinite")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_importance(dtype):
    test_masked.test_importance("", dtype, "patterns")


MASKS = {**test_masks.MASKS, "band": Mask(0x39000000, 0x3C000000, 0.7)}
FACTORS = array("f", (0.5 + r % 3 for r in range(30))).tobytes()


@pytest.mark.parametrize(
    ("dtypes", "masks", "score"),
    [
        ((BF16, F32, BF16, F16), ("least", "random", "band"), None),
        ((F64, BF16, F64), ("least", None), None),
        ((F8_E4M3, F8_E5M2, F16), ("least", "random"), Score("variance", b"", 0x38000000)),
        ((BF16, BF16, BF16), ("least", "all"), Score("divergence", FACTORS, 0x3A000000)),
    ],
    ids=["masks", "f64", "variance", "divergence"],
)
def test_masked_stats(dtypes, masks, score, monkeypatch):
    if score is None:
        monkeypatch.setattr(DevicePump, "most", 16384)  # a chunk
    shape, chosen = (30, 613), tuple(None if name is None else MASKS[name] for name in masks)
    data = raws("normal", list(dtypes), math.prod(shape))
    test_masks.check_masked_stats("", data, list(dtypes), chosen, shape, 1, score)


# --- the device ------------------------------------------------------------------------------------------------------


def test_memory_and_copies(device):
    host, there = device.host(100), device.memory(100)
    host.view[:] = bytes(range(100))
    queue = device.queue()
    queue.upload(there.address, host.address, 100)
    queue.record().wait()
    host.view[:] = bytes(100)
    other = device.queue(0)
    other.after(queue.record())
    other.download(host.address + 1, there.address, 99)
    event = other.record()
    event.wait()
    assert event.done()
    assert bytes(host.view[:4]) == b"\0\0\1\2"
    assert device.free_bytes() > 0
    assert device.name in ("cuda:0", "triton:0") and device.backend in ("cuda", "triton") and device.label
    there.free()


def test_what_is_refused(device):
    refuses, by_rank = device.refuses, Mask(probability=0.5, rank_slope=0.1)
    assert "divergence" in refuses(steps.Divergence(inputs=stored([F32, F32]), numel=4, columns=4))
    for mask, why in ((by_rank, "random masks by rank"), (Mask(probability=0.5), None)):
        ask = MeasureMasked((by_rank, mask))
        assert refuses(pumps.stats_step(ask, [F32, F32], (4,), name="", seed=0)) == why
        sums = [MaskedCombine((0.0, 1.0), masks=(Mask(), mask))]
        assert refuses(pumps.masked_step(sums, [F32, F32], F32, (4,), name="", seed=0)) == why
    encoded = operands.Stored(0, 0, code(F32), operands.Decoder("int8", 4))
    assert refuses(steps.Measure(inputs=(encoded,), numel=4)) == "encoded inputs"


# --- for compute-sanitizer -------------------------------------------------------------------------------------------

SUMS = [
    Case((dtype,), dtype, 2, 1, numel, offset, "patterns", "interpolate")
    for dtype in (BF16, F8_E4M3)
    for numel in (1, 4099)
    for offset in (0, 3)
]
RANDOM = Case((BF16, F32), BF16, 3, 2, 4099, 1, "patterns", "scaled", "stochastic")
SANITIZED = {
    "sums": lambda device, patch: check_cases(device, [*SUMS, RANDOM]),
    "groups": lambda _, patch: test_weights_by_group(per="row", dtypes=(BF16,) * 3, out=BF16, kind="patterns"),
    "measure": lambda _, patch: test_measures(dtypes=(BF16, F32, F16), numel=3 * 16384 + 5, deltas=True),
    "columns": lambda _, patch: test_measures_by_row_and_column(per="column", columns=300, monkeypatch=patch),
    "rows": lambda _, patch: test_measures_of_rows_of_several_chunks(),
    "histogram": lambda _, patch: test_order_statistics(kind="divergence", dtypes=(BF16,) * 3),
    "masked": lambda _, patch: test_sums_with_masks(names=("random", "divergence"), kind="close"),
    "masked_stats": lambda _, patch: test_masked_stats((BF16, BF16), ("least",), None, patch),
}


@pytest.mark.parametrize("name", SANITIZED)
def test_sanitized(device, name, monkeypatch):
    SANITIZED[name](device, monkeypatch)
