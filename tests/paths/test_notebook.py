"""What notebooks show: reports as HTML, figures as objects, progress as a line; and the types of results."""

from __future__ import annotations

import io
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.progress import ProgressLine
from tests.support.models import layers, save


class Checked(HTMLParser):
    """Every element is closed in its order; collects texts of cells and names of elements."""

    def __init__(self, html):
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.names: set[str] = set()
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.names.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 1), ("b", 2)):
        save(tmp_path / name, layers(seed))
    return {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}


def test_a_report_is_a_table(pair):
    report = fastinterp.merge(pair, "<out>")
    html = report._repr_html_()
    found = Checked(html)
    assert "&lt;out&gt;" in html and "<out>" not in html
    assert "model.safetensors" in found.cells
    rounding = found.cells[found.cells.index("intended change that rounding kept") + 1]
    assert rounding == f"{report.effect.strength:.1%}"


def test_an_explanation_is_tables(pair):
    found = Checked(fastinterp.explain(pair)._repr_html_())
    assert {"a", "b", "model.safetensors"} <= set(found.cells)
    assert "x0" in found.cells and {"table", "pre"} <= found.names


def test_a_check_is_its_text(pair):
    result = fastinterp.check({**pair, "models": [{"model": "a"}, {"model": "<none>"}]})
    html = result._repr_html_()
    Checked(html)
    assert "&lt;none&gt;" in html and "<none>" not in html


def measured(**directions):
    zero, one = {"w": np.zeros(4, np.float32)}, {"w": np.ones(4, np.float32)}
    path = fastinterp.path(base=zero, directions=dict.fromkeys(directions, one)) if directions else None
    if path is not None:
        return path.evaluate(lambda w, a, s: {"m": w["w"][0]}, directions)
    line = fastinterp.path(zero, one)
    return line.evaluate(lambda w, a, s: {"p": 1 / (1 + np.exp(3 - 6 * a))}, [0, 0.5, 1], probabilities=["p"])


def test_a_path_is_tables_with_a_legend_and_the_figure():
    report = measured()
    html = report._repr_html_()
    found = Checked(html)
    assert {"table", "svg", "li"} <= found.names and "0.5" in found.cells
    for text in (html, str(report)):
        for word in ("above, below chord:", "Spearman:", "step up, down:", "kink:", "logit slope, R^2:"):
            assert word in text
    plane = Checked(measured(x=[0, 1], y=[0, 1])._repr_html_())
    assert {"table", "svg"} <= plane.names and "li" not in plane.names


def test_a_path_without_matplotlib_is_its_tables(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "svg" not in Checked(measured()._repr_html_()).names


def test_a_plot_is_a_figure_and_a_file_only_if_it_is_named(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.chdir(tmp_path)
    figure = measured().plot()
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_title(loc="left") == "p"
    assert list(tmp_path.iterdir()) == []
    assert isinstance(measured().plot("x.png"), Figure) and Path("x.png").read_bytes()[:4] == b"\x89PNG"


def test_progress_line():
    stream = io.StringIO()
    line = ProgressLine(stream)
    line(0, 10**9)
    line(1, 10**9)  # sooner than the eye follows
    line(10**9, 10**9)
    first, last = stream.getvalue().rstrip("\n").split("\r")[1:]
    assert first.startswith("  0% [                        ] 0.0 of 1.0 GB")
    assert last.startswith("100% [########################] 1.0 of 1.0 GB") and len(last) >= len(first)
    assert stream.getvalue().endswith("\n")


def test_progress_true_shows_a_line_and_false_none(pair, capsys):
    """Of every function that has it."""
    fastinterp.merge(pair, "m", progress=True)
    fastinterp.interpolate("a", "b", 0.5, "i", progress=True)
    fastinterp.average(["a", "b"], "v", in_order=True, progress=True)
    fastinterp.sweep("a", "b", [0.5], "s", progress=True)
    fastinterp.compare("a", "b", progress=True)
    fastinterp.replay("m", "r", progress=True)
    assert capsys.readouterr().err.count("100% [####") == 6
    fastinterp.verify("m", progress=True)  # of checksums, and of what is computed again
    assert capsys.readouterr().err.count("100% [####") >= 1
    fastinterp.merge(pair, "m2", progress=False)
    assert capsys.readouterr().err == ""
    seen = []
    fastinterp.merge(pair, "m3", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1]


def test_progress_of_a_program_without_stderr(pair):
    code = "import fastinterp, sys; fastinterp.interpolate('a', 'b', 0.5, 'out', progress=True)"
    done = subprocess.run(["sh", "-c", f'"{sys.executable}" -c "{code}" 2>&-'], check=False)
    assert done.returncode == 0 and Path("out/model.safetensors").is_file()


def test_results_have_the_type_of_the_inputs():
    """The annotations are what mypy checks here; the values what pytest does."""
    x, y = np.ones(3, np.float32), np.zeros(3, np.float32)
    array: np.ndarray = fastinterp.merge_tensors([x, y], "linear", parameters={"weight": 0.5})
    summed: np.ndarray = fastinterp.weighted_sum([x, y], [0.5, 0.5])
    tensor: torch.Tensor = fastinterp.merge_tensors([torch.ones(3)] * 2, "linear", parameters={"weight": 0.5})
    state: dict[str, torch.Tensor] = fastinterp.merge_state_dicts(
        [{"w": torch.ones(3)}] * 2, "linear", parameters={"weight": 0.5}
    )
    assert [type(x) for x in (array, summed, tensor, state["w"])] == [np.ndarray] * 2 + [torch.Tensor] * 2


def test_help_names_every_public_name():
    missing = [name for name in fastinterp.__all__ if name not in str(fastinterp.__doc__)]
    assert missing == []
    undocumented = [n for n in fastinterp.__all__ if n != "__version__" and not getattr(fastinterp, n).__doc__]
    assert undocumented == []
