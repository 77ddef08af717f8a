"""Merge methods that do not come with the package: given to a call, or named by an entry point."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp import methods
from fastinterp.cli import commands
from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import method
from fastinterp.ops.combine import Combine
from tests.support.models import load, save

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text("utf-8")
FILE, CALL, ENTRY = re.findall(r"```(?:python|toml)\n(.*?)```", DOCS.partition("## Methods of your own")[2], re.DOTALL)


@pytest.fixture
def models(tmp_path, monkeypatch):
    """models/base and models/ft1 in the current folder, and halfway.py, which can be imported."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(6, 5)).astype(np.float32)
    change = rng.normal(size=(6, 5)).astype(np.float32)
    for name, x in (("base", base), ("ft1", base + change)):
        save(tmp_path / "models" / name, {"x": x})
    (tmp_path / "halfway.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(methods, "_loaded", {})
    ratio = np.linalg.norm((base + change) - base) / np.linalg.norm(base)
    yield base, base + change, 0.5 / (1 + ratio)
    import sys

    sys.modules.pop("halfway", None)


def check_moved(folder, models):
    base, other, t = models
    dtype, shape, raw = load(Path(folder) / "model.safetensors")["x"]
    got = np.frombuffer(raw, np.float32).reshape(shape)
    assert dtype == "F32"
    np.testing.assert_allclose(got, base + t * (other - base), rtol=1e-6)


def own(name="mine"):
    def mine(n: int, *, far: float = 0.25) -> Combine:
        """Go part of the way."""
        return Combine((0.0, far), base=0)

    mine.__name__ = name
    return method(base="required", models=(2, 2))(mine)


def test_the_example_of_the_documentation(models):
    exec(CALL, {})
    check_moved("moved", models)


def test_an_entry_point_names_a_method(models):
    """For recipes, `methods`, and suggestions."""
    name = re.search(r'entry-points\."([\w.]+)"', ENTRY)
    assert name is not None and name[1] == methods.ENTRY_POINTS
    info = Path("halfway-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halfway\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{name[1]}]\n" + ENTRY.partition("\n")[2].replace('"', ""))
    recipe = "merge_method: halfway\nbase_model: models/base\nmodels: [{model: models/ft1}]\n"
    Path("recipe.yml").write_text(recipe)
    done = CliRunner().invoke(commands, ["merge", "recipe.yml", "out"])
    assert done.exit_code == 0, done.output
    check_moved("out", models)
    listed = CliRunner().invoke(commands, ["methods"]).stdout
    assert "\nhalfway " in listed and "\nlinear " in listed
    assert "t = most" in CliRunner().invoke(commands, ["methods", "halfway"]).stdout
    with pytest.raises(MethodError, match="did you mean `halfway`"):
        fastinterp.explain(recipe.replace("halfway", "halfwy"))
    (info / "entry_points.txt").write_text(f"[{name[1]}]\nother = halfway:Combine\nhalf = halfway:halfway\n")
    with pytest.raises(MethodError, match=r"the entry point halfway:Combine: .* is no merge method. Put `@fastinterp"):
        methods.find("other")
    with pytest.raises(MethodError, match="the method is called `halfway`, so its name there must be that, not `half`"):
        methods.find("half")


def test_given_methods_are_known_in_that_call_alone(models):
    recipe = {"merge_method": "mine", "base_model": "models/base", "models": [{"model": "models/ft1"}]}
    mine = own()
    assert "mine" in str(fastinterp.explain(recipe, methods=[mine]))
    assert not fastinterp.check(recipe, methods=[mine]).errors
    with pytest.raises(MethodError, match="unknown merge method `mine`"):
        fastinterp.explain(recipe)
    with pytest.raises(RecipeError, match=r"unknown parameter `fat` of `mine`.*did you mean `far`"):
        fastinterp.merge(recipe | {"parameters": {"fat": 1}}, "out", methods=[mine])
    base, other, _ = models
    got = fastinterp.merge_tensors([other], mine, base=base, parameters={"far": 1.0})
    assert np.array_equal(got, other)


def test_what_is_no_method_is_refused():
    for wrong, message in [
        (lambda n: None, "`methods`: .*is no merge method. Put `@fastinterp.methods.method"),
        (ModuleType("x"), "is no merge method"),
        (own("linear"), "there is a merge method `linear` already"),
    ]:
        with pytest.raises(MethodError, match=message), methods.given([wrong]):
            pass
    with pytest.raises(MethodError, match="there is a merge method `mine` already"), methods.given([own(), own()]):
        pass
