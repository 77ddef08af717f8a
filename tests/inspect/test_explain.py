"""What `explain` says of formulas, parameters, filters, layers and vocabularies."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands
from fastinterp.inspect.explain_parameters import parameters_in_force, symbols
from fastinterp.messages import WIDTH
from fastinterp.methods import find, names
from fastinterp.recipe.load import load_recipe
from tests.support import architectures as arch
from tests.support.models import bf16, layers, save
from tests.support.tokens import words

SLICES = """\
merge_method: ties
base_model: base
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3], parameters: {}}]
parameters:
  weight: [0.2, 0.8]
  density: [{filter: mlp, value: 0.3}, {filter: norm, value: [0.4, 0.5, 0.6]}, {value: 0.5}]
  preset: paper
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """base/, a/ and b/ in the current folder, of 3 layers."""
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["base", "a", "b"]):
        save(tmp_path / name, layers(1, noise=0.1 * i))
    return tmp_path


def explained(text: str, *args: str) -> str:
    done = CliRunner().invoke(commands, ["explain", "-", *args], input=text)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_parameters_filters_and_slices(folder):
    text = explained(SLICES)
    assert text.partition("params")[2].partition("read")[0] == (
        "   weight   0.2 to 0.8 over the layers\n"
        "         density  mlp 0.3 (2 tensors), norm [0.4, 0.5, 0.6] over the layers (2\n"
        "           tensors), others 0.5 (1 tensor)\n"
        "         preset   paper\n"
        "         defaults: normalize true, rescale false, lambda 1, int8_mask false\n"
        "layers   0..1 = x0 0..1, x1 0..1, x2 0..1\n"
        "         2..3 = copied from x2 1..2\n"
    )


def test_formula_in_force(folder):
    text = explained(SLICES)
    assert "  t_i = x_i - x0 where |x_i - x0| is among the largest, else 0\n  A: the models with t_i != 0" in text
    assert text.splitlines()[2].startswith("  preset paper: like peft, and `density` is a fraction of the whole")
    told, _, formula = text.partition("  in the formula of preset mergekit:\n")
    assert "(peft: the sign is that of sum t_i, without weights," in " ".join(told.split()) and "out = x0" in formula
    assert "preset" not in explained(SLICES.replace("preset: paper", "preset: mergekit")).partition("params")[0]


def test_counts_agree_with_what_the_merge_takes():
    recipe = load_recipe(SLICES)
    found = parameters_in_force(recipe, [arch.llama(3)] * 3)
    (density,) = (entry for entry in found["parameters"] if entry["parameter"] == "density")
    # 2 merged layers; the embedding comes before the slices, norm and head are copied with the last one
    merged = [n for n in arch.llama(2) if ".layers." in n or "embed" in n]
    mlp = [n for n in merged if "mlp" in n]
    norm = [n for n in merged if "norm" in n and n not in mlp]
    assert [c["tensors"] for c in density["cases"]] == [len(mlp), len(norm), len(merged) - len(mlp) - len(norm)]


def test_values_of_models_slices_and_modules_say_whose_they_are():
    text = (
        "merge_method: linear\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}},"
        " {model: b, layer_range: [0, 1], parameters: {weight: 2}}]\n"
        "  - sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2]}]\n    parameters: {weight: 3}\n"
        "parameters: {normalize: false}\n"
    )
    found = parameters_in_force(load_recipe(text), None)
    assert [(e["parameter"], e["of"], e["cases"][0]["value"]) for e in found["parameters"]] == [
        ("weight", "slice 1, x0", 1.0), ("weight", "slice 1, x1", 2.0), ("weight", "slice 2", 3.0),
        ("normalize", "", False),
    ]  # fmt: skip
    text = "merge_method: passthrough\nmodules: {vision: {models: [{model: a}]}, model: {models: [{model: b}]}}\n"
    assert [(s["module"], s["sources"]) for s in parameters_in_force(load_recipe(text), None)["slices"]] == [
        ("vision", [{"model": "x0", "layers": None}]), ("model", [{"model": "x1", "layers": None}]),
    ]  # fmt: skip


@pytest.mark.parametrize("name", names())
def test_symbols_of_every_method(name):
    """Each is a definition: a name first, then what it is; none is cut off by the columns of the docstring."""
    from fastinterp.cli.info import example

    found = symbols(load_recipe(example(find(name)) + "\n"))
    for line in found:
        assert " = " in line or ": " in line or line.startswith("where "), line
        assert "  " not in line and line.count("(") == line.count(")"), line


