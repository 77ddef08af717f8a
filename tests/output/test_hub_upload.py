"""Uploads of a finished output to the Hub, for which a server on this machine stands in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastinterp.ops.dtypes import F32
from tests.support.checkpoints import tensor, write
from tests.support.hub_server import TOKEN, Repo, environment, hub_server

pytestmark = pytest.mark.slow(3)


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    for name, value in (("step-1", 1.0), ("step-2", 3.0)):
        write(tmp_path / name, {"w": tensor(np.full(64, value), F32)})
        (tmp_path / name / "config.json").write_text("{}")
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("step-1", "step-2")]
    (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": "linear", "models": models}))

    def started(*args, program=("-m", "fastinterp"), **env):
        settings = {**environment(hub, tmp_path / "hf"), "HF_TOKEN": TOKEN, **env}
        return subprocess.run(
            [sys.executable, *program, *args], env=settings, cwd=tmp_path, capture_output=True,
            text=True, check=False, timeout=60,
        )  # fmt: skip

    return started


COMMANDS = {
    "merge": ("merge", "recipe.yml", "out"),
    "interpolate": ("interpolate", "step-1", "step-2", "--alpha", "0.5", "-o", "out"),
    "average": ("average", "step-1", "step-2", "-o", "out"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_output_is_uploaded(hub, run, tmp_path, command):
    """All files of the folder, as they are, into a new private model."""
    done = run(*command, "--push-to", "org/new")
    assert done.returncode == 0, done.stderr
    repo = hub.repos["org/new"]
    files = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "model.safetensors"} <= files.keys() and repo.files == files
    assert repo.private
    assert "org/new: uploading" in done.stderr and "as a private model" in done.stderr
    assert f"uploaded: {hub.url}/org/new/commit/" in done.stdout


def test_public_and_json(hub, run):
    done = run(*COMMANDS["merge"], "--push-to", "org/new", "--public", "--json")
    assert done.returncode == 0, done.stderr
    assert not hub.repos["org/new"].private
    assert json.loads(done.stdout)["uploaded"].startswith(f"{hub.url}/org/new/commit/")


REFUSED = {
    "no token": ({"HF_TOKEN": ""}, [], 4, "no token is here to upload with. Run `hf auth login`"),
    "wrong token": ({"HF_TOKEN": "hf_wrong"}, [], 4, "the Hub refuses"),
    "no id": ({}, ["--push-to", "new"], 2, "--push-to needs the id of a model, as ORG/NAME"),
    "of others": ({}, ["--push-to", "others/new"], 4, "`org` may not write to `others`, only to `org`"),
    "offline": ({}, ["--offline"], 2, "--push-to needs the Hub, but --offline was given"),
    "not empty": ({}, ["--push-to", "org/old"], 4, "the model is there already, with `model.safetensors`"),
    "public": ({}, ["--push-to", "org/public"], 4, "this model is public. Add --public"),
}  # fmt: skip


@pytest.mark.parametrize(("env", "args", "code", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_merge(hub, run, tmp_path, env, args, code, text):
    hub.repos["org/old"] = Repo({"model.safetensors": b"old"}, private=True)
    hub.repos["org/public"] = Repo({})
    done = run(*COMMANDS["merge"], *([] if "--push-to" in args else ["--push-to", "org/new"]), *args, **env)
    assert done.returncode == code and text in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and "org/new" not in hub.repos


def test_what_goes_not_together(run, tmp_path):
    for args, text in (
        (["merge", "recipe.yml", "out.safetensors", "--push-to", "org/new"], "the output is one file"),
        (["merge", "recipe.yml", "out", "--public"], "it goes with --push-to"),
        ([*COMMANDS["interpolate"], "--alpha", "0.7", "--push-to", "org/new"], "give one --alpha"),
    ):
        done = run(*args)
        assert done.returncode == 2 and text in done.stderr
    assert not (tmp_path / "out").exists()


def test_force_replaces_weights_there(hub, run, tmp_path):
    """Old weights go, so that no loader mixes them with the new; other files stay."""
    old = {"model-00001-of-00001.safetensors": b"old", "model.safetensors.index.json": b"{}", "image.png": b"x"}
    hub.repos["org/old"] = Repo(old, private=True)
    done = run(*COMMANDS["merge"], "--push-to", "org/old", "--force")
    assert done.returncode == 0, done.stderr
    assert hub.repos["org/old"].files.keys() == {"image.png", *(p.name for p in (tmp_path / "out").iterdir())}


def test_upload_that_fails_can_be_repeated(hub, run, tmp_path):
    """The output stays, and the command in the message uploads it."""
    hub.fail = lambda method, path, span: 403
    done = run(*COMMANDS["merge"], "--push-to", "org/new")
    assert done.returncode == 4 and "The output is complete in out. To upload it: `hf upload" in done.stderr
    assert Path(tmp_path, "out", "model.safetensors").is_file()
    hub.fail = lambda *_: None
    command = done.stderr.rpartition("`hf ")[2].partition("`")[0].split()
    again = run(*command, program=("-c", "from huggingface_hub.cli.hf import main; main()"))
    assert again.returncode == 0, again.stderr
    assert hub.repos["org/new"].files.keys() == {p.name for p in (tmp_path / "out").iterdir()}
