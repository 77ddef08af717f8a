"""Runs that are killed go on where they were: the bytes and the report are those of a run that nothing stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    "average": (None, ["average", "a", "c", "--in-order", "-o", "OUT", "--weights", "ema"]),
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
        self.report, self.files = reports(done.stdout, "whole"), self.outputs("whole")

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
        return {
            name.replace(out, "OUT"): content for name, content in found.items() if name.startswith((out, f".{out}"))
        }


def reports(text: str, out: str) -> Any:
    """The reports of a command, without times and the name of the output."""
    every = json.loads(text.replace(f'"{out}', '"OUT'))
    for report in every if isinstance(every, list) else [every]:
        of_point = report.get("report") or report
        for name in TIMES:
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
def test_a_run_that_is_killed_twice(case):
    """Once before what it finished is noted, once after; then it ends."""
    first = case.run("killed", KILL="SIGKILL:-2")
    second = case.run("killed", KILL="SIGKILL:1")
    third = case.run("killed")
    assert [done.returncode for done in (first, second, third)] == [-signal.SIGKILL, -signal.SIGKILL, 0], third.stderr
    kept = [share for done in (first, second, third) for share in shares(done.stderr)]
    assert len(kept) == 2 and 0 <= kept[0] < kept[1] < 100
    assert case.outputs("killed") == case.files
    assert reports(third.stdout, "killed") == case.report
    every = json.loads(third.stdout)
    assert {int(100 * (r.get("report") or r)["resumed"]) for r in (every if isinstance(every, list) else [every])} == {kept[1]}


def unfinished(case: Case, **env: str) -> None:
    """An output of the case that a kill left, with the first rounds done."""
    done = case.run("killed", KILL="SIGKILL:3", **env)
    assert done.returncode == -signal.SIGKILL, done.stderr


CHANGES = {
    "recipe": "the recipe, or its models, differ",
    "option": "`seed` was 0, and is 4",
    "input": "inputs have changed since",
    "header": "inputs have changed since",
    "small file": "inputs have changed since",
    "new file": "files of its models have come or gone",
    "shards": "its files are laid out otherwise",
    "version": "it was begun by fastinterp",
}


@pytest.mark.parametrize("case", ["linear"], indirect=True)
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_left_of_another_run_is_refused(case, change):
    """And is as it was: until --force throws it away. Both commands that the message names work."""
    model = case.folder / "a"
    files = shutil.copytree(model, case.folder / "copy")
    model.unlink()
    files.rename(model)
    unfinished(case)
    left = case.outputs("killed")
    more: list[str] = []
    before = (model / "model.safetensors").stat()
    if change == "recipe":
        (case.folder / "recipe.yml").write_text((case.folder / "recipe.yml").read_text().replace("0.3", "0.4"))
    elif change in ("option", "shards"):
        more = ["--seed", "4"] if change == "option" else ["--max-shard-size", "100"]
    elif change == "input":  # one byte, with size and mtime as before: ctime tells
        with open(model / "model.safetensors", "r+b") as stream:
            stream.seek(-1, os.SEEK_END)
            stream.write(b"\x01")
        os.utime(model / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "header":
        raw = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(raw.replace(b'"shape": [4]', b'"shape":  [4]', 0) + b"")
    elif change == "small file":
        (model / "config.json").write_text('{"model_type": "llama" }')
    elif change == "new file":
        (model / "generation_config.json").write_text("{}")
    env = {"VERSION": "9.9"} if change == "version" else {}
    again = case.run("killed", *more, **env)
    assert again.returncode == 4 and again.stdout == ""
    assert "another merge is not finished here" in again.stderr and CHANGES[change] in again.stderr, again.stderr
    assert case.outputs("killed") == left
    forced = case.run("killed", "--force", *more, **env)
    assert (forced.returncode, shares(forced.stderr)) == (0, []), forced.stderr
    assert not [name for name in case.outputs("killed") if "/." in name]
    assert json.loads(forced.stdout)["resumed"] is None


@pytest.mark.parametrize("case", ["shards"], indirect=True)
def test_threads_and_memory_are_not_part_of_what_is_computed(case):
    unfinished(case)
    done = case.run("killed", "--threads", "1", "--max-memory", "64MB", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert case.outputs("killed") == case.files


@pytest.mark.parametrize("case", ["ties"], indirect=True)
@pytest.mark.parametrize("damage", ["byte", "end", "file", "crash"])
def test_what_was_lost_is_computed_again(case, damage):
    """Also where the machine stopped: all is read then, and what is under no checksum yet is not kept."""
    unfinished(case)
    (partial,) = (case.folder / "killed").glob(".model.safetensors.partial-*")
    env = {}
    if damage == "byte":
        size = partial.stat().st_size
        with open(partial, "r+b") as stream:
            stream.seek(size - 20)
            byte = stream.read(1)[0]
            stream.seek(size - 20)
            stream.write(bytes([byte ^ 1]))
    elif damage == "end":
        os.truncate(partial, partial.stat().st_size - 20)
    elif damage == "file":
        partial.unlink()
    else:
        env = {"BOOT": "another"}
    done = case.run("killed", **env)
    assert done.returncode == 0, done.stderr
    assert "of what was kept" in done.stderr and "computed again" in done.stderr
    assert case.outputs("killed") == case.files
    report = json.loads(done.stdout)
    assert any("computed again" in warning for warning in report["warnings"])
    (share,) = shares(done.stderr)
    assert share == int(100 * report["resumed"])
