"""Triton's kernels, interpreted on the host, give the reference's bytes.

Run by test_triton.py in a process of its own, since Triton decides at its import whether it compiles or interprets:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted.py

Cases are those of the shared tables that are small enough for an interpreter: every other one of
up to 8 inputs and 3 outputs, and a few of the rest. By rank no keep is tested, since no kernel draws those.
"""

from __future__ import annotations

import math
import os
from array import array

import numpy as np
import pytest

from fastinterp.compute import reference, reference_groups
from fastinterp.compute.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64
from fastinterp.compute.reference_select import select
from fastinterp.compute.requests import Keep, Score, Select
from fastinterp.compute.triton import TritonDevice, missing
from fastinterp.errors import BackendError, OutOfMemory
from tests import pumps, test_groups, test_keeps, test_masked, test_select
from tests.backends import assert_same_bits
from tests.cases import CASES, Case, Guarded, guarded
from tests.pumps import code, memory, raws, run
from tests.test_same_bits import assert_same_stats
from tests.triton_pump import TritonPump

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton would compile")

SMALL = [case for i, case in enumerate(CASES) if (case.n <= 8 and case.k <= 3 and i % 2 == 0) or i % 32 == 0]


@pytest.fixture(autouse=True)
def _instead_of_the_pump(monkeypatch):
    """What the other modules run is run by the interpreter."""
    for module in (pumps, test_groups, test_select):
        monkeypatch.setattr(module, "Pump", TritonPump)


def piece_of(case: Case, inputs: list[Guarded], outputs: list[Guarded]) -> dict:
    piece = {
        "kind": "combine",
        "inputs": [(x.address, code(d)) for x, d in zip(inputs, case.dtypes, strict=True)],
        "outputs": [out.address for out in outputs],
        "numel": case.numel,
        "first": 0,
        "out_dtype": code(case.out_dtype),
        "rows": [(row.pivot, row.total, list(row.terms)) for row in case.rows()],
        "stats_every": case.stats_every,
        "fp8_saturate": case.fp8_overflow == "saturate",
    }
    return piece | ({"keys": case.keys} if case.rounding == "stochastic" else {})


def check_case(case: Case, inputs: list[Guarded], outputs: list[Guarded], stats: list[dict[str, float]]) -> None:
    outs, wanted = case.reference()
    for j, out in enumerate(outputs):
        assert_same_bits(outs[j], out.view, case.out_dtype, f"{case} row {j}")
        assert out.intact(), f"{case} row {j}: bytes beside the output were written"
        assert_same_stats(wanted[j], stats[j])
    for i, raw in enumerate(case.inputs()):
        assert inputs[i].intact() and np.array_equal(inputs[i].view, raw), f"{case}: input {i} was written"


@pytest.mark.parametrize("some", range(16))
def test_same_bits(some):
    """Of the shared table; pieces of a run that are alike share a launch."""
    cases = SMALL[some::16]
    made = [guarded(case) for case in cases]
    pieces = [piece_of(case, *buffers) for case, buffers in zip(cases, made, strict=True)]
    for case, buffers, done in zip(cases, made, TritonDevice().queue().run(pieces), strict=True):
        assert done.answer() is None
        check_case(case, *buffers, done.stats())


def test_many_tensors_in_one_launch():
    """Of every size, aligned and not, with and without a tail."""
    sizes = [1, 15, 16, 17, 0, 4096, 8191, 8192, 8193, 20000]
    cases = [Case((BF16,), BF16, 2, 1, numel, off, "normal", "interpolate") for numel in sizes for off in (0, 1)]
    made = [guarded(case) for case in cases]
    done = TritonDevice().queue().run([piece_of(case, *buffers) for case, buffers in zip(cases, made, strict=True)])
    for case, buffers, pending in zip(cases, made, done, strict=True):
        check_case(case, *buffers, pending.stats())


