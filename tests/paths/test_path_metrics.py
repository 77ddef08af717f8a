"""What becomes of the metrics along a path: means, shape, files, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import StorageError, UsageError
from fastinterp.paths import curve
from fastinterp.paths.report import PathReport
from tests.paths.test_path import ALPHAS, first, logistic, model, report


def test_seeds_give_means_and_standard_errors():
    calls = []

    def measured(alpha, seed):
        calls.append((alpha, seed))
        return {"m": alpha + seed}

    found = report(measured, [0.5, 0.0], [1, 2, 6])
    assert calls == [(0.5, 1), (0.5, 2), (0.5, 6), (0.0, 1), (0.0, 2), (0.0, 6)]
    point = found.points[0]
    assert point.mean("m") == 3.5
    assert point.se("m") == pytest.approx(np.std([1.5, 2.5, 6.5], ddof=1) / math.sqrt(3))
    assert report(lambda a, s: {"m": a}, [0.5]).points[0].se("m") is None


def test_seeds_that_agree_have_no_error():
    """The sum of three 0.4 is not 1.2, so that a mean by it would be beside them all."""
    point = report(lambda a, s: {"m": 0.4}, [0.5], 3).points[0]
    assert (point.mean("m"), point.se("m")) == (0.4, 0.0)


def test_grid_is_the_product_of_its_lists():
    path = fastinterp.path(base=model(0.0), directions={"x": model(1.0), "y": model(10.0)})
    found = path.evaluate(first, {"x": [0, 1], "y": [0, 0.5, 1]})
    assert [p.mean("w") for p in found.points] == [0, 5, 10, 1, 6, 11]
    assert found.varied == ("x", "y")
    with pytest.raises(UsageError, match="vary in x and y"):
        found.shape("w")


def test_barrier_is_measured_against_the_chord_seed_by_seed():
    """A loss with a hump of 0.5 in the middle; an offset of each seed is in the chord too, so the error is 0."""
    found = report(lambda a, s: {"loss": 1 + a + 2 * a * (1 - a) + 10 * s}, ALPHAS, 4).shape("loss")
    assert found.above.at == 0.5
    assert found.above.value == pytest.approx(0.5) and found.above.se == pytest.approx(0, abs=1e-12)
    assert found.below.value == pytest.approx(0)
    assert report(lambda a, s: {"loss": a}, [0.0, 0.5]).shape("loss").above is None


def test_metrics_of_any_size_have_a_shape():
    """Squares and differences of these are beyond float64."""
    sizes = [1e154, 1e200, 1.7e308, 5e-324]
    for unit in sizes:
        found = report(lambda a, s, unit=unit: {"m": unit * (a if s else -a)}, [0.0, 0.5, 1.0], 3)
        assert found.points[2].se("m") == pytest.approx(unit * (math.sqrt(8 / 9 / 2)), rel=1e-12 if unit > 1 else 1)
        assert found.points[2].mean("m") == pytest.approx(unit / 3, rel=1e-12 if unit > 1 else 1)
        assert json.loads(found.to_json())["shapes"]["m"]["points"] == 3 and str(found)
    found = report(lambda a, s: {"m": 1.7e308 * (2 * a - 1)})
    assert found.respace("m", 3) == [0.0, pytest.approx(0.5), 1.0]
    assert curve.mean([1.7e308, 1.7e308]) == 1.7e308


@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_named(where, value):
    """No shape is told of the points beside a NaN, and the report says where it is."""
    found = report(lambda a, s: {"m": value if a == where and s == 1 else a, "p": 0.25 + a / 2}, ALPHAS, 2)
    word = "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"
    assert found.warnings == (f"m is {word} at alpha {where:g}",)
    assert f"warning: m is {word} at alpha {where:g}" in str(found)
    shape = found.shape("m")
    if math.isnan(value):
        told = (shape.step_up, shape.step_down, shape.kink, shape.above.value, shape.below.value)
        assert all(map(math.isnan, told)) and shape.spearman is None
    else:
        assert math.inf in (shape.step_up, shape.step_down) and shape.kink is None
    assert found.shape("p").step_down == 0.0
    assert PathReport.from_json(found.to_json()).to_json() == found.to_json()


def test_how_often_a_metric_is_no_number():
    found = report(lambda a, s: {"p": math.nan if a > 0.75 else a}, probabilities=["p"])
    assert found.warnings == ("p is NaN at 3 of 11 points, first at alpha 0.8",)
    assert found.shape("p").log_odds is None


def test_steps_against_the_trend_are_found():
    values = dict(zip([0.0, 0.25, 0.5, 0.75, 1.0], [0.0, 0.4, 0.3, 0.8, 1.0], strict=True))
    found = report(lambda a, s: {"m": values[a]}, list(values)).shape("m")
    assert found.spearman == pytest.approx(0.9)
    assert (found.step_down, found.step_up) == (pytest.approx(0.1), pytest.approx(0.5))
    assert found.kink == pytest.approx(0.3)  # 0.3 lies 0.3 below the line from 0.4 to 0.8
    assert report(lambda a, s: {"m": 7.0}).shape("m").spearman is None


def test_only_points_between_the_ends_count():
    inside = report(lambda a, s: {"m": 3 + a}).shape("m")
    assert report(lambda a, s: {"m": 3 + a if 0 <= a <= 1 else -50}, [-1.0, *ALPHAS, 2.0]).shape("m") == inside


def test_log_odds_of_a_logistic_curve_are_a_line():
    found = report(lambda a, s: {"p": logistic(a), "loss": 0.5 + a}, probabilities=["p"])
    line = found.shape("p").log_odds
    assert (line.slope, line.intercept, line.r2) == (pytest.approx(6), pytest.approx(-2), pytest.approx(1))
    assert found.shape("loss").log_odds is None
    with pytest.raises(UsageError, match="`probabilities` names 'q'"):
        report(lambda a, s: {"p": 0.5}, probabilities=["q"])
    with pytest.raises(UsageError, match=r"not all of its values are in 0..1: 1.1 at alpha 0.1"):
        report(lambda a, s: {"p": 1 + a}, probabilities=["p"])


def test_log_odds_leave_out_zero_and_one():
    line = report(lambda a, s: {"p": logistic(a) if 0 < a < 1 else round(a)}, probabilities=["p"]).shape("p").log_odds
    assert line.points == 9 and line.slope == pytest.approx(6)


def test_spearman_shares_ranks_among_equal_values():
    assert curve.spearman([1, 2, 3, 4], [1, 1, 2, 2]) == pytest.approx(2 / math.sqrt(5))


@pytest.mark.parametrize("falling", [False, True])
def test_respaced_alphas_make_equal_steps(falling):
    sign = -1 if falling else 1
    alphas = [k / 100 for k in range(101)]
    found = report(lambda a, s: {"p": sign * logistic(a)}, alphas).respace("p", 6)
    steps = np.diff([logistic(a) for a in found])
    assert (found[0], found[-1]) == (0.0, 1.0)
    assert steps == pytest.approx([(logistic(1) - logistic(0)) / 5] * 5, rel=1e-3)


def test_respacing_looks_over_noise_and_refuses_a_constant():
    values = dict(zip([0.0, 1.0, 2.0, 3.0], [0.0, 2.0, 1.0, 3.0], strict=True))
    assert report(lambda a, s: {"m": values[a]}, list(values)).respace("m", 3) == [0.0, 1.0, 3.0]
    with pytest.raises(UsageError, match="no alphas make equal steps"):
        report(lambda a, s: {"m": 1.0}).respace("m")


def test_staircase_of_bf16_is_measured_and_told():
    """Deltas of about one spacing: rounding makes 0.06 of 0.25; float32 has no stairs."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(0, 0.02, 200_000).astype(np.float32)).bfloat16()
    y = (x.float() + torch.from_numpy(rng.normal(0, 1e-5, x.shape).astype(np.float32))).bfloat16()
    found = fastinterp.path({"w": x}, {"w": y}).evaluate(lambda w, a, s: {"m": a}, [0.0, 0.25, 1.0])
    assert found.effective_alpha(found.points[1]) == pytest.approx(0.06, abs=0.02)
    assert found.points[1].changed_fraction == pytest.approx(0.01, abs=0.05)
    assert [found.effective_alpha(p) for p in (found.points[0], found.points[2])] == [0.0, 1.0]
    assert "staircase" in found.warnings[0] and "alpha 0.25, which acts as 0.0" in found.warnings[0]
    assert "acts as" in str(found) and "warning: rounding" in str(found)
    exact = fastinterp.path({"w": x}, {"w": y}, dtype="float32").evaluate(lambda w, a, s: {"m": a}, [0.25])
    assert exact.effective_alpha(exact.points[0]) == pytest.approx(0.25, abs=1e-4)
    assert exact.warnings == () and "acts as" not in str(exact)


