"""What `fastinterp diff` prints, and how it and `inspect` order names."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from fastinterp.cli import commands, inspect
from tests.support.models import bf16, save


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The current folder, for checkpoints."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args):
    """A command's stdout."""
    return CliRunner().invoke(commands, args, prog_name="fastinterp", catch_exceptions=False).stdout


def test_diff_measures_by_layer_and_tensor(models):
    x = {
        "h.0.w": np.array([3.0, 0.0, 0.0, 4.0]),
        "h.1.w": np.array([1.0, 0.0]),
        "n": np.array([0.0]),
        "i": np.arange(3),
    }
    y = {
        "h.0.w": np.array([3.0, 0.0, 0.5, 4.0]),
        "h.1.w": np.array([0.0, 1.0]),
        "n": np.array([0.0]),
        "i": np.arange(3),
    }
    save(models / "x", {**x, "only": np.ones(1), "s": np.ones(2)})
    save(models / "y", {**y, "s": np.ones(3)})
    found = json.loads(run("diff", "x", "y", "--json"))
    layer = found["layers"]["h.0"]
    assert (layer["vectors"]["relative"], layer["changed_fraction"], layer["matrices"]) == (0.1, 0.25, None)
    assert (found["tensors"]["h.1.w"]["cosine"], found["tensors"]["h.1.w"]["changed"]) == (0.0, 2)
    assert found["tensors"]["n"]["relative"] is None and found["total"]["numel"] == 7
    assert tuple(found[k] for k in ("only_a", "only_b", "shapes", "unmeasured")) == (["only"], [], ["s"], ["i"])
    text = run("diff", "x", "y")
    assert (
        "1 tensor only in A: only" in text
        and "1 tensor of different shapes: s (F64 [2] in A, F64 [3] in B)" in text
        and "measured: i" in text
    )
    assert "h.0.w 1.000e-01 0.995037 25.00% 4" in " ".join(text.split())


