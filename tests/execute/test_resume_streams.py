"""Killed runs of `--stream` go on: what was written is kept and not fetched again, and the bytes are the same."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.execute.test_resume import CLEAN, PROGRAM, ROOT, error_of, shares
from tests.support.hub_server import environment, hub_server
from tests.support.models import save
from tests.support.written import tree

pytestmark = pytest.mark.slow(10)

COUNT = 24  # tensors of a model, of 77 KB
METHODS = {
    "linear": {"merge_method": "linear"},
    "ties": {"merge_method": "ties", "base_model": "org/a"},
}


@pytest.fixture
def hub(tmp_path):
    """A stand-in for the Hub with the models org/a and org/b."""
    with hub_server() as server:
        for name, seed in (("a", 1), ("b", 2)):
            rng = np.random.default_rng(seed)
            tensors = {f"t{i}": rng.normal(size=(64, 300)).astype(np.float32) for i in range(COUNT)}
            server.add(f"org/{name}", save(tmp_path / "models" / name, tensors))
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """A merge of both, streamed into the folder of this name, with one tensor a round."""

    def run(out: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
        own = {**CLEAN, **environment(hub, tmp_path / "home"), "PYTHONPATH": str(ROOT), "ROUND": "160000", **env}
        return subprocess.run(
            [sys.executable, PROGRAM, "merge", "recipe.yml", out, "--stream", "--max-memory", "4MB", "--json", *more],
            cwd=tmp_path, env=own, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


def write_recipe(folder: Path, method: str) -> None:
    both = [{"model": f"org/{name}", "parameters": {"weight": 0.5, "density": 0.5}} for name in "ab"]
    models = {"linear": [{"model": m["model"], "parameters": {"weight": 0.5}} for m in both], "ties": both[1:]}
    (folder / "recipe.yml").write_text(yaml.safe_dump({**METHODS[method], "models": models[method]}))


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_run_that_is_killed_twice(hub, run, tmp_path, method):
    write_recipe(tmp_path, method)
    assert run("whole").returncode == 0
    whole = hub.data()
    killed = [run("out", KILL="SIGKILL:8"), run("out", KILL="SIGKILL:6")]
    assert [done.returncode for done in killed] == [-signal.SIGKILL] * 2, killed[-1].stderr
    before = hub.data()
    last = run("out", "--verify-kept")
    assert last.returncode == 0, last.stderr
    (kept,) = shares(last.stderr)
    assert 40 <= kept < 100 and 0 < json.loads(last.stdout)["resumed"] < 1
    assert hub.data() - before < 0.75 * whole  # it is fetched in cells of 256 KiB, and headers and samples anyway
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert list((tmp_path / "home").rglob("*.safetensors")) == [], "weights were stored"


def test_a_server_that_goes_away_and_comes_back(hub, run, tmp_path):
    """The error says that what was written is kept, and how to go on."""
    write_recipe(tmp_path, "linear")
    assert run("whole").returncode == 0
    sent = []

    def fail(method, path, span):
        sent.append(span)
        return 503 if span and span[1] - span[0] > 1000 and len(sent) > 20 else None

    hub.fail = fail
    failed = run("out", KEPT_S="0", TRIES="2")
    assert failed.returncode == 4 and "the server answers 503" in error_of(failed)
    hub.fail = lambda *_: None
    last = run("out")
    assert last.returncode == 0 and shares(last.stderr), last.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_model_that_changed_there_meanwhile(hub, run, tmp_path):
    """The Hub has another commit now: what was written of the old one is not mixed with it."""
    write_recipe(tmp_path, "linear")
    assert run("out", KILL="SIGKILL:2").returncode == -signal.SIGKILL
    tensors = {f"t{i}": np.full((64, 300), i, np.float32) for i in range(COUNT)}
    hub.add("org/b", save(tmp_path / "models" / "other", tensors))
    refused = run("out")
    assert refused.returncode == 4 and "files of its models have come or gone" in error_of(refused)
    assert run("out", "--force").returncode == 0
    assert run("whole").returncode == 0
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