# --- files


@pytest.mark.parametrize(
    ("first", "last", "step"),
    [
        (0, 1.05, 0.1),
        (-1, 2.05, 0.1),
        (-2, 2, 0.01),
        pytest.param(-1, 2, 0.001, marks=pytest.mark.slow),
        (-0.3, 1.35, 0.05),
    ],
)
def test_sums_of_steps_reach_the_ends(first, last, step):
    """numpy.arange misses 0 and 1 by some 1e-16 to 1e-13, and the ends of the chord are where alpha is 0 and 1."""
    alphas: Any = np.arange(first, last, step)
    path = fastinterp.path(model(0.1), model(0.7))
    found = path.evaluate(lambda w, a, s: {"m": float(w["w"][0]), "given": a}, alphas)
    given = [p.at["alpha"] for p in found.points]
    assert {0.0, 1.0} <= set(given) and given == [p.samples["given"][0] for p in found.points]
    shape = found.shape("m")
    assert shape.above is not None and shape.points == sum(-1e-9 < a < 1 + 1e-9 for a in alphas)
    assert found.warnings == ()
    assert torch.equal(path.weights(alphas[np.abs(alphas - 1).argmin()])["w"], model(0.7)["w"])


def test_what_is_beside_an_end_stays_there():
    alphas = [1e-12, -1e-12, 1 - 1e-12, 1 + 1e-12, 0.30000000000000004, 1 / 3]
    found = report(lambda a, s: {"m": a}, alphas)
    assert [p.at["alpha"] for p in found.points] == alphas
    assert [report(lambda a, s: {"m": a}, [a]).points[0].at["alpha"] for a in (-0.0, -1e-16, 1 + 5e-13)] == [0, 0, 1]


