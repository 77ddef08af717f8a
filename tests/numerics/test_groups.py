"""Sums, weights and divergence by row and by column: the pump against the reference, that against float64."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.errors import UsageError
from fastinterp.methods import find
from fastinterp.ops import steps
from fastinterp.ops.combine import GroupRow, Row, Tensor
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32, F64, DType
from fastinterp.ops.requests import GroupCombine
from fastinterp.plan.method_run import MethodRun, foreseen_reads
from fastinterp.reference import combine as reference
from fastinterp.reference import groups as reference_groups
from tests.support import backends
from tests.support.cases import fill
from tests.support.checkpoints import read, tensor, write
from tests.support.pumps import code, stored

Raw = np.ndarray[Any, np.dtype[np.uint8]]
MIXED = (BF16, F32, F16)


def raws(kind: str, dtypes: Sequence[DType], numel: int) -> list[Raw]:
    """Tensors in memory, each at an odd address."""
    made = []
    for i, dtype in enumerate(dtypes):
        raw = fill(kind, dtype, numel, i, np.random.default_rng([7, i])).view(np.uint8)
        made.append(np.concatenate([np.zeros(2 * i + 1, np.uint8), raw])[2 * i + 1 :])
    return made


def memory(raw: Raw) -> tuple[str, int, int]:
    return "memory", raw.ctypes.data, raw.size


def run(
    data: Sequence[Raw],
    dtypes: Sequence[DType],
    outputs: Sequence[Raw],
    step: Callable[..., steps.Step],
    **options: Any,
) -> Pump:
    """One step over memory, to its end without an error. step: makes it, given `inputs` and `numel`."""
    settings: dict[str, Any] = {
        "isa": backends.usable()[0], "threads": 2, "write_bytes": 4096, "read_bytes": 4096, "stats_every": 1,
    }  # fmt: skip
    made = step(inputs=stored(dtypes), numel=data[0].size * 8 // dtypes[0].bits)
    pump = Pump([memory(x) for x in data], [memory(x) for x in outputs], [made], PumpOptions(**(settings | options)))
    pump.start()
    assert pump.wait(60)
    pump.join()
    assert pump.error() is None
    return pump


def assert_same_numbers(want: np.ndarray, got: np.ndarray, what: str) -> None:
    """The same bits, but for NaN, of which neither sign nor payload is promised."""
    nan = np.isnan(want)
    assert np.array_equal(nan, np.isnan(got)), what
    assert want[~nan].tobytes() == got[~nan].tobytes(), what


# --- measure ---------------------------------------------------------------------------------------------------------


def check_measure(kind: str, dtypes: Sequence[DType], shape: tuple[int, int], deltas: bool, **options: Any) -> None:
    data = raws(kind, dtypes, shape[0] * shape[1])
    oracles: dict[Any, Any] = {"row": reference_groups.measure_rows, "column": reference_groups.measure_columns}
    for per, oracle in oracles.items():
        want, want_nonzero = oracle(data, dtypes, deltas, shape[1])
        step = partial(steps.Measure, deltas=deltas, per=per, columns=shape[1])
        for isa in backends.usable():
            ((sums, nonzero),) = run(data, dtypes, [], step, isa=isa, **options).answers()
            assert_same_numbers(want.ravel(), np.array(sums), f"{isa} {per}")
            assert np.array_equal(want_nonzero.ravel(), np.array(nonzero)), f"{isa} {per}"


@pytest.mark.parametrize("deltas", [False, True], ids=["inputs", "deltas"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1), (3, 1), (1, 3), (200, 1), (129, 3), (65, 17), (64, 33), (7, 255), (5, 256), (3, 257), (130, 300),
     (2, 1025), (2, 16384), (3, 16385), (1, 40000), (4, 2049)],
    ids=str,
)  # fmt: skip
def test_measure_of_shapes(shape, deltas):
    """Around every edge of lanes, tiles, chunks and blocks, and what is read at a time."""
    check_measure("close", (BF16, BF16), shape, deltas)


@pytest.mark.parametrize("dtypes", [(F64,), (F8_E4M3, F16), (F64, F32), MIXED, (BF16, F32, F16, F64, BF16)], ids=str)
@pytest.mark.parametrize("kind", ["normal", "subnormal", "patterns"])
def test_measure_of_dtypes(dtypes, kind):
    """Sums of NaN, Inf, overflow and underflow too."""
    check_measure(kind, dtypes, (70, 37), True)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 7])
def test_measure_on_any_number_of_threads(threads):
    """Many pieces: blocks of columns fold in the same pairs whichever is ready first."""
    check_measure("normal", (BF16,), (7 * 64 + 3, 4096), False, threads=threads)
    check_measure("normal", (BF16,), (19000, 31), False, threads=threads)


def test_a_row_is_measured_as_a_tensor():
    """Rows have the answers that they would have by themselves, the whole as one row included."""
    data = raws("normal", MIXED, 3 * 20000)
    found, nonzero = reference_groups.measure_rows(data, MIXED, True, 20000)
    for r in range(3):
        own = [raw[r * 20000 * d.bits // 8 : (r + 1) * 20000 * d.bits // 8] for raw, d in zip(data, MIXED, strict=True)]
        want, want_nonzero = reference.measure(own, MIXED, True)
        assert found[r].tobytes() == want.tobytes() and nonzero[r].tolist() == want_nonzero.tolist()


def test_reference_columns_are_near_the_exact_sums():
    (raw,) = raws("normal", (F32,), 300 * 5)
    x = raw.copy().view(np.float32).reshape(300, 5).astype(np.longdouble)
    sums, nonzero = reference_groups.measure_columns([raw], [F32], False, 5)
    assert (abs(sums[:, 0] - (x * x).sum(0)) <= 300 * 2.0**-53 * (x * x).sum(0)).all()
    assert (abs(sums[:, 1] - abs(x).sum(0)) <= 300 * 2.0**-53 * abs(x).sum(0)).all()
    assert nonzero[:, 0].tolist() == np.count_nonzero(x, axis=0).tolist()


# --- combine ---------------------------------------------------------------------------------------------------------


def group_rows(n: int, groups: int, outputs: int) -> list[GroupRow]:
    """Weights with zeros among them; totals that are all 1 for the first output only."""
    rng = np.random.default_rng(groups)
    rows = []
    for k in range(outputs):
        weights = rng.normal(size=(groups, n - 1)) * (rng.random((groups, n - 1)) > 0.25)
        totals = np.ones(groups) if k == 0 else 1 + rng.normal(size=groups) * (rng.random(groups) > 0.5)
        others = tuple(i for i in range(n) if i != k % n)
        rows.append(GroupRow(k % n, array("d", totals), others, array("d", weights.ravel())))
    return rows


def check_combine(
    kind: str, dtypes: Sequence[DType], out: DType, shape: tuple[int, int], per: Any, outputs: int = 2, **options: Any
) -> None:
    data = raws(kind, dtypes, shape[0] * shape[1])
    rows = group_rows(len(dtypes), shape[0] if per == "row" else shape[1], outputs)
    stochastic, saturate = options.get("stochastic", False), options.get("fp8_saturate", True)
    keys = [11 * k + 5 for k in range(outputs)]
    want, stats = reference_groups.combine_groups(
        data, dtypes, rows, out, per, shape[1], rounding="stochastic" if stochastic else "nearest", keys=keys,
        fp8_overflow="saturate" if saturate else "nonfinite", stats_every=2,
    )  # fmt: skip
    step = partial(
        steps.GroupCombine, per=per, columns=shape[1], out_dtype=code(out), keys=tuple(keys), rows=tuple(rows),
        sinks=tuple(range(outputs)), offsets=(3,) * outputs,
    )  # fmt: skip
    for isa in backends.usable():
        made = [np.full(w.size + 7, 0xA5, np.uint8) for w in want]
        pump = run(data, dtypes, made, step, isa=isa, stats_every=2, **options)
        for k, expected in enumerate(want):
            backends.assert_same_bits(expected, made[k][3:-4], out, f"{isa} output {k}")
            assert set(made[k][:3]) | set(made[k][-4:]) == {0xA5}
            found = pump.stats()[0][k]
            for name in ("nan_in", "inf_in", "nan_out", "inf_out", "sampled", "changed"):
                assert found[name] == getattr(stats[k], name), (isa, name)
            bound = 1e-9 * stats[k].scale_od
            assert np.isnan(stats[k].sum_od) or abs(found["sum_od"] - stats[k].sum_od) <= bound or kind != "normal"


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (40, 1), (700, 3), (3, 1023), (5, 1025), (2, 20000)], ids=str)
def test_combine_of_shapes(shape, per):
    check_combine("normal", (BF16, BF16, BF16), BF16, shape, per)


@pytest.mark.parametrize("per", ["row", "column"])
@pytest.mark.parametrize("kind", ["normal", "patterns"])
@pytest.mark.parametrize(
    ("dtypes", "out"),
    [((F32,), F16), ((F64, BF16), F32), (MIXED, F8_E4M3), ((F16, F8_E4M3, F64, BF16), BF16)],
    ids=str,
)
def test_combine_of_dtypes(dtypes, out, kind, per):
    check_combine(kind, dtypes, out, (31, 67), per, outputs=3)


@pytest.mark.parametrize("options", [{"stochastic": True}, {"fp8_saturate": False}, {"threads": 7}], ids=str)
def test_combine_with_options(options):
    check_combine("patterns", MIXED, F8_E4M3, (37, 600), "row", **options)
    check_combine("patterns", MIXED, F8_E4M3, (37, 600), "column", **options)


def summing(row: GroupRow, per: Any) -> Callable[..., steps.Step]:
    """What makes a step that writes one output, of float32 in rows of three."""
    return partial(steps.GroupCombine, per=per, columns=3, out_dtype=code(F32), rows=(row,), sinks=(0,), offsets=(0,))


@pytest.mark.parametrize("per", ["row", "column"])
def test_a_weight_of_zero_lets_nothing_through(per):
    """An infinity in an input reaches only the groups that give it a weight, and is counted only there."""
    x = [np.ones(6, np.float32), np.full(6, np.inf, np.float32)]
    out = np.zeros(6, np.float32)
    by_row = per == "row"
    row = GroupRow(0, array("d", [1, 1] if by_row else [1, 1, 1]), (1,), array("d", [0, 2] if by_row else [0, 2, 0]))
    step = summing(row, per)
    pump = run([v.view(np.uint8) for v in x], (F32, F32), [out.view(np.uint8)], step)
    inf = np.inf
    assert out.tolist() == ([1, 1, 1, inf, inf, inf] if per == "row" else [1, inf, 1, 1, inf, 1])
    (stats,) = pump.stats()[0]
    assert stats["inf_in"] == stats["inf_out"] == (3 if per == "row" else 2)


def test_rows_of_group_combines():
    """Which input is the pivot, which are not read, and what is a copy."""
    assert GroupCombine(array("d", [0, 0, 2, 0, 0, 0]), 3, "row", base=0).row() == GroupRow(
        0, array("d", [1, 1]), (2,), array("d", [2, 0])
    )
    assert GroupCombine(array("d", [0, 0.25, 0.5, 0, 0.5, 0.5]), 3, "row").row() == GroupRow(
        1, array("d", [0.75, 1.0]), (2,), array("d", [0.5, 0.5])
    )
    assert GroupCombine(array("d", [0.3, 0.7]), 2, "column", sums_to_one=True).row() == GroupRow(
        0, array("d", [1.0]), (1,), array("d", [0.7])
    )
    assert GroupCombine(array("d", [0, 0, 0, 0]), 2, "row", base=0).row() == Row(0)
    assert GroupCombine(array("d", [0, 1, 0, 1]), 2, "row").row() == Row(1)
    with pytest.raises(ValueError, match="base carries no weight"):
        GroupCombine(array("d", [1, 1]), 2, "row", base=0).row()
    assert GroupCombine(array("d", [0, 0, 0, 0]), 2, "row").row() == Row(0, 0.0)
    with pytest.raises(ValueError, match="a weight for each input"):
        GroupCombine(array("d", [0, 1, 1]), 2, "row").row()


# --- divergence ------------------------------------------------------------------------------------------------------


def exact_divergence(data: Sequence[Raw], dtypes: Sequence[DType], columns: int) -> np.ndarray:
    """By numpy, in float64."""
    soft = []
    for raw, dtype in zip(data, dtypes, strict=True):
        x = reference.widen(raw, dtype).astype(np.float64).reshape(-1, columns)
        e = np.exp(x - x.max(axis=1, keepdims=True))
        soft.append(e / e.sum(axis=1, keepdims=True) + 1e-8)
    return (soft[1] * np.log(soft[1] / soft[0])).sum(axis=1)


def check_divergence(data: Sequence[Raw], dtypes: Sequence[DType], columns: int, **options: Any) -> np.ndarray:
    want = reference_groups.divergence(data, dtypes, columns)
    for isa in backends.usable():
        ((found, counts),) = run(
            data, dtypes, [], partial(steps.Divergence, columns=columns), isa=isa, **options
        ).answers()
        assert_same_numbers(want, np.array(found), isa)
        assert len(counts) == 0
    return want


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F64), (F16, F8_E4M3)], ids=str)
@pytest.mark.parametrize(
    "shape", [(300, 1), (4000, 2), (70, 3), (9, 256), (3, 1025), (2, 16384), (2, 16385), (1, 40000)], ids=str
)
def test_divergence(shape, dtypes):
    data = raws("normal", dtypes, shape[0] * shape[1])
    found = check_divergence(data, dtypes, shape[1])
    assert abs(found - exact_divergence(data, dtypes, shape[1])).max() <= 1e-12


def test_divergence_of_peaks():
    """Rows where one element has all the probability, and the others underflow to nothing."""
    x = np.zeros((4, 50), np.float32)
    x[0, 3], x[1, 3], x[2, 0], x[3] = 3e38, 700, -3e38, np.linspace(-800, 0, 50)
    data = [x.view(np.uint8).ravel(), np.ascontiguousarray(x[:, ::-1]).view(np.uint8).ravel()]
    found = check_divergence(data, (F32, F32), 50)
    assert np.allclose(found, exact_divergence(data, (F32, F32), 50), rtol=1e-12, atol=1e-12)
    assert np.isfinite(found).all()


def test_divergence_of_itself_is_nothing_and_of_patterns_is_nan():
    (raw,) = raws("normal", (F32,), 600)
    assert check_divergence([raw, raw], (F32, F32), 200).tolist() == [0, 0, 0]
    data = raws("patterns", (BF16, BF16), 65536)
    assert np.isnan(check_divergence(data, (BF16, BF16), 4096)).any()


def test_exp_and_log_are_near_the_exact_ones():
    """To 1e-15 of themselves, from end to end."""
    x = np.concatenate([-np.geomspace(1e-300, 708, 30001), [-0.0, -708.0, -0.34657359027997264]])
    exact = np.exp(x.astype(np.longdouble))
    assert (abs(reference_groups.exp(x) - exact) <= 1e-15 * exact).all()
    assert reference_groups.exp(np.array([-708.5, -np.inf])).tolist() == [0, 0]
    y = np.concatenate(
        [np.geomspace(1e-300, 1e300, 30001), 1 + np.linspace(-1e-5, 1e-5, 1001), 1 + np.linspace(-0.5, 1, 999)]
    )
    exact = np.log(y.astype(np.longdouble))
    assert (abs(reference_groups.log(y) - exact) <= 1e-15 * abs(exact)).all()


# --- what is refused -------------------------------------------------------------------------------------------------


LANE: Any = "lane"


class Nonsense(steps.Step, frozen=True, kw_only=True):
    kind = "nonsense"


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (partial(steps.Measure, per="row"), "whole rows"),
        (partial(steps.Measure, per="row", columns=4), "whole rows"),
        (partial(steps.Measure, per=LANE, columns=2), "tensor, row or column"),
        (partial(steps.Divergence, columns=2), "two inputs"),
        (Nonsense, "no such kind of step: nonsense"),
    ],
)
def test_wrong_steps_are_refused(step, said):
    with pytest.raises(ValueError, match=said):
        run([np.zeros(24, np.uint8)], (F32,), [], step)


@pytest.mark.parametrize("totals", [array("d", [1.0]), array("f", [1.0] * 4), array("d", [1.0] * 3)], ids=str)
def test_wrong_coefficients_are_refused(totals):
    step = summing(GroupRow(0, totals, (), b""), "row")
    with pytest.raises(ValueError, match=r"contiguous buffer of float64|totals for 2 rows"):
        run([np.zeros(24, np.uint8)], (F32,), [np.zeros(24, np.uint8)], step)


def test_bytes_are_coefficients_too():
    x, out = np.arange(6, dtype=np.float32), np.zeros(6, np.float32)
    totals = bytes(memoryview((ctypes.c_double * 2)(2.0, 3.0)))
    step = summing(GroupRow(0, totals, (), b""), "row")
    run([x.view(np.uint8)], (F32,), [out.view(np.uint8)], step)
    assert out.tolist() == [0, 2, 4, 9, 12, 15]


def test_tensors_without_rows():
    """No rows to answer for; a column without rows sums to 0."""
    nothing = np.zeros(0, np.uint8)
    for step, reals, counts in (
        (partial(steps.Measure, per="row"), 0, 0),
        (partial(steps.Measure, per="column"), 4 * 5, 4 * 2),
        (steps.Divergence, 0, 0),
    ):
        (answer,) = run([nothing, nothing], (F32, BF16), [], partial(step, columns=4)).answers()
        assert [list(part) for part in answer] == [[0] * reals, [0] * counts]


def test_weights_by_row_that_do_not_fit_are_refused(tmp_path):
    """Before they are measured: statistics of many short rows are larger than the rows."""
    for name in ("base", "a", "b"):
        values = np.random.default_rng(len(name)).normal(size=(30_000, 4))
        write(tmp_path / name, {"w": tensor(values + (name == "b"), BF16)})
    asked = {
        "merge_method": "model_stock", "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / n)} for n in "ab"], "parameters": {"filter_wise": True},
    }  # fmt: skip
    with pytest.raises(UsageError, match="w needs 5760000 bytes for statistics or weights, some of them for each row"):
        fastinterp.merge(asked, tmp_path / "out", threads=1, max_memory="4MB")
    fastinterp.merge(asked, tmp_path / "out", threads=1, max_memory="8MB")
    assert read(tmp_path / "out")["w"].shape == (30_000, 4)


@pytest.mark.parametrize("name", ["model_stock", "arcee_fusion", "nuslerp"])
def test_planning_takes_no_longer_for_more_rows(name):
    """What is read is foreseen from one group that is made up, so rows may be beyond counting."""
    every: dict[str, dict[str, Any]] = {
        "model_stock": {"filter_wise": True}, "arcee_fusion": {},
        "nuslerp": {"weight": (1, 1), "nuslerp_flatten": False},
    }  # fmt: skip
    n = 3 if name == "model_stock" else 2
    call = partial(find(name), n, Tensor("w", (10**12, 4)), **every[name])
    reads, whole = foreseen_reads(MethodRun("w", [call], [0]), n, (10**12, 4))
    assert [what for what, _ in reads][-1] == "combine" and not whole
    assert all(inputs == tuple(range(n)) for _, inputs in reads)
