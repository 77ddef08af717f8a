"""`replay`: the same bytes again, from the receipt of an output alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.integrations.mergekit_options import run, settings_of
from fastinterp.methods import names
from fastinterp.recipe.load import load_recipes
from tests.support.merged import recipe_of, related, saved_in, tree
from tests.verification.kinds import KINDS


@pytest.mark.parametrize("method", [name for name in names() if name != "passthrough"])
def test_the_same_bytes_by_every_method(tmp_path, method):
    paths = saved_in(tmp_path / "models", related(3))
    fastinterp.merge(recipe_of(method, paths), tmp_path / "out")
    result = fastinterp.replay(tmp_path / "out", tmp_path / "again")
    assert result.same
    assert tree(tmp_path / "out") == tree(tmp_path / "again")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bytes_of_every_kind_of_output(tmp_path, kind):
    out = KINDS[kind](tmp_path)
    again = tmp_path / f"again{out.suffix if out.is_file() else ''}"
    assert fastinterp.replay(out, again).same
    assert tree(out) == tree(again)


def test_statistics_are_not_computed_again(tmp_path, monkeypatch):
    """A folder has the coefficients that came from the data: no histogram of it is made."""
    paths = saved_in(tmp_path / "models", related(3))
    fastinterp.merge(recipe_of("ties", paths), tmp_path / "out")
    fastinterp.merge(recipe_of("ties", paths), tmp_path / "out.safetensors")
    monkeypatch.setattr("fastinterp.execute.jobs.adaptive_job._survey", lambda *_: 1 / 0)
    fastinterp.replay(tmp_path / "out", tmp_path / "again")
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    with pytest.raises(ZeroDivisionError):  # one file has only its header
        fastinterp.replay(tmp_path / "out.safetensors", tmp_path / "again.safetensors")


def test_models_that_are_elsewhere(tmp_path):
    """They are found near the output, or where `models` says; else the error says how to name them."""
    paths = saved_in(tmp_path / "a" / "models", related(3))
    recipe: dict[str, Any] = recipe_of("ties", paths)
    fastinterp.merge(recipe, tmp_path / "b" / "c" / "d" / "out")
    out = tmp_path / "b" / "c" / "d" / "out"
    with pytest.raises(
        CheckpointError, match=r"the models base, ft1, ft2 are neither here nor near the output"
    ) as missing:
        fastinterp.replay(out, tmp_path / "again")
    assert "--models base=PATH --models ft1=PATH --models ft2=PATH, or --models FOLDER" in str(missing.value)
    fastinterp.replay(out, tmp_path / "again", models=tmp_path / "a" / "models")
    assert tree(out) == tree(tmp_path / "again")
    paths[2].rename(tmp_path / "renamed")
    given = [str(tmp_path / "a" / "models"), f"ft2={tmp_path / 'renamed'}"]
    fastinterp.replay(out, tmp_path / "third", models=given)
    assert tree(out) == tree(tmp_path / "third")
    places = {"base": paths[0], "ft1": paths[1], "ft2": tmp_path / "renamed"}
    fastinterp.replay(out, tmp_path / "fourth", models=places)
    assert tree(out) == tree(tmp_path / "fourth")
    shutil.move(tmp_path / "a" / "models", tmp_path / "b" / "models")
    (tmp_path / "renamed").rename(tmp_path / "b" / "models" / "ft2")
    fastinterp.replay(out, tmp_path / "fifth")  # near the output: in a folder beside one above it
    assert tree(out) == tree(tmp_path / "fifth")
    with pytest.raises(UsageError, match=r"the receipt names no model `ft3`.*base, ft1, ft2"):
        fastinterp.replay(out, tmp_path / "sixth", models={"ft3": paths[0]})


def test_relative_names_that_lead_nowhere(tmp_path, monkeypatch):
    """They may be ids of the Hub, or folders: the error says how to name these."""
    saved_in(tmp_path / "models", related(2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = recipe_of("linear", [Path("models/base"), Path("models/ft1")])
    fastinterp.merge(recipe, tmp_path / "a" / "b" / "c" / "out")
    shutil.move(tmp_path / "models", tmp_path / "x")
    said = r"say where it is: --models models/base=PATH\. Looked at: "
    with pytest.raises(CheckpointError, match=rf"^models/base: .*{said}`.*/models/base`, `.*/a/b/c`, "):
        fastinterp.replay("a/b/c/out", tmp_path / "again")
    monkeypatch.chdir("/")
    places = [f"models/{name}={tmp_path / 'x' / name}" for name in ("base", "ft1")]
    assert fastinterp.replay(tmp_path / "a/b/c/out", tmp_path / "again", models=places).same
    assert fastinterp.verify(tmp_path / "a/b/c/out", models=tmp_path / "x").ok
    places = [f"{name}={tmp_path / 'x' / name}" for name in ("base", "ft1")]  # the last parts of their names
    assert fastinterp.verify(tmp_path / "a/b/c/out", models=places).ok
    with pytest.raises(UsageError) as told:
        fastinterp.verify(tmp_path / "a/b/c/out", models=["ft2=x"])
    assert str(told.value) == "the receipt names no model `ft2`. The models are models/base, models/ft1"


def test_a_last_part_that_two_models_have_names_neither(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, ft1 = saved_in(tmp_path / "models", related(2))
    for place, model in (("a", base), ("b", ft1)):
        shutil.move(model, tmp_path / place / "ft")
    fastinterp.merge(recipe_of("linear", [Path("a/ft"), Path("b/ft")]), "out")
    with pytest.raises(UsageError) as told:
        fastinterp.verify("out", models=["ft=a/ft"])
    assert str(told.value) == "`ft` may be a/ft or b/ft. Write one of these"
    assert fastinterp.verify("out", models=["a/ft=a/ft"]).ok


def test_private_outputs_name_no_model(tmp_path):
    paths = saved_in(tmp_path / "secret-models", related(3))
    recipe = recipe_of("ties", paths)
    text = f"# of /srv/alice\nmerge_method: ties\nbase_model: {paths[0]}\nmodels:\n" + "".join(
        f"- model: {p}\n  parameters: {{weight: 0.4, density: 0.5}}\n" for p in paths[1:]
    )
    fastinterp.merge(text, tmp_path / "private", private=True)
    fastinterp.merge(recipe, tmp_path / "open")
    contents = tree(tmp_path / "private")
    for word in (b"secret", b"alice", b"ft1", b"ft2", str(tmp_path).encode()):
        assert not [name for name, content in contents.items() if word in content]
    with pytest.raises(CheckpointError, match="because it was made with --private") as missing:
        fastinterp.replay(tmp_path / "private", tmp_path / "again")
    assert "--models model-1=PATH" in str(missing.value)
    places = {f"model-{i}": path for i, path in enumerate(paths, 1)}
    assert fastinterp.replay(tmp_path / "private", tmp_path / "again", models=places).same
    assert tree(tmp_path / "private") == tree(tmp_path / "again")
    assert fastinterp.verify(tmp_path / "private", models=places, full=True).ok


def test_recipes_in_every_form(tmp_path, monkeypatch):
    """JSON with tabs, YAML with comments, a recipe on stdin: text that is not touched gives the same receipt."""
    paths = saved_in(tmp_path / "models", related(2))
    recipe = recipe_of("linear", paths)
    (tmp_path / "a.json").write_text(json.dumps(recipe, indent="\t"))
    (tmp_path / "b.yml").write_text(f"# {paths[0]} and the other\n{json.dumps(recipe)}\n# end")
    monkeypatch.chdir(tmp_path / "models")  # relative names are found near the output
    (tmp_path / "c.yml").write_text(json.dumps(recipe).replace(f"{tmp_path}/models/", ""))
    for name in ("a.json", "b.yml", "c.yml"):
        out = tmp_path / f"out of {name}"
        fastinterp.merge(tmp_path / name, out)
        monkeypatch.chdir("/")
        assert fastinterp.replay(out, tmp_path / f"again {name}").same
        assert tree(out) == tree(tmp_path / f"again {name}")
        assert not [n for n, content in tree(out).items() if str(tmp_path).encode() in content]
        monkeypatch.chdir(tmp_path / "models")


def test_what_cannot_be_replayed(tmp_path):
    paths = saved_in(tmp_path / "models", related(2))
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out.safetensors")
    with pytest.raises(UsageError, match=r"is one file: give a name that ends in `\.safetensors`. Got"):
        fastinterp.replay(tmp_path / "out.safetensors", tmp_path / "folder")
    with pytest.raises(CheckpointError, match="this is no output of fastinterp: it has no receipt"):
        fastinterp.replay(paths[0], tmp_path / "again")
    with pytest.raises(CheckpointError, match="there is no such folder or file"):
        fastinterp.replay(tmp_path / "gone", tmp_path / "again")


def test_a_changed_input_is_told(tmp_path):
    """The output is that of the inputs as they are, and differs from the receipt."""
    paths = saved_in(tmp_path / "models", related(2))
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "out")
    saved_in(tmp_path / "models", related(2, seed=9))
    result = fastinterp.replay(tmp_path / "out", tmp_path / "again")
    assert not result.same
    assert result.exit_code == 1
    assert result.differences == ("model.safetensors",)
    said = [f"{name}: the data of model.safetensors is not what was read" for name in ("base", "ft1")]
    assert result.changed == f"an input has changed since: {', '.join(said)}"
    assert f"different from the receipt: model.safetensors, because {result.changed}" in result.summary()
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "new")
    saved_in(tmp_path / "other", related(2))
    shutil.copy(tmp_path / "other" / "ft1" / "model.safetensors", paths[1])
    result = fastinterp.replay(tmp_path / "new", tmp_path / "third")
    assert result.changed == f"an input has changed since: {said[1]}"
    fastinterp.merge(recipe_of("linear", paths), tmp_path / "a.safetensors")  # its header has nothing of the inputs
    saved_in(tmp_path / "models", related(2, seed=9))
    result = fastinterp.replay(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "has changed since: one of base, ft1, the receipt does not tell which" in result.summary()


def test_models_that_were_read_elsewhere_are_named(tmp_path, monkeypatch):
    """Other copies, near the output or in a folder that is given; a folder without any of them is refused."""
    _, tuned = saved_in(tmp_path / "models", related(2))
    monkeypatch.chdir(tmp_path)
    fastinterp.merge(recipe_of("linear", ["models/base", "models/ft1"]), "out")
    assert (fastinterp.replay("out", "again").models, fastinterp.verify("out").models) == ({}, {})
    (tmp_path / "store").mkdir()
    tuned.rename(tmp_path / "store" / "ft1")
    with pytest.raises(UsageError, match=r"--models `none`: none of the models is there: models/base, models/ft1"):
        (tmp_path / "none").mkdir()
        fastinterp.verify("out", models="none")
    result = fastinterp.verify("out", models="store")
    assert result.ok
    assert result.models == result.as_dict()["models"] == {"models/ft1": "store/ft1"}
    assert "\n  model models/ft1: read from store/ft1" in result.summary()
    again = fastinterp.replay("out", "third", models={"models/ft1": "store/ft1"})
    assert again.as_dict()["models"] == {"models/ft1": "store/ft1"}
    assert "\n  model models/ft1: read from store/ft1\n" in again.summary()
    (tmp_path / "store" / "ft1").rename(tuned)
    (tmp_path / "sub").mkdir()
    (tmp_path / "models").rename(tmp_path / "sub" / "models")
    result = fastinterp.verify("out")
    assert result.ok
    assert result.models == {f"models/{n}": str(tmp_path / "sub" / "models" / n) for n in ("base", "ft1")}


def test_the_copy_of_the_recipe_that_mergekit_writes(tmp_path, monkeypatch):
    """It is made from the receipt alone, where that has the same text; else copied, and its absence is told."""
    paths = saved_in(tmp_path / "models", related(2))
    monkeypatch.chdir(tmp_path)
    for name, models in (("relative", ["models/base", "models/ft1"]), ("absolute", list(map(str, paths)))):
        text = "# mine\n" + json.dumps(recipe_of("linear", models))
        (tmp_path / "recipe.yml").write_text(text)
        recipes = load_recipes("recipe.yml")
        run(recipes, recipes[-1].text, name, settings_of({}))
        assert fastinterp.replay(name, f"{name}-again").same
        assert Path(f"{name}-again", "mergekit_config.yml").read_text() == text
        Path(name, "mergekit_config.yml").write_text("# another's\n")
        result = fastinterp.replay(name, f"{name}-alone")
        assert result.differences == (() if name == "relative" else ("mergekit_config.yml",))