def test_reports_of_sums_of_steps_have_their_ends():
    text = report(lambda a, s: {"m": a}, [0.0, 0.5, 1.0]).to_json()
    text = text.replace('"alpha": 1.0', '"alpha": 1.0000000000000002')
    assert "1.0000000000000002" in text and PathReport.from_json(text).shape("m").above is not None


def test_json_makes_the_round_trip(tmp_path):
    found = report(
        lambda a, s: {"p": logistic(a), "loss": [math.inf, math.nan, 0.1 + a][s]}, [0, 0.5, 1], 3, probabilities=["p"]
    )
    text = found.to_json(tmp_path / "r.json")
    json.loads(text, parse_constant=pytest.fail)  # no NaN or Infinity, which JSON does not have
    for again in (PathReport.from_json(tmp_path / "r.json"), PathReport.from_json(text)):
        assert again.to_json() == text and again.shape("p") == found.shape("p")
    assert json.loads(text)["shapes"]["p"]["log_odds"]["slope"] == pytest.approx(6)


@pytest.mark.parametrize(
    "text", ["{}", "{", '{"format": "fastinterp path report", "version": 1}', '{"format": 3, "version": 1}'], ids=repr
)
def test_what_is_no_report_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match="is not a path report"):
        PathReport.from_json(tmp_path / "x.json")
    with pytest.raises(StorageError, match="does not exist"):
        PathReport.from_json(tmp_path / "none.json")


def test_csv_has_a_line_per_point(tmp_path):
    text = report(lambda a, s: {"m": a + s}, [0.0, 0.5], 2).to_csv(tmp_path / "r.csv")
    assert (tmp_path / "r.csv").read_text() == text
    head, *rows = [line.split(",") for line in text.splitlines()]
    assert head[:4] == ["alpha", "m", "m_se", "seeds"]
    assert [row[:4] for row in rows] == [["0.0", "0.5", "0.5", "2"], ["0.5", "1.0", "0.5", "2"]]


