"""What is fetched of a model on the Hub, for which a server on this machine stands in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from fastinterp.ops.dtypes import F32
from tests.support.checkpoints import receipt, tensor, write
from tests.support.hub_server import commit_of, environment, hub_server

WIDTH = 1 << 16  # elements of the large tensor


@pytest.fixture
def hub():
    with hub_server() as server:
        yield server


@pytest.fixture
def run(hub, tmp_path):
    """Runs the program with the stand-in for the Hub and a cache of its own."""

    def started(*args, **env):
        settings = {**environment(hub, tmp_path / "hf"), **env}
        return subprocess.run(
            [sys.executable, "-m", "fastinterp", *map(str, args)], env=settings, cwd=tmp_path, capture_output=True,
            text=True, check=False, timeout=60,
        )  # fmt: skip

    return started


def model(folder, value, **files):
    """A model with a tensor of 256 KB, of one number, and small files."""
    write(folder, {"w": tensor(np.full(WIDTH, value), F32), "v": tensor([value], F32)})
    for name, text in {"config.json": "{}", **files}.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return folder


def recipe(tmp_path, *names, method="linear", **keys):
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in names]
    (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": method, "models": models, **keys}))
    return "recipe.yml"


@pytest.mark.slow
@pytest.mark.parametrize("command", [("explain", "recipe.yml"), ("check", "recipe.yml"), ("inspect", "org/a")])
def test_commands_that_describe_fetch_headers(hub, run, tmp_path, command):
    """Of weights on the Hub only the beginning of the file is sent, once; each id is looked up once."""
    hub.add("org/a", model(tmp_path / "a", 1.0))
    hub.add("org/b", model(tmp_path / "b", 2.0))
    recipe(tmp_path, "org/a", "org/b")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert 0 < hub.data() < 4 * 65536 + 1000 < 2 * 4 * WIDTH  # of two files of 256 KB
    assert hub.lookups("org/a") == 1
    line = "org/a: fetching 1 small file, 2 B and the header of 1 file of weights, which stay there (262 KB), from the "
    assert line in done.stderr
    blobs = [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size > 10_000]
    assert not blobs


@pytest.mark.slow
def test_merge_downloads_weights_once(hub, run, tmp_path):
    """The merge downloads what it reads, says so first, and has commits in its receipt and card; then it needs no
    connection.
    """
    commit = hub.add("org/a", model(tmp_path / "a", 1.0), dev=model(tmp_path / "dev", 3.0))
    hub.add("org/b", model(tmp_path / "b", 2.0))
    recipe(tmp_path, "org/a@dev", "org/b")
    done = run("merge", "recipe.yml", "out")
    assert done.returncode == 0, done.stderr
    assert "org/b: downloading 1 file of weights, 262 KB, to " in done.stderr and " free)" in done.stderr
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert weights[-4 * WIDTH :] == np.full(WIDTH, 2.5, "<f4").tobytes()
    dev = commit_of(hub.repos["org/a"].revisions["dev"])
    assert receipt(tmp_path / "out")["commits"] == {"org/a@dev": dev, "org/b": commit_of(hub.repos["org/b"].files)}
    assert dev != commit and f"org/a@dev was read at commit {dev}" in (tmp_path / "out" / "README.md").read_text()

    hub.asked.clear()
    again = run("merge", "recipe.yml", "again", "--offline")
    assert again.returncode == 0, again.stderr
    assert not hub.asked and (tmp_path / "again" / "model.safetensors").read_bytes() == weights
    assert not again.stderr.startswith("org/")


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [("merge", "recipe.yml", "out"), ("explain", "recipe.yml"), ("check", "recipe.yml")]
)
def test_faults_of_a_recipe_show_before_anything_is_fetched(hub, run, tmp_path, command):
    hub.add("org/a", model(tmp_path / "a", 1.0))
    recipe(tmp_path, "org/a", "org/a@other", dtyp="bfloat16")
    done = run(*command)
    assert done.returncode == 2 and "dtyp" in done.stdout + done.stderr
    assert not hub.asked


@pytest.mark.slow
def test_faults_of_models_show_before_weights_are_downloaded(hub, run, tmp_path):
    """Shapes that do not fit, and an output that is there, end a merge that has fetched headers alone."""
    hub.add("org/a", model(tmp_path / "a", 1.0))
    write(tmp_path / "other", {"w": tensor(np.zeros(5), F32), "v": tensor([0.0], F32)})
    hub.add("org/other", tmp_path / "other")
    recipe(tmp_path, "org/a", "org/other")
    done = run("merge", "recipe.yml", "out")
    assert done.returncode == 3 and "downloading" not in done.stderr and not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    done = run("interpolate", "org/a", "org/a@main", "--alpha", "0.5", "-o", "full")
    assert done.returncode == 4 and "not empty" in done.stderr and "downloading" not in done.stderr


@pytest.mark.slow
def test_offline_fetches_nothing(hub, run, tmp_path):
    """Offline, a model that is not in the cache is an error that says how it gets there; so is one without weights."""
    hub.add("org/a", model(tmp_path / "a", 1.0))
    for flags, env in ((["--offline"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        done = run("inspect", "org/a", *flags, **env)
        assert done.returncode == 3 and "`hf download org/a`" in done.stderr
        assert ("--offline was given" if flags else "HF_HUB_OFFLINE is set") in done.stderr
    assert not hub.asked
    assert run("inspect", "org/a").returncode == 0
    done = run("inspect", "org/a", "--offline")
    assert done.returncode == 3 and "Nothing was fetched, since --offline was given" in done.stderr


@pytest.mark.slow
def test_what_cannot_be_an_id_is_not_looked_up_and_others_once(hub, run, tmp_path):
    recipe(tmp_path, "./org/a", "org/none", "org/none+org/none", "a/b/c", "x.safetensors")
    done = run("check", "recipe.yml")
    assert done.returncode == 3 and "the Hub has no such model" in " ".join(done.stdout.split())
    assert [r.path for r in hub.asked] == ["/api/models/org/none"]


@pytest.mark.slow
def test_many_unknown_names_are_not_all_looked_up(hub, run, tmp_path):
    recipe(tmp_path, *(f"org/none{i}" for i in range(60)))
    assert run("check", "recipe.yml").returncode == 3
    assert len(hub.asked) == 20


@pytest.mark.slow
def test_code_and_chat_templates_on_the_hub(hub, run, tmp_path):
    """All small files of a model are fetched, and copied into the output; nothing else in folders is."""
    small = {
        "config.json": '{"auto_map": {"AutoModel": "modeling_own.Own"}}', "modeling_own.py": "raise SystemExit",
        "chat_template.jinja": "a", "additional_chat_templates/tool_use.jinja": "b", "LICENSE": "c",
    }  # fmt: skip
    hub.add("org/a", model(tmp_path / "a", 1.0, **small, **{"onnx/model.json": "d", "pytorch_model.bin": "e"}))
    recipe(tmp_path, "org/a")
    assert run("merge", "recipe.yml", "out").returncode == 0
    root = next((tmp_path / "hf" / "hub" / "models--org--a" / "snapshots").iterdir())
    found = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
    assert found == {*small, "model.safetensors"}
    assert {name: (tmp_path / "out" / name).read_text() for name in small} == small


@pytest.mark.slow
def test_interrupted_download_leaves_a_sound_cache(hub, run, tmp_path):
    """Ctrl-C in a download ends the program soon, with nothing in the output; the next run finishes it."""
    hub.add("org/a", model(tmp_path / "a", 1.0))
    recipe(tmp_path, "org/a")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([sys.executable, "-m", "fastinterp", "merge", "recipe.yml", "out"], env=env,
                               cwd=tmp_path, stderr=subprocess.PIPE, text=True)  # fmt: skip
    started = threading.Event()

    def late(method, path, span):
        if method == "GET" and span is None and path.endswith("model.safetensors"):
            started.set()
            time.sleep(1.5)

    hub.fail = late
    assert started.wait(30)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in text and not (tmp_path / "out").exists()
    hub.fail = lambda *_: None
    assert run("merge", "recipe.yml", "out").returncode == 0
    assert len(Path(tmp_path, "out", "model.safetensors").read_bytes()) > 4 * WIDTH
