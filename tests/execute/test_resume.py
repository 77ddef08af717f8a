"""Runs that are killed go on where they were: the bytes and the report are those of a run that nothing stopped."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fastinterp.execute.resume.records import Round
from fastinterp.execute.resume.session import removal
from fastinterp.output.journal import take_over
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
    "large": ({"merge_method": "linear", "models": PLAIN}, ONE),
    "integers": ({"merge_method": "linear", "models": PLAIN}, ONE),  # copied: they have no statistics
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the models base, a and c: plain ones, encoded ones, and such of GGUF."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in ("plain", "encoded", "gguf", "large", "integers")}
    for name, noise in (("base", 0.0), ("a", 0.1), ("c", 0.2)):
        save(folders["plain"] / name, layers(1, count=6, noise=noise))
    for name, seed in (("a", 1), ("c", 2)):
        rng = np.random.default_rng(seed)
        save(folders["large"] / name, {f"t{i}": rng.normal(size=(64, 300)).astype(np.float32) for i in range(8)})
        both: dict[str, Any] = {"w": rng.normal(size=(4, 8)).astype(np.float32), "i": np.arange(16)}
        save(folders["integers"] / name, {f"{kind}{i}": tensor for i in range(3) for kind, tensor in both.items()})
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
        self.ROUND = "160000" if name == "large" else "200"  # of the large one, one tensor
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


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The message with which a command failed."""
    (error,) = json.loads(done.stdout)["wrong"]
    message: str = error["message"]
    return message


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
    told = json.loads(third.stdout)
    every = told if isinstance(told, list) else [told]
    assert {int(100 * (one.get("report") or one)["resumed"]) for one in every} == {kept[1]}


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
    assert again.returncode == 4
    assert "another merge is not finished here" in error_of(again) and CHANGES[change] in error_of(again)
    assert case.outputs("killed") == left
    forced = case.run("killed", "--force", *more, **env)
    assert (forced.returncode, shares(forced.stderr)) == (0, []), forced.stderr
    assert not [name for name in case.outputs("killed") if "/." in name]
    assert json.loads(forced.stdout)["resumed"] is None


@pytest.mark.parametrize("case", ["linear"], indirect=True)
def test_notes_that_do_not_fit_the_output_are_one_line_and_the_remedy_works(case):
    """As no run writes them: statistics of fewer tensors than are finished."""
    unfinished(case)
    (path,) = (case.folder / "killed").glob(".fastinterp*")
    journal = take_over(path)
    assert journal is not None
    journal.append("round", Round(0, tensors=(0,)))
    journal.close()
    again = case.run("killed")
    assert again.returncode == 4 and "what a run noted of it does not fit it" in error_of(again)
    subprocess.run(["sh", "-c", error_of(again).split("`")[1]], check=True, cwd=case.folder)
    assert case.run("killed").returncode == 0
    assert case.outputs("killed") == case.files