# --- refusals


@pytest.mark.parametrize(
    ("alphas", "said"),
    [
        ([], "at least one alpha"),
        ([0.5, 0.5], "every point may be given once"),
        ([math.nan], "alpha must be a finite number, got nan"),
        ([10**400], "alpha must be a finite number, got 1000"),
        ([torch.zeros(2)], "alpha must be a finite number, got tensor([0., 0.])"),
        (["x"], "alpha must be a finite number, got 'x'"),
        (0.5, "the alphas must be a list"),
        ([{"beta": 1}], "unknown direction `beta`. Known: alpha"),
    ],
)
def test_wrong_alphas_are_refused_before_anything_is_called(alphas, said):
    with pytest.raises(UsageError) as caught:
        fastinterp.path(model(0.0), model(1.0)).evaluate(lambda *_: pytest.fail("called"), alphas)
    assert said in str(caught.value)


@pytest.mark.parametrize("seeds", ["x", "12", b"12", 1.5, [1.5], True, [True], None, {1: 2}, [1, 1], 0, [], -1, ["1"]])
def test_wrong_seeds_are_refused(seeds):
    with pytest.raises(UsageError, match="the seeds must be"):
        fastinterp.path(model(0.0), model(1.0)).evaluate(lambda *_: pytest.fail("called"), [0.5], seeds)


@pytest.mark.parametrize("seeds", [3, np.int64(3), range(3), np.arange(3), (0, 1, 2), torch.arange(3)])
def test_seeds_are_how_many_or_which(seeds):
    found = report(lambda a, s: {"m": a + s}, [0.5], seeds)
    assert found.seeds == (0, 1, 2) and {type(seed) for seed in found.seeds} == {int}
    json.loads(found.to_json())


@pytest.mark.parametrize("alpha", [10**400, np.zeros(2), torch.zeros(2)])
def test_alphas_that_are_no_single_finite_number(alpha):
    with pytest.raises(UsageError, match="alpha must be a finite number"):
        fastinterp.path(model(0.0), model(1.0)).weights(alpha)


@pytest.mark.parametrize("returned", [None, {}, {"m": "high"}, 0.5, {"m": np.zeros(2)}, {"m": torch.zeros(2)}])
def test_what_is_no_metric_is_refused(returned):
    with pytest.raises(UsageError, match="expected"):
        report(lambda a, s: returned, [0.0])


@pytest.mark.parametrize("fn", [None, {"m": 1.0}, "metrics"])
def test_what_is_no_function_is_refused(fn):
    with pytest.raises(UsageError, match=f"`fn` must be a function .* got {type(fn).__name__}"):
        fastinterp.path(model(0.0), model(1.0)).evaluate(fn, [0.5])


def test_error_of_the_function_tells_the_point():
    def fail(weights, alpha, seed):
        if (alpha, seed) == (0.5, 7):
            raise ZeroDivisionError("mine")
        return {"m": 1.0}

    with pytest.raises(ZeroDivisionError) as caught:
        fastinterp.path(model(0.0), model(1.0)).evaluate(fail, [0.0, 0.5], [3, 7])
    assert str(caught.value) == "mine"
    notes = getattr(caught.value, "__notes__", [])
    assert len(notes) == (sys.version_info >= (3, 11))
    assert all("at alpha 0.5, seed 7" in note for note in notes)


def test_metrics_must_be_the_same_at_all_points():
    with pytest.raises(UsageError, match="must be the same at all points"):
        report(lambda a, s: {"m": 1.0} if a == 0 else {"n": 1.0}, [0.0, 1.0])


def test_path_needs_ends_or_directions():
    with pytest.raises(UsageError, match="a direction must have a name, got ''"):
        fastinterp.path(base=model(1.0), directions={"": model(1.0)})
    for wrong in ({}, {"a": model(1.0)}, {"base": model(1.0)}, {"directions": {"x": model(1.0)}}):
        with pytest.raises(UsageError):
            fastinterp.path(**wrong)
    with pytest.raises(UsageError, match="must be a checkpoint's path or a state dict, got int"):
        fastinterp.path(3, model(1.0))  # type: ignore[arg-type]