def independent(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """A model of two layers as it is before training: matrices at random, norms of 1, biases of 0; a stacked bias."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {"embed.weight": bf16(scale * rng.standard_normal((50, 16)))}
    for i in range(2):
        tensors |= {
            f"layers.{i}.mlp.weight": bf16(0.02 * scale * rng.standard_normal((32, 16))),
            f"layers.{i}.mlp.bias": np.zeros(32, np.float32),
            f"layers.{i}.norm.weight": np.ones(16, np.float32) + 0.01 * rng.standard_normal(16).astype(np.float32),
            f"layers.{i}.gate.scale": np.ones((1, 16, 1), np.float32),
            f"layers.{i}.experts.up_bias": np.ones((4, 16), np.float32),
        }
    return tensors


def test_matrices_and_vectors_are_told_apart_so_that_independent_models_look_so(models):
    for seed, name in enumerate(("x", "y")):
        save(models / name, independent(seed))
    found = json.loads(run("diff", "x", "y", "--json"))
    every = [found["total"], *(found["layers"][f"layers.{i}"] for i in range(2))]
    for total in every:
        assert abs(total["matrices"]["cosine"]) < 0.15 and total["matrices"]["relative"] == pytest.approx(
            2**0.5, rel=0.1
        )
        assert total["vectors"]["cosine"] > 0.999
    assert found["total"]["matrices"]["numel"] == 50 * 16 + 2 * 32 * 16
    assert found["total"]["vectors"]["numel"] == 2 * (32 + 16 + 16 + 64)
    assert found["total"]["numel"] == sum(found["total"][kind]["numel"] for kind in ("matrices", "vectors"))
    text = run("diff", "x", "y")
    assert text.startswith("the matrices of A and B are nearly orthogonal (cosine ")
    assert [line.split()[0] for line in text.splitlines() if line.startswith(("layers.*", "all"))] == [
        "all", "layers.*.experts.up_bias", "layers.*.gate.scale", "layers.*.mlp.bias", "layers.*.norm.weight", "all"
    ]  # fmt: skip
    assert "all 3 matrices" in text and "all 8 vectors" in text
    save(models / "z", independent(0, scale=1.1))
    assert "orthogonal" not in run("diff", "x", "z")


def test_diff_lists_the_tensors_that_differ_most_or_all(models):
    save(models / "x", {f"t{i}": np.ones(4) for i in range(12)})
    save(models / "y", {f"t{i}": np.ones(4) * (1 + i) for i in range(12)})
    most = run("diff", "x", "y").partition("differ most")[2]
    assert [line.split()[0] for line in most.splitlines()[1:4]] == ["t11", "t10", "t9"] and "t1 " not in most
    assert "t1 " in run("diff", "x", "y", "--all").partition("tensor ")[2]


def test_diff_puts_nan_first_and_names_its_model(models):
    clean = {f"t{i}": np.ones(4, np.float32) for i in range(12)}
    save(models / "x", clean)
    save(models / "y", {**{n: t * 2 for n, t in clean.items()}, "t7": np.array([1, np.nan, 1, 1], np.float32)})
    text = run("diff", "x", "y")
    assert text.startswith("B contains NaN, Inf or numbers whose squares exceed float64, first in t7\n")
    assert text.partition("differ most")[2].splitlines()[1].split()[:2] == ["t7", "nan"]
    assert run("diff", "y", "x").startswith("A contains NaN")


def test_diff_says_first_what_is_not_in_its_table(models):
    save(models / "x", {"n": bf16([1.0]), "s": bf16([1.0, 2.0])})
    save(models / "y", {"n": np.ones(1, np.float32), "s": np.ones(3, np.float32)})
    shapes, dtypes, same, *_ = run("diff", "x", "y").splitlines()
    assert shapes == "1 tensor of different shapes: s (BF16 [2] in A, F32 [3] in B)"
    assert dtypes == "1 tensor of different dtypes: n (BF16 [1] in A, F32 [1] in B)"
    assert same == "all elements of A and B are equal in the tensors that were measured"
    text = run("diff", "x", "x")
    assert text.startswith("all elements of A and B are equal\n\n") and "differ most" not in text


def test_a_name_with_a_number_that_python_makes_no_int_of(models):
    """Of 5000 digits; it still comes after the smaller ones, and leading zeros change nothing."""
    digits = "9" * 5000
    names = ["h.2.w", "h.010.w", f"h.{digits}.w", "h.w"]
    save(models / "x", {name: bf16([1.0]) for name in reversed(names)})
    assert [t["name"] for t in json.loads(run("inspect", "x", "--json"))["tensors"]] == names
    assert "h.{2,10}.w" in run("inspect", "x") and "999...999" in run("inspect", "x")
    assert list(json.loads(run("diff", "x", "x", "--json"))["layers"]) == ["h.2", "h.010", f"h.{digits}", "h.w"]


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_cut_for_a_terminal_only(models, monkeypatch, terminal):
    """What reads a pipe looks for them."""
    name = "model.language_model.layers.0." + "encoder_decoder_cross_attention_block." * 3 + "weight"
    save(models / "x", {name: bf16([1.0]), "short": bf16([1.0])})
    save(models / "y", {name: bf16([2.0]), "short": bf16([1.0])})
    if terminal:
        monkeypatch.setattr(inspect, "sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    for arguments in (["inspect", "x", "--all"], ["inspect", "x"], ["diff", "x", "y", "--all"], ["diff", "x", "y"]):
        assert (name in run(*arguments)) != terminal, arguments


def test_models_of_which_nothing_can_be_compared_are_no_success(models):
    """Names are not cut, and the exit code is that of models that do not fit."""
    name = "model.layers.0.self_attn.a_projection_with_a_rather_long_name.weight"
    save(models / "x", {name: bf16([1.0, 2.0]), "i": np.arange(3)})
    save(models / "y", {name: np.ones(3, np.float32), "i": np.arange(3)})
    done = CliRunner().invoke(commands, ["diff", "x", "y"], prog_name="fastinterp")
    assert done.exit_code == 3
    assert f"1 tensor of different shapes: {name} (BF16 [2] in A, F32 [3] in B)\n" in done.stdout
    assert done.stderr == "ShapeError: nothing was compared: no tensor of x can be measured against one of y\n"
    done = CliRunner().invoke(commands, ["diff", "x", "y", "--json"], prog_name="fastinterp")
    assert done.exit_code == 3 and json.loads(done.stdout)["ok"] is False
