"""Commands that write one file, and what they print about the files of the origin."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cli.test_cli import run


@pytest.fixture
def models(tmp_path, monkeypatch):
    """a.safetensors and b.safetensors, ones and threes, in the current folder; the recipe of their mean."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        save_file({"w": np.full((4, 4), value, "f4")}, tmp_path / f"{name}.safetensors")
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a.safetensors}, {model: b.safetensors}]\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_file(models):
    assert "mixed.safetensors: 1 file, " in run("merge", "r.yml", "mixed.safetensors")
    assert (load_file(models / "mixed.safetensors")["w"] == 2).all()
    message = run("merge", "r.yml", "mixed.safetensors", code=4)
    assert message.startswith(
        "OutputError: mixed.safetensors: this file exists already. Add --force (in Python force=True) to replace it"
    )
    run("interpolate", "a.safetensors", "b.safetensors", "--alpha", "1", "-o", "mixed.safetensors", "--force")
    assert (load_file(models / "mixed.safetensors")["w"] == 3).all()
    message = run(
        "interpolate", "a.safetensors", "b.safetensors", "--alpha", "1", "-o", "a.safetensors", "--force", code=4
    )
    assert "inputs are never overwritten" in message and (load_file(models / "a.safetensors")["w"] == 1).all()
    (models / "old.safetensors").mkdir()
    assert "this is a folder, but the name ends as that of a file" in run("merge", "r.yml", "old.safetensors", code=4)


def test_several_files(models):
    text = run("interpolate", "a.safetensors", "b.safetensors", "--alpha", "0:1:0.5", "-o", "new/x.safetensors")
    assert sorted(p.name for p in (models / "new").iterdir()) == [
        "x_alpha_0.5.safetensors", "x_alpha_0.safetensors", "x_alpha_1.safetensors"
    ]  # fmt: skip
    assert "new/x_alpha_0.5.safetensors" in text
    run("sweep", "a.safetensors", "b.safetensors", "--alphas", "0.5", "-o", "y.safetensors")
    assert (load_file(models / "y_alpha_0.5.safetensors")["w"] == 2).all()


def test_shards_of_one_file(models):
    message = run("merge", "r.yml", "x.safetensors", "--max-shard-size", "1", code=0)
    assert "1 file" in message  # one tensor is one file, whatever its size
    save_file({"w": np.ones((4, 4), "f4"), "v": np.ones((4, 4), "f4")}, models / "a.safetensors")
    save_file({"w": np.ones((4, 4), "f4"), "v": np.ones((4, 4), "f4")}, models / "b.safetensors")
    message = run("merge", "r.yml", "z.safetensors", "--max-shard-size", "1", code=2)
    assert "the output is one file, but --max-shard-size 1 makes 2 of it. Leave that out, or name a folder" in message
    assert not (models / "z.safetensors").exists()


def test_files_left_out_are_printed(models):
    """By merge, explain and check; in full in --json."""
    for name in ("a", "b"):
        (models / name).mkdir()
        (models / f"{name}.safetensors").rename(models / name / "model.safetensors")
    for name in ("config.json", "optimizer.pt", *(f"rng_state_{i}.pth" for i in range(12))):
        (models / "a" / name).write_text("{}")
    (models / "r.yml").write_text((models / "r.yml").read_text().replace(".safetensors", ""))
    line = "not copied from a, state of a training run: optimizer.pt, rng_state_0.pth"
    for shown in (run("explain", "r.yml"), run("check", "r.yml", "--strict")):
        assert line in " ".join(shown.split()) and "and 5 more" in " ".join(shown.split())
    found = json.loads(run("merge", "r.yml", "out", "--json"))
    assert len(found["left_out"]["state of a training run"]) == 13
    assert f"note: {line}" in run("merge", "r.yml", "out2")