@pytest.mark.parametrize("case", ["shards"], indirect=True)
def test_threads_and_memory_are_not_part_of_what_is_computed(case):
    unfinished(case)
    done = case.run("killed", "--threads", "1", "--max-memory", "64MB", "--read", "mapped", "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert case.outputs("killed") == case.files


@pytest.mark.parametrize("case", ["large"], indirect=True)
@pytest.mark.parametrize("damage", ["byte", "end", "file", "crash", "not under a checksum"])
def test_what_was_lost_is_computed_again(case, damage):
    """Also where the machine stopped: all is read then, and what is under no checksum yet is not kept."""
    unfinished(case)  # three of eight tensors of 76,800 bytes
    (partial,) = (case.folder / "killed").glob(".model.safetensors.partial-*")
    more: list[str] = []
    env: dict[str, str] = {}
    if damage == "byte":
        with open(partial, "r+b") as stream:
            stream.seek(4096 + 50_000)
            byte = stream.read(1)[0]
            stream.seek(4096 + 50_000)
            stream.write(bytes([byte ^ 1]))
    elif damage == "end":
        os.truncate(partial, 4096 + 2 * 76_800)
    elif damage == "file":
        partial.unlink()
    elif damage == "crash":
        env = {"BOOT": "another"}
    else:
        more = ["--verify-kept"]
    done = case.run("killed", *more, **env)
    assert done.returncode == 0, done.stderr
    lost = "1 tensor of what was kept is" if more or env else "3 tensors of what was kept are"
    first = "t2" if more or env else "t0, t1 and 1 more"  # of a region of 64 MiB, all of it
    assert f"{lost} not there as written, and computed again: {first}" in done.stderr
    assert case.outputs("killed") == case.files
    report = json.loads(done.stdout)
    assert [w for w in report["warnings"] if "computed again" in w]
    assert shares(done.stderr) == [25 if more or env else 0]


@pytest.mark.parametrize("case", ["large"], indirect=True)
def test_after_a_crash_of_the_machine_what_was_read_again_counts_as_verified(case):
    """A third process of the same boot keeps what the second had verified."""
    unfinished(case)
    second = case.run("killed", KILL="SIGKILL:2", BOOT="second")  # it notes what was lost, and one tensor
    third = case.run("killed", BOOT="second")
    assert (second.returncode, third.returncode) == (-signal.SIGKILL, 0), third.stderr
    assert (shares(second.stderr), shares(third.stderr)) == ([25], [37])
    assert "computed again" not in third.stderr
    assert case.outputs("killed") == case.files
    assert reports(third.stdout, "killed")["copied"] == case.report["copied"]


STOPS = ["SIGINT", "SIGTERM"]


@pytest.mark.parametrize("case", ["shards", "interpolate"], indirect=True)
@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_of_a_few_seconds_leaves_nothing(case, stop):
    done = case.run("killed", KILL=f"{stop}:3")
    assert done.returncode == 128 + signal.Signals[stop]
    assert error_of(done) == "interrupted; nothing was written"
    assert case.outputs("killed") == {}


@pytest.mark.parametrize("case", ["shards", "one file", "interpolate"], indirect=True)
@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_run_of_much_work_is_kept(case, stop):
    """Both that the message names work: the same command, and the one that removes what is left."""
    for _ in range(2):
        done = case.run("killed", KILL=f"{stop}:3", KEPT_S="0")
        assert done.returncode == 128 + signal.Signals[stop]
        message, _, remedy = error_of(done).partition(" To throw it away: ")
        assert re.fullmatch(r"interrupted; \d+ % is kept: run the same command again to go on\.", message), message
        assert case.outputs("killed")
        subprocess.run(remedy, shell=True, cwd=case.folder, check=True)
        assert case.outputs("killed") in ({}, {"OUT": b""})  # the folder of several outputs stays
    case.run("killed", KILL=f"{stop}:3", KEPT_S="0")
    done = case.run("killed")
    assert done.returncode == 0 and shares(done.stderr)[0] > 0
    assert case.outputs("killed") == case.files
    assert reports(done.stdout, "killed") == case.report


@pytest.mark.parametrize("case", ["interpolate"], indirect=True)
def test_what_is_kept_is_said_once(case):
    """And many outputs are thrown away by one pattern."""
    done = case.run("killed", KILL="SIGTERM:3", KEPT_S="0")
    assert error_of(done).endswith(". To throw it away: rm -r killed/alpha_*")
    command = [part.replace("OUT", "killed") for part in case.command]
    env = {**CLEAN, "PYTHONPATH": str(ROOT), "ROUND": case.ROUND}
    done = subprocess.run(
        [sys.executable, PROGRAM, *command], cwd=case.folder, env=env, capture_output=True, text=True, check=True
    )
    assert (done.stderr + done.stdout).count("resumed: ") == 1


def test_a_pattern_matches_nothing_but_what_is_left(tmp_path):
    names = [f"alpha_{i}" for i in range(6)]
    for name in names:
        (tmp_path / "a b" / name).mkdir(parents=True)
    paths = [str(tmp_path / "a b" / name) for name in names]
    assert removal(paths) == f"'{tmp_path}/a b/alpha_'*"
    assert removal(paths[:2]) == f"'{tmp_path}/a b/alpha_0' '{tmp_path}/a b/alpha_1'"
    hidden = [str(tmp_path / "h" / f".{i}") for i in range(6)]
    for path in hidden:
        Path(path).mkdir(parents=True)
    assert removal(hidden) == shlex.join(hidden)
    (tmp_path / "a b" / "alpha_7").mkdir()
    assert removal(paths) == shlex.join(paths)
    subprocess.run(f"rm -r {removal(paths)}", shell=True, check=True)
    assert [path.name for path in (tmp_path / "a b").iterdir()] == ["alpha_7"]


@pytest.mark.parametrize("case", ["shards", "one file", "interpolate"], indirect=True)
@pytest.mark.parametrize("stop", STOPS)
def test_what_an_earlier_run_left_is_kept_at_once(case, stop):
    """However soon the run that goes on with it is interrupted, or refused for its options."""
    assert case.run("killed", KILL="SIGKILL:3").returncode == -signal.SIGKILL
    done = case.run("killed", KILL=f"{stop}:-1")
    assert done.returncode == 128 + signal.Signals[stop]
    message, _, _ = error_of(done).partition(" To throw it away: ")
    assert re.fullmatch(r"interrupted; \d+ % is kept: run the same command again to go on\.", message), message
    done = case.run("killed", "--max-memory", "1000", "--threads", "2")
    assert done.returncode == 2
    assert re.search(r"; \d+ % is kept\. To throw it away: rm -r ", error_of(done)), done.stderr
    done = case.run("killed")
    assert done.returncode == 0 and shares(done.stderr)[0] > 0
    assert case.outputs("killed") == case.files
    assert reports(done.stdout, "killed") == case.report


@pytest.mark.parametrize("case", ["shards"], indirect=True)
def test_an_older_checkpoint_outlives_a_run_that_is_left(case):
    """It is not removed with what is left, and replaced when the run is resumed."""
    (case.folder / "killed").mkdir()
    done = case.run("killed", "--max-shard-size", "1GB")
    assert done.returncode == 0
    old = case.outputs("killed")
    for remedy in (True, False):
        done = case.run("killed", "--force", KILL="SIGTERM:3", KEPT_S="0")
        assert done.returncode == 143
        if remedy:
            subprocess.run(error_of(done).rpartition(": ")[2], shell=True, cwd=case.folder, check=True)
            assert case.outputs("killed") == old
    done = case.run("killed", "--force")
    assert done.returncode == 0 and shares(done.stderr)[0] > 0
    assert case.outputs("killed") == case.files


@pytest.mark.parametrize("case", ["interpolate", "shards", "one file"], indirect=True)
def test_a_run_that_is_killed_while_it_puts_its_outputs_in_place(case):
    """The next one has nothing to compute, and tells the same."""
    for step in range(1, 60, 5):
        done = case.run("killed", FINISH=f"SIGKILL:{step}")
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
        again = case.run("killed")
        assert again.returncode == 0, again.stderr
        assert shares(again.stderr) == [100]
        assert case.outputs("killed") == case.files
        found = reports(again.stdout, "killed")
        for report in found if isinstance(found, list) else [found]:
            report["remarks"] = [remark for remark in report["remarks"] if "a run that had died" not in remark]
        assert found == case.report
        for path in case.folder.glob("killed*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert step > 1


@pytest.mark.parametrize("case", ["interpolate"], indirect=True)
def test_outputs_that_were_complete_are_written_again_where_one_is_gone(case):
    steps = sum(path.is_file() for path in (case.folder / "whole").rglob("*"))
    assert case.run("killed", FINISH=f"SIGKILL:{steps + 2}").returncode == -signal.SIGKILL  # all are in place
    shutil.rmtree(case.folder / "killed" / "alpha_0.25")
    again = case.run("killed")
    assert (again.returncode, shares(again.stderr)) == (0, []), again.stderr
    assert case.outputs("killed") == case.files
