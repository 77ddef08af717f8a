"""Runs that are killed go on where they were: the bytes and the report are those of a run that nothing stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.support import gguf_models, quantised_models
from tests.support.models import layers, save
from tests.support.written import tree

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "tests" / "support" / "resume_program.py")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("FASTINTERP_", "SLURM_"))}
TIMES = ("wall_s", "gb_per_s", "resumed")
BOTH = [{"model": m, "parameters": {"weight": 0.5, "density": 0.5}} for m in "ac"]
PLAIN = [{"model": "a", "parameters": {"weight": 0.3}}, {"model": "c", "parameters": {"weight": 0.7}}]
MIDDLE = {"name": "middle", "merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}],
          "parameters": {"t": 0.3}}  # fmt: skip
ONE = ["merge", "recipe.yml", "OUT"]

# Name -> recipe, or documents; the command.
CASES: dict[str, tuple[Any, list[str]]] = {
    "linear": ({"merge_method": "linear", "models": PLAIN}, ONE),
    "shards": ({"merge_method": "linear", "models": PLAIN}, [*ONE, "--max-shard-size", "100"]),
    "stochastic": (
        {"merge_method": "linear", "models": PLAIN, "rounding": "stochastic", "seed": 7, "dtype": "bfloat16"}, ONE,
    ),
    "one file": ({"merge_method": "linear", "models": PLAIN}, ["merge", "recipe.yml", "OUT.safetensors"]),
    "ties": ({"merge_method": "ties", "base_model": "base", "models": BOTH}, ONE),
    "of the whole model": (
        {"merge_method": "ties", "base_model": "base", "models": BOTH, "parameters": {"preset": "paper"}}, ONE,
    ),
    "model_stock": ({"merge_method": "model_stock", "base_model": "base", "models": [{"model": m} for m in "ac"]}, ONE),
    "della": ({"merge_method": "della", "base_model": "base", "models": BOTH}, ONE),
    "documents": (
        [MIDDLE, {"merge_method": "ties", "base_model": "base", "models": [{**BOTH[0], "model": "middle"}, BOTH[1]]}],
        ONE,
    ),
    "documents, of the whole model": (
        [MIDDLE, {"merge_method": "ties", "base_model": "base", "models": [{**BOTH[0], "model": "middle"}, BOTH[1]],
                  "parameters": {"preset": "paper"}}],
        ONE,
    ),
    "intermediates": (
        [MIDDLE, {"merge_method": "linear", "models": [{**PLAIN[0], "model": "middle"}, PLAIN[1]]}],
        [*ONE, "--keep-intermediates", "OUT.kept"],
    ),
    "interpolate": (None, ["interpolate", "a", "c", "--alpha", "0:1:0.25", "-o", "OUT"]),
    "average": (None, ["average", "a", "c", "-o", "OUT", "--weights", "ema"]),
    "sweep": (None, ["sweep", "--base", "base", "--add", "one=a", "--add", "two=c", "--grid", "one=0:1:0.5",
                     "--grid", "two=0,1", "-o", "OUT"]),
    "sweep of a method": (None, ["sweep", "a", "c", "--alphas", "0.2,0.6", "--method", "slerp", "-o", "OUT"]),
    "encoded": ({"merge_method": "linear", "models": PLAIN, "quantize": "same"}, ONE),
    "gguf": ({"merge_method": "linear", "models": PLAIN}, ["merge", "recipe.yml", "OUT.gguf"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the models base, a and c: plain ones, encoded ones, and such of GGUF."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("plain", "encoded", "gguf")}
    for name, noise in (("base", 0.0), ("a", 0.1), ("c", 0.2)):
        save(folders["plain"] / name, layers(1, count=6, noise=noise))
    form = quantised_models.FORMS["blocks"]
    quantised_models.saved(folders["encoded"], form, quantised_models.family(form, 2))
    (folders["encoded"] / "b").rename(folders["encoded"] / "c")
    for seed, name in enumerate("ac"):
        written = gguf_models.write(folders["gguf"] / f"{name}.gguf", gguf_models.numbers(seed), gguf_models.Type.F16)
        (folders["gguf"] / name).mkdir()
        shutil.move(written, folders["gguf"] / name / f"{name}.gguf")
    return folders


class Case:
    """A command in a folder of its own, and what it makes where nothing stops it."""

    def __init__(self, name: str, models: dict[str, Path], folder: Path):
        recipe, self.command = CASES[name]
        self.folder = folder
        for model in models[name if name in models else "plain"].iterdir():
            (folder / model.name).symlink_to(model)
        if recipe is not None:
            (folder / "recipe.yml").write_text(yaml.safe_dump_all(recipe if isinstance(recipe, list) else [recipe]))
        self.ROUND = "200"
        done = self.run("whole")
        assert (done.returncode, done.stderr) == (0, "")
        self.report, self.files = reports(done.stdout), self.outputs("whole")

    def run(self, out: str, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [part.replace("OUT", out) for part in self.command]
        env = {**CLEAN, "PYTHONPATH": str(ROOT), "ROUND": self.ROUND, **env}
        return subprocess.run(
            [sys.executable, PROGRAM, *command, "--json", *more], cwd=self.folder, env=env, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    def outputs(self, out: str) -> dict[str, Any]:
        """All that lies there, by names without that of the output."""
        found = tree(self.folder)
        return {name.replace(out, "OUT"): content for name, content in found.items() if name.startswith((out, f".{out}"))}


def reports(text: str) -> Any:
    """The reports of a command, without times and names of outputs."""
    every = json.loads(text)
    for report in every if isinstance(every, list) else [every]:
        of_point = report.get("report") or report
        for name in (*TIMES, "output", "path"):
            of_point.pop(name, None)
            report.pop(name, None)
    return every


@pytest.fixture
def case(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path: Path) -> Case:
    return Case(request.param, models, tmp_path)


every_case = pytest.mark.parametrize("case", CASES, indirect=True)


def shares(said: str) -> list[int]:
    return [int(line.split()[1]) for line in said.splitlines() if line.startswith("resumed: ")]


@every_case
def test_a_run_that_is_killed_again_and_again(case):
    """Each process notes two rounds at most, and dies as it notes the next: at last it is done."""
    kept: list[int] = []
    for _ in range(60):
        done = case.run("out", KILL="SIGKILL:2" if len(kept) % 2 else "SIGKILL:-2")
        kept += shares(done.stderr) or [0]
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.returncode == 0, done.stderr
    assert len(kept) > 3 and kept == sorted(kept) and kept[-1] > 50
    assert case.outputs("out") == case.files
    assert reports(done.stdout) == case.report
