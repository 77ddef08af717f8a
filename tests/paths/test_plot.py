"""Figures: what is drawn, read back from the SVG's text, and what is refused."""

from __future__ import annotations

import re
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import StorageError, UsageError
from fastinterp.inspect.compare import compare
from fastinterp.paths import plot
from fastinterp.paths.layer_grid import NO_LAYER, grid
from tests.support.models import bf16, layers, save

ZERO, ONE = {"w": np.zeros(4, np.float32)}, {"w": np.ones(4, np.float32)}


def texts(file):
    """The texts of an SVG figure, in order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text("utf-8"))


def line(alphas=(-0.5, 0, 0.25, 0.5, 1, 1.5), seeds=2):
    def measured(weights, alpha, seed):
        return {"P(positive)": 0.2 + 0.3 * alpha + 0.01 * seed, "loss": 1 + alpha * alpha}

    return fastinterp.path(ZERO, ONE).evaluate(measured, alphas, seeds)


def plane():
    path = fastinterp.path(base=ZERO, directions={"positive": ONE, "formal": ONE})
    return path.evaluate(lambda w, a, s: {"sum": w["w"][0]}, {"positive": [0, 1, 2], "formal": [0, 10]})


def run(*args):
    return CliRunner().invoke(commands, args, prog_name="fastinterp")


def test_curves_have_chord_ends_and_shaded_range(tmp_path):
    line().plot(tmp_path / "x.svg")
    found = texts(tmp_path / "x.svg")
    for text in ("P(positive)", "loss", "alpha", "between the ends", "chord", "ends"):
        assert text in found, text
    assert "effective alpha" not in found


def test_no_chord_is_drawn_where_an_end_is_missing(tmp_path):
    line([0.0, 0.5]).plot(tmp_path / "x.svg", ["loss"])
    found = texts(tmp_path / "x.svg")
    assert "chord" not in found and "ends" in found and "P(positive)" not in found


def test_staircase_has_a_panel_of_its_own(tmp_path):
    bits = bf16(np.linspace(1, 2, 4096)).astype(np.int16)
    a, b = ({"w": torch.from_numpy(bits + np.int16(k)).view(torch.bfloat16)} for k in (0, 1))
    found = fastinterp.path(a, b).evaluate(lambda w, a, s: {"m": a}, [0, 0.25, 0.75, 1])
    found.plot(tmp_path / "x.svg")
    assert {"effective alpha", "after rounding"} <= set(texts(tmp_path / "x.svg"))


def test_two_directions_make_a_heat_map_with_its_values(tmp_path):
    plane().plot(tmp_path / "x.svg")
    found = texts(tmp_path / "x.svg")
    assert {"positive", "formal", "sum"} <= set(found)
    assert {"0", "1", "2", "10", "11", "12"} <= set(found)


def test_same_report_draws_the_same_bytes(tmp_path):
    for name in ("a.svg", "b.svg"):
        line().plot(tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_values_that_are_not_finite_are_gaps(tmp_path):
    values = {0.0: 1.0, 0.5: float("inf"), 1.0: float("nan"), 2.0: 3.0}
    found = fastinterp.path(ZERO, ONE).evaluate(lambda w, a, s: {"m": values[a]}, list(values))
    found.plot(tmp_path / "x.png")
    width, height = struct.unpack(">II", (tmp_path / "x.png").read_bytes()[16:24])
    assert width > 300 and height > 200


def test_what_cannot_be_drawn_is_refused(tmp_path):
    report = line()
    with pytest.raises(UsageError, match=r"must end in \.png, \.svg or \.pdf"):
        report.plot(tmp_path / "x.gif")
    with pytest.raises(UsageError, match="no metric is called 'los'"):
        report.plot(tmp_path / "x.png", ["los"])
    with pytest.raises(UsageError, match="there is one point"):
        line([0.5]).plot(tmp_path / "x.png")
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        report.plot(tmp_path / "none" / "x.png")
    names = ["x", "y", "z"]
    cube = fastinterp.path(base=ZERO, directions=dict.fromkeys(names, ONE))
    with pytest.raises(UsageError, match="vary in 3: x, y, z"):
        cube.evaluate(lambda w, a, s: {"m": 0}, {n: [0, 1] for n in names}).plot(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_command_draws_a_report(tmp_path):
    line().to_json(tmp_path / "r.json")
    done = run("plot", str(tmp_path / "r.json"), "-o", str(tmp_path / "x.svg"), "--metric", "loss")
    assert (done.exit_code, done.output) == (0, "")
    assert "loss" in texts(tmp_path / "x.svg")
    assert run("plot", str(tmp_path / "none.json"), "-o", str(tmp_path / "y.svg")).exit_code == 4


def test_diff_refuses_a_figure_before_it_measures(tmp_path, monkeypatch):
    monkeypatch.setattr("fastinterp.inspect.compare.compare", lambda *_, **__: pytest.fail("measured"))
    for name, code in (("x.gif", 2), ("none/x.png", 4)):
        assert run("diff", "a", "b", "--plot", str(tmp_path / name)).exit_code == code


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install 'fastinterp\[plot\]'"):
        line().plot(tmp_path / "x.png")


def test_metrics_need_no_matplotlib():
    program = "import fastinterp.paths.path, fastinterp.paths.plot, sys; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- differences


def test_grid_has_layers_across_and_kinds_down():
    names = [
        "model.layers.10.q",
        "model.layers.2.q",
        "model.layers.2.experts.7.w",
        "model.layers.2.experts.1.w",
        "head",
    ]
    found = grid(names)
    assert found.layers == [NO_LAYER, "2", "10"]
    assert found.kinds == ["experts.*.w", "q", "head"]
    assert found.cells["experts.*.w", "2"] == ["model.layers.2.experts.1.w", "model.layers.2.experts.7.w"]


def test_grid_keeps_two_stacks_apart():
    found = grid(["encoder.0.q", "decoder.0.q"])
    assert set(found.kinds) == {"encoder.*.q", "decoder.*.q"}


def test_diff_draws_the_change_of_each_layer(tmp_path, monkeypatch):
    x = layers(1)
    y = layers(1, noise=0.01) | {"model.layers.0.norm.weight": x["model.layers.0.norm.weight"]}
    y["model.layers.1.norm.weight"] = bf16([np.nan] * 4)
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a", x)
    save(tmp_path / "b", y)
    done = run("diff", "a", "b", "--plot", "x.svg", "--quiet")
    assert done.exit_code == 0 and "model.layers.2" in done.output
    found = texts(tmp_path / "x.svg")
    for text in ("mlp.up_proj.weight", "norm.weight", "model.embed_tokens.weight", "-", "0", "1", "2"):
        assert text in found, text
    assert "b against a" in found and "relative change |d| / |a|" in found
    assert {"unchanged", "no number: a is 0, or NaN"} <= set(found)


def test_diff_of_equal_models_draws_that_nothing_changed(tmp_path):
    a = save(tmp_path / "a", layers(1))
    plot.plot_difference(compare(a, a), tmp_path / "x.svg", "a long title " * 100)
    assert "unchanged" in texts(tmp_path / "x.svg")


def test_nothing_in_common_is_refused(tmp_path):
    a, b = save(tmp_path / "a", {"x": bf16([1.0])}), save(tmp_path / "b", {"x": bf16([1.0, 2.0])})
    with pytest.raises(UsageError, match="there is no change to draw"):
        plot.plot_difference(compare(a, b), tmp_path / "x.svg", "none")