def test_pieces_of_a_tensor(monkeypatch):
    """Random words and sampled chunks are those of the tensor, wherever it is cut."""
    case = Case((BF16,), F8_E4M3, 2, 2, 100003, 3, "normal", "extrapolate", "stochastic")
    inputs, outputs = guarded(case)
    whole = piece_of(case, inputs, outputs)
    pieces = []
    for first, count in ((0, 16384), (16384, 49152), (65536, 34467)):
        addresses = [(address + 2 * first, c) for address, c in whole["inputs"]]
        outs = [out + first for out in whole["outputs"]]
        pieces.append(whole | {"inputs": addresses, "outputs": outs, "numel": count, "first": first})
    done = TritonDevice().queue().run(pieces)
    names = done[0].stats()[0].keys()
    check_case(case, inputs, outputs, [{n: sum(p.stats()[j][n] for p in done) for n in names} for j in range(2)])


# --- weights by row and by column ------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize(
    ("dtypes", "out"), [((BF16, BF16, BF16), BF16), ((F16, F32, F8_E5M2), F16), ((F32, F64, BF16), F64)], ids=str
)
@pytest.mark.parametrize("kind", ["close", "patterns"])
def test_weights_by_group(per, dtypes, out, kind):
    from fastinterp.compute.ops import GroupRow

    columns, rows = 119, 37
    data = raws(kind, list(dtypes), rows * columns)
    groups, rng = rows if per == "row" else columns, np.random.default_rng(5)
    asked = []
    for total in (1.0, 0.9):
        weights = rng.normal(size=groups * 2)
        weights[rng.random(groups * 2) < 0.3] = 0  # skipped, not multiplied
        asked.append(GroupRow(0, array("d", [total] * groups), (2, 1), array("d", weights)))
    sources, sinks = pumps.guarded(data), [Guarded(rows * columns * out.bits // 8, 5 + k) for k in range(2)]
    step = {
        "kind": "combine", "inputs": [(i, 0, code(d)) for i, d in enumerate(dtypes)], "numel": rows * columns,
        "sinks": [0, 1], "offsets": [0, 0], "out_dtype": code(out), "columns": columns, "per": per, "keys": [3, 4],
        "rows": [(row.pivot, row.totals, list(row.inputs), row.weights) for row in asked],
    }  # fmt: skip
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
    step = {
        "kind": "measure_deltas" if deltas else "measure", "numel": numel,
        "inputs": [(i, 0, code(d)) for i, d in enumerate(dtypes)],
    }  # fmt: skip
    sources = pumps.guarded(data)
    return data, run("", [step | keys], memory(sources), []).answers()[0]


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
    monkeypatch.setattr(TritonPump, "most", 2 * 16384 * 4)
    data, got = measured([BF16, BF16], 4 * 16384 + 77, True, "close")
    assert_same_answer(reference.measure(data, [BF16, BF16], True), got)


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("per", ["row", "column"])
def test_measures_by_row_and_column(per, columns, monkeypatch):
    dtypes, numel = [BF16, F32], 70 * columns
    reference_of = reference_groups.measure_rows if per == "row" else reference_groups.measure_columns
    data, got = measured(dtypes, numel, True, per=per, columns=columns)
    assert_same_answer(reference_of(data, dtypes, True, columns), got)
    monkeypatch.setattr(TritonPump, "most", 64 * columns * 8)
    data, got = measured(dtypes, numel, False, "patterns", per=per, columns=columns)
    assert_same_answer(reference_of(data, dtypes, False, columns), got)


def test_measures_of_rows_of_several_chunks():
    data, got = measured([BF16, BF16], 40000, True, per="row", columns=20000)
    assert_same_answer(reference_groups.measure_rows(data, [BF16, BF16], True, 20000), got)


# --- histograms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deltas", "spread", "divergence"])
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
    ask = test_masked.ask_of(3, choices["random"], choices["votes"], choices["shares"])
    test_masked.check("", data, dtypes, [ask], out, shape, rounding="stochastic", fp8_overflow="nonfinite")


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_importance(dtype):
    test_masked.test_importance("", dtype, "patterns")


KEEPS = {**test_keeps.KEEPS, "band": Keep(0x39000000, 0x3C000000, 0.7)}
FACTORS = array("f", (0.5 + r % 3 for r in range(30))).tobytes()


@pytest.mark.parametrize(
    ("dtypes", "keeps", "score"),
    [
        ((BF16, F32, BF16, F16), ("least", "random", "band"), None),
        ((F64, BF16, F64), ("least", None), None),
        ((F8_E4M3, F8_E5M2, F16), ("least", "random"), Score("spread", b"", 0x38000000)),
        ((BF16, BF16, BF16), ("least", "all"), Score("divergence", FACTORS, 0x3A000000)),
    ],
    ids=["keeps", "f64", "spread", "divergence"],
)
def test_what_keeps_leave(dtypes, keeps, score, monkeypatch):
    if score is None:
        monkeypatch.setattr(TritonPump, "most", 16384)  # a chunk
    shape, asked = (30, 613), tuple(None if name is None else KEEPS[name] for name in keeps)
    data = raws("normal", list(dtypes), math.prod(shape))
    test_keeps.check_kept("", data, list(dtypes), asked, shape, 1, score)


# --- the device ------------------------------------------------------------------------------------------------------


def test_memory_and_copies():
    device = TritonDevice()
    host, there = device.host(100), device.memory(100)
    host.view[:] = bytes(range(100))
    queue = device.queue()
    queue.upload(there.address, host.address, 100)
    host.view[:] = bytes(100)
    other = device.queue(0)
    other.after(queue.record())
    other.download(host.address + 1, there.address, 99)
    assert other.record().done()
    assert bytes(host.view[:4]) == b"\0\0\1\2"
    assert device.free_bytes() > 0
    assert (device.name, device.backend, device.label) == ("triton:0", "triton", "Triton's interpreter")
    there.free()


def test_too_little_memory():
    with pytest.raises(OutOfMemory, match=r"^memory of 1152921504606846976 bytes on triton:0: "):
        TritonDevice().memory(1 << 60)


def test_errors_name_call_and_device(monkeypatch):
    def fails(*_):
        raise RuntimeError("a launch failed\nand more")

    monkeypatch.setattr("fastinterp.compute.triton_sums.combine", fails)
    piece = {"kind": "combine", "numel": 10}
    what = r"^kernels for 1 pieces, at most 80 bytes an operand, on triton:0: a launch failed$"
    with pytest.raises(BackendError, match=what):
        TritonDevice().queue().run([piece])


def test_tritons_that_round_differently(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.8.1+git")
    assert missing() == "triton 3.8.1+git rounds differently: 3.9 or newer is needed"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert missing() == ""
    monkeypatch.setattr("triton.__version__", "3.5.0")
    assert missing() == "triton 3.5.0 rounds differently: 3.6 or newer is needed"


def test_devices_that_are_not_there():
    with pytest.raises(BackendError, match="device triton:1 cannot be used: there are 1, numbered from 0"):
        TritonDevice(1)


def test_what_is_refused():
    refuses = TritonDevice().refuses
    keep = {"least": 0, "most": 1, "lo": 1, "hi": 2, "key": 3}
    assert refuses({"kind": "divergence", "inputs": []}) == "the divergence of rows"
    assert refuses({"kind": "kept", "inputs": [], "keeps": [keep, keep]}) == "random keeps by rank"
    assert refuses({"kind": "kept", "inputs": [], "keeps": [keep, keep | {"hi": 1}]}) is None
    assert refuses({"kind": "masked", "inputs": [], "masked": [{"terms": [{"keep": keep}]}]}) == "random keeps by rank"
    assert refuses({"kind": "combine", "inputs": [([(0, 0, 1)], 3, b"")]}) == "rows gathered from several places"
