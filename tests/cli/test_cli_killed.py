"""A command that is killed in the finish of its output: what readers say then, and what the next command does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastinterp.checkpoint.open import open_checkpoint
from tests.support.models import layers, save
from tests.support.written import tree

ROOT = Path(__file__).resolve().parents[2]

# Python imports this at its start. The process dies at the rename of the number in KILLED_AT.
DIES = """
import os, signal
left = int(os.environ.get("KILLED_AT", "0"))
replace = os.replace
def counted(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = counted
"""


@pytest.fixture
def place(tmp_path):
    """A folder with two models and a recipe, and the environment in which `fastinterp` is a program."""
    for name, noise in (("a", 0.1), ("b", 0.2)):
        save(tmp_path / name, layers(1, noise=noise))
    recipe = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
    (tmp_path / "my recipe.yml").write_text(recipe)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sitecustomize.py").write_text(DIES)
    program = tmp_path / "bin" / "fastinterp"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fastinterp "$@"\n')
    program.chmod(0o755)
    paths = os.pathsep.join([str(tmp_path / "bin"), str(ROOT)])
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    return tmp_path, env


def ran(place, *args: str, at: int = 0) -> subprocess.CompletedProcess[str]:
    folder, env = place
    env = {**env, "KILLED_AT": str(at)}
    return subprocess.run(["fastinterp", *args], cwd=folder, env=env, capture_output=True, text=True, check=False)


COMMANDS = {
    "new": ["merge", "my recipe.yml", "the out", "--max-shard-size", "100"],
    "over another": ["merge", "my recipe.yml", "the out", "--max-shard-size", "100", "--force"],
    "one of several": ["interpolate", "a", "b", "--alpha", "0.5,1", "-o", "the out", "--max-shard-size", "100"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_reader_names_the_command_that_ends_it(place, tmp_path, name):
    """Followed to the letter, from any folder."""
    out = tmp_path / "the out" / ("alpha_0.5" if name == "one of several" else "")
    assert ran(place, *COMMANDS[name]).returncode == 0 or name == "over another"
    whole = tree(out)
    if name == "over another":
        assert ran(place, "interpolate", "a", "b", "--alpha", "0.1", "-o", "the out", "--force").returncode == 0
    else:
        subprocess.run(["rm", "-r", "the out"], cwd=tmp_path, check=True)
    assert ran(place, *COMMANDS[name], at=3).returncode == -9
    for command in (["inspect", str(out)], ["interpolate", str(out), "a", "--alpha", "0.5", "-o", "x"]):
        done = ran(place, *command)
        assert done.returncode == 3 and "the folder is neither the old nor the new checkpoint" in done.stderr
        assert not (tmp_path / "x").exists()
    found = re.search(r"run this in (.*), and that ends it: `(.*)`\n", done.stderr)
    assert found is not None
    script = f"cd {found[1]} && {found[2]}"
    mended = subprocess.run(["sh", "-c", script], cwd="/", env=place[1], capture_output=True, text=True, check=False)
    assert mended.returncode == 0 and mended.stderr in ("", "resumed: 100 % kept\n")
    assert "a run that had died had completed it: it is in place now" in mended.stdout
    assert tree(out) == whole and ran(place, "inspect", str(out)).returncode == 0
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.slow
def test_other_command_ends_it_and_says_so(place, tmp_path):
    assert ran(place, *COMMANDS["new"], at=2).returncode == -9
    other = ["interpolate", "a", "b", "--alpha", "0.25", "-o", "the out"]
    done = ran(place, *other)
    said = "OutputError: the out: a run that had died had completed it: it is in place now. Now the folder is not empty"
    assert done.returncode == 4 and done.stderr.startswith(said)
    assert done.stderr.endswith("Add --force (in Python force=True) to write into it all the same\n")
    assert len(open_checkpoint(str(tmp_path / "the out")).tensors) == 7
    assert ran(place, *other, "--force").returncode == 0
    assert not list(tmp_path.glob("**/.*"))


@pytest.mark.slow
def test_file_that_is_not_there_yet(place, tmp_path):
    command = ["merge", "my recipe.yml", "x.safetensors"]
    assert ran(place, *command, at=1).returncode == -9
    done = ran(place, "inspect", "x.safetensors")
    assert done.returncode == 3 and "there is no such file yet: a merge into it is not finished" in done.stderr
    assert "`fastinterp merge 'my recipe.yml' x.safetensors`" in done.stderr
    assert ran(place, *command).returncode == 0
    assert ran(place, "inspect", "x.safetensors").returncode == 0 and not list(tmp_path.glob(".*"))
