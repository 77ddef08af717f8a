"""The command `sweep`: its options, what it prints, and functions that it calls."""

from __future__ import annotations

import json
import sys

import pytest

import fastinterp
from tests.paths.test_sweep import command, finite, read_bytes
from tests.support.checkpoints import assert_same, read, saved


@pytest.fixture
def ends(tmp_path):
    return saved(tmp_path, finite(3))


def test_command(ends, tmp_path):
    a, b, _ = ends
    text = command("sweep", a, b, "--alphas", "-0.5:1.5:0.1", "-o", tmp_path / "path")
    assert text.startswith("21 outputs: ")
    assert str(tmp_path / "path" / "alpha_0.3") in text
    assert len(list((tmp_path / "path").iterdir())) == 21
    found = json.loads(command("sweep", a, b, "--alphas", "0", "--alphas", "0.5", "-o", tmp_path / "two", "--json"))
    assert [p["at"] for p in found] == [{"alpha": 0.0}, {"alpha": 0.5}]
    assert found[1]["report"]["bytes_read"] == read_bytes(2)
    assert command("sweep", a, b, "--alphas", "0.5", "-o", tmp_path / "q", "--quiet") == ""


@pytest.mark.parametrize("command_name", ["sweep", "interpolate"])
def test_command_takes_lists_and_ranges(ends, tmp_path, command_name):
    a, b, _ = ends
    option = "--alphas" if command_name == "sweep" else "--alpha"
    command(command_name, a, b, option, "0, 0.5:0.7:0.1,1.0000000000000002", option, "2", "-o", tmp_path / "path")
    names = {path.name for path in (tmp_path / "path").iterdir()}
    assert names == {"alpha_0", "alpha_0.5", "alpha_0.6", "alpha_0.7", "alpha_1", "alpha_2"}


def test_command_of_grids(ends, tmp_path):
    base, p, f = ends
    command(
        "sweep", "--base", base, "--add", f"pos={p}", "--add", f"formal={f}", "--grid", "pos=0:1:0.5",
        "--grid", "formal=-1,0.25", "--method", "ties", "--parameter", "density=0.5", "-o", tmp_path / "grid",
    )  # fmt: skip
    assert len(list((tmp_path / "grid").iterdir())) == 6
    said = command("sweep", "--base", base, "--add", f"pos={p}", "--grid", "pos", "-o", tmp_path / "x", code=2)
    assert "'pos' is not NAME=VALUE" in said


def test_command_virtual(ends, tmp_path):
    a, b, _ = ends
    text = command("sweep", a, b, "--alphas", "0:1:0.25", "-o", tmp_path / "v", "--virtual")
    assert text.startswith("5 recipes in ")
    command("merge", tmp_path / "v" / "alpha_0.25.yml", tmp_path / "out")
    fastinterp.interpolate(a, b, 0.25, tmp_path / "one")
    assert_same(read(tmp_path / "one"), read(tmp_path / "out"))


def test_command_in_memory(ends, tmp_path, monkeypatch):
    a, b, _ = ends
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scoring.py").write_text("def score(point, tensors):\n    return point.at['alpha'] + len(tensors)\n")
    count = len(finite(1)[0])
    found = json.loads(command("sweep", a, b, "--alphas", "0:1:0.5", "--in-memory", "scoring:score", "--json"))
    assert [p["result"] for p in found] == [count, count + 0.5, count + 1]
    assert f"{count + 0.5}" in command("sweep", a, b, "--alphas", "0.5", "--in-memory", "scoring:score")
    for named, why in (
        ("scoring", "takes MODULE:FUNCTION"),
        ("scoring:none", "no function none"),
        ("no.such:f", "No mod"),
    ):
        assert why in command("sweep", a, b, "--alphas", "0.5", "--in-memory", named, code=2)


def test_numbers_of_torch_and_numpy_are_printed(ends, tmp_path, monkeypatch):
    a, b, _ = ends
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results.py").write_text("""
import numpy as np, torch
def numbers(point, tensors):
    return {"t": torch.tensor(0.5, dtype=torch.bfloat16), "n": [np.float32(0.25), np.int64(3), np.bool_(True)],
            "d": np.float64(0.75), "one": torch.ones(1), "z": np.array(2.5), "nan": np.float64("nan"), "no": None}
def tensor(point, tensors):
    return {"loss": torch.zeros(2, 3)}
def thing(point, tensors):
    return object()
def key(point, tensors):
    return {3: 1.0}
""")
    given = ("sweep", a, b, "--alphas", "0.5", "--in-memory")
    (point,) = json.loads(command(*given, "results:numbers", "--json"))
    wanted = {"t": 0.5, "n": [0.25, 3, True], "d": 0.75, "one": 1.0, "z": 2.5, "nan": None, "no": None}
    assert point["result"] == wanted
    assert "{'t': 0.5, 'n': [0.25, 3, True]" in command(*given, "results:numbers")
    for name, what in (
        ("tensor", "a torch.Tensor of shape [2, 3]"),
        ("thing", "a builtins.object"),
        ("key", "a mapping with the key 3"),
    ):
        said = json.loads(command(*given, f"results:{name}", "--json", code=2))["wrong"][0]["message"]
        assert f"--in-memory results:{name} returned {what} at alpha_0.5, which JSON does not have" in said
        assert command(*given, f"results:{name}")


def test_a_function_that_raises_is_told_with_its_own_traceback_alone(ends, tmp_path, monkeypatch):
    a, b, _ = ends
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raising.py").write_text("def score(point, tensors):\n    return tensors['lm_head']\n")
    said = command("sweep", a, b, "--alphas", "0.5", "--in-memory", "raising:score", code=2)
    assert "UsageError: --in-memory raising:score raised KeyError: 'lm_head' at alpha_0.5" in said
    assert 'raising.py", line 2, in score' in said and "sweep_in_memory.py" not in said and "sweep.py" not in said


def test_without_torch_the_option_that_helps_is_named(ends, tmp_path, monkeypatch):
    a, b, _ = ends
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kinds.py").write_text("def kind(point, tensors):\n    return type(tensors['bf16']).__module__\n")
    monkeypatch.setitem(sys.modules, "torch", None)
    given = ("sweep", a, b, "--alphas", "0.5", "--in-memory", "kinds:kind")
    assert "sweep --framework numpy" in command(*given, code=2)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert "--dtype float32" in command(*given, "--framework", "numpy", code=2)
