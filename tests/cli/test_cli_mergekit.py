"""The program fastinterp-mergekit: its options, what they do, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from fastinterp import replay, verify
from fastinterp.cli.mergekit import command
from fastinterp.integrations import mergekit_options
from fastinterp.integrations.mergekit_options import OPTIONS, flag_of, settings_of
from tests.support.hub_server import hub_server, in_this_process
from tests.support.models import bf16, layers, load, save

RECIPE = """\
# mine
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 3}}
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """a/, b/ and recipe.yml in the current folder."""
    for name, noise in (("a", 0.1), ("b", -0.2)):
        save(tmp_path / name, layers(2, noise=noise), {"format": "pt"})
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "generation_config.json").write_text("{}")
        (tmp_path / name / "README.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "recipe.yml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*args, code=0):
    """(stdout, stderr)"""
    done = CliRunner().invoke(command, [str(a) for a in args], prog_name="fastinterp-mergekit")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def merged(folder):
    return load(folder / "model.safetensors")


def test_it_writes_what_mergekit_writes(models):
    out, err = run("recipe.yml", "out")
    assert "out" in out and err == ""
    assert (models / "out" / "mergekit_config.yml").read_text() == RECIPE
    front = (models / "out" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["license"] == "mit"
    assert {"tokenizer.json", "generation_config.json", "model.safetensors"} <= {
        p.name for p in (models / "out").iterdir()
    }


def test_it_writes_into_a_folder_that_exists(models):
    """As mergekit does: beside other files, and over an older checkpoint; never over an input."""
    (models / "out").mkdir()
    (models / "out" / "notes.txt").write_text("mine")
    run("recipe.yml", "out")
    first = merged(models / "out")
    (models / "recipe.yml").write_text(RECIPE.replace("3", "1"))
    run("recipe.yml", "out")
    assert (models / "out" / "notes.txt").read_text() == "mine" and merged(models / "out") != first
    _, err = run("recipe.yml", "a", code=4)
    assert "inputs are never overwritten" in err


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.unneeded], ids=lambda o: o.name)
def test_options_that_change_nothing_are_accepted_with_the_reason(models, option):
    run("recipe.yml", "want")
    value = {"flag": [], "text": ["x"], "number": ["3"]}[option.kind]
    _, err = run("recipe.yml", "out", flag_of(option, True), *value)
    assert err == f"note: {flag_of(option, True)} is not needed: {option.unneeded}\n"
    assert merged(models / "out") == merged(models / "want")
    if option.kind == "flag":
        assert run("recipe.yml", "again", flag_of(option, False))[1] == ""


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.refused], ids=lambda o: o.name)
def test_options_that_cannot_be_honoured_are_refused(models, option):
    flag = flag_of(option, not option.default)
    _, err = run("recipe.yml", "out", flag, code=2)
    assert err == f"UsageError: {flag} is not supported: {option.refused}\n"
    assert not (models / "out").exists()


def test_embeddings_are_cut(models):
    for name, rows in (("a", 6), ("b", 4)):
        save(models / name, {**layers(2), "model.embed_tokens.weight": bf16(np.ones((rows, 4)) * rows)})
    assert "`truncate_embeddings: true`" in run("recipe.yml", "out", code=3)[1]
    out, _ = run("recipe.yml", "out", "--unsafe-truncate-embeddings")
    assert "model.embed_tokens.weight to 4 (6 in a, 4 in b)" in out
    assert merged(models / "out")["model.embed_tokens.weight"] == ("BF16", [4, 4], bf16(np.full((4, 4), 4.5)).tobytes())
    assert verify("out", full=True).ok  # the option is not in the recipe, but in the receipt
    replay("out", "replayed")
    assert merged(models / "replayed") == merged(models / "out")
    (models / "recipe.yml").write_text(RECIPE + "truncate_embeddings: true\n")
    run("recipe.yml", "again")
    assert merged(models / "again") == merged(models / "out")


def test_files_that_are_left_out(models):
    run("recipe.yml", "out", "--no-copy-tokenizer", "--no-write-model-card")
    files = {p.name for p in (models / "out").iterdir()}
    assert "generation_config.json" in files
    assert files.isdisjoint({"README.md", "mergekit_config.yml", "tokenizer.json"})


def test_sizes_of_shards(models):
    run("recipe.yml", "out", "--out-shard-size", "100", "-j", "2", "-vv")
    index = json.loads((models / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    run("recipe.yml", "one", "--out-shard-size", "0")
    assert (models / "one" / "model.safetensors").is_file()
    assert "expected a number of bytes" in run("recipe.yml", "x", "--out-shard-size", "5 GB", code=2)[1]


def test_the_seed_counts(models):
    dare = "merge_method: dare_linear\nbase_model: a\nmodels: [{model: b, parameters: {weight: 1, density: 0.5}}]\n"
    (models / "dare.yml").write_text(dare)
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        run("dare.yml", name, "--random-seed", seed)
    assert merged(models / "x") == merged(models / "y") != merged(models / "z")


def test_quiet(models):
    assert run("recipe.yml", "out", "--quiet", "--lazy-unpickle") == ("", "")


def test_errors_end_with_one_line(models):
    (models / "bad.yml").write_text(RECIPE.replace("weight", "wieght"))
    _, err = run("bad.yml", "out", code=2)
    assert err.startswith("RecipeError: unknown parameter `wieght`") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "device"),
    [
        ({}, "cpu"),
        ({"device": "cuda:1"}, "cuda:1"),
        ({"cuda": True}, "cuda"),
        ({"multi_gpu": True}, "cuda:0,1"),
        ({"gpu_rich": True}, "cuda:0,1"),
        ({"device": "cpu", "multi_gpu": True}, "cpu"),
        ({"device": "xpu"}, "cpu"),
    ],
    ids=str,
)
def test_devices(monkeypatch, values, device):
    monkeypatch.setattr(mergekit_options, "_every_gpu", lambda: "cuda:0,1")
    settings = settings_of(values)
    assert settings.device == device
    assert ("--device xpu is computed on the CPU" in " ".join(settings.notes)) == (values.get("device") == "xpu")


def test_models_from_the_hub_are_in_the_folder_that_is_named(models, monkeypatch):
    from huggingface_hub import constants

    before = constants.HF_HUB_CACHE
    (models / "recipe.yml").write_text(RECIPE.replace("model: b", "model: org/b"))
    with hub_server() as hub, in_this_process(hub, models / "other"):
        hub.add("org/b", models / "a")
        run("recipe.yml", "out", "--transformers-cache", "cache")
    assert (models / "cache" / "models--org--b").is_dir() and not (models / "other").exists()
    assert before == constants.HF_HUB_CACHE
    assert merged(models / "out") == merged(models / "a")  # the average of a and a


ABSENT = """import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mergekit":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.slow
@pytest.mark.parametrize("start", ["import {0}", "import runpy; runpy.run_module('{0}', run_name='__main__')"])
def test_the_module_for_mergekit_says_that_it_needs_it(start):
    """Where mergekit is not installed: no traceback of `python -m`, and an import error that says what to do."""
    code = ABSENT + start.format("fastinterp.integrations.mergekit")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs mergekit, which is not installed here: `pip install mergekit==0.1.5`" in done.stderr
    assert "`fastinterp-mergekit config.yml merged/` merges as mergekit-yaml does" in done.stderr
    assert ("Traceback" in done.stderr) is start.startswith("import {")