def test_seed_of_what_is_drawn(folder):
    text = (
        "merge_method: dare_ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: 1, density: 0.5}\nseed: 42\n"
    )
    assert "elements are dropped at random, seed 42" in explained(text)
    assert "drawn" not in explained(SLICES)


def test_rows_that_follow_their_tokens(folder):
    for name, vocabulary in (("x", ["a", "b"]), ("y", ["b", "a", "c"])):
        save(folder / name, {"embed_tokens.weight": bf16(np.ones((len(vocabulary), 2))), "w": bf16([1.0])})
        words(folder / name, vocabulary)
    text = explained(
        "merge_method: linear\nmodels: [{model: x}, {model: y}]\nparameters: {weight: 1}\ntokenizer_source: union\n"
    )
    assert "vocabulary: union, with the ids of x, 3 rows\n" in text
    assert "1 tensor with rows reordered by token: embed_tokens.weight\n" in text


def test_letters_of_documents_are_those_of_the_legend(folder):
    text = explained(
        "name: x\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n---\n"
        "merge_method: nuslerp\nmodels: [{model: x, parameters: {weight: 1}}, {model: base, parameters: {weight: 2}}]\n"
    )
    letter = {line.split(" = ")[1]: line.split(" = ")[0].strip() for line in text.splitlines() if line[:3] == "  x"}
    mixed = next(line.split()[0] for line in text.splitlines() if line.endswith(", x"))
    assert f"weight  {mixed}: 1; {letter['base']}: 2" in text


def test_json_has_all_of_it(folder):
    found = json.loads(explained(SLICES, "--json"))
    assert found["given"]["slices"][1] == {
        "module": None, "layers": [2, 4], "sources": [{"model": "x2", "layers": [1, 3]}], "copied": True,
    }  # fmt: skip
    assert found["given"]["defaults"] == {"normalize": True, "rescale": False, "lambda": 1.0, "int8_mask": False}


def test_nothing_is_wider_than_a_terminal(folder):
    for method in names():
        parameters = {p.name: 0.5 for p in find(method).parameters if p.required}
        if "fisher" in parameters or find(method).models[0] > 3:
            continue
        base = {"base_model": "base"} if find(method).base == "required" else {}
        count = max(1, find(method).models[0] - len(base))
        recipe = {"merge_method": method, **base, "models": [{"model": m} for m in "ab"[:count]]}
        if method == "ema":
            parameters["decay"] = 0.5
        text = str(fastinterp.explain({**recipe, **({"parameters": parameters} if parameters else {})}))
        assert max(map(len, text.splitlines())) <= WIDTH
    assert Path("base").is_dir()


def test_an_explanation_has_the_plan_its_attributes_and_a_text(folder):
    explanation = fastinterp.explain(SLICES)
    assert str(explanation) == explained(SLICES).rstrip("\n")
    assert json.loads(explained(SLICES, "--json")) == {"ok": True, **explanation.as_dict()}
    assert explanation.bytes_read == explanation.plan.bytes_read and repr(explanation) == repr(explanation.plan)
    assert str(copy.copy(explanation)) == str(explanation)
    with pytest.raises(AttributeError, match="nothing"):
        _ = explanation.nothing


def test_the_result_of_check_has_the_names_of_its_json(folder):
    result = fastinterp.check(SLICES)
    assert (result.wrong, result.odd) == (result.errors, result.warnings)
    assert result.as_dict().keys() >= {"ok", "wrong", "odd"}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["config.json", "tokenizer.json"], "configuration and tokenizer of a"),
        (["config.json"], "configuration of a, which has no tokenizer"),
        ([], "no configuration and no tokenizer: none are beside a"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_what_the_output_has_of_its_origin(tmp_path, monkeypatch, names, said):
    """A tokenizer that is not there is not named."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        save(tmp_path / name, {"w": np.ones((2, 2), np.float32)})
        (tmp_path / name / "config.json").unlink()
        for file in names:
            (tmp_path / name / file).write_text("{}")
    recipe = (
        "{merge_method: linear, models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]}"
    )
    assert f"         {said}\n" in explained(recipe)
