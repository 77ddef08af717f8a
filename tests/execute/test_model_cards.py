"""Model cards: what huggingface_hub makes of them, what they tell, and that their command makes the files again."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard, ModelCardData, constants
from huggingface_hub.utils._validators import validate_repo_id

import fastinterp
from fastinterp.cli import commands
from fastinterp.output.model_card import model_card
from tests.support.models import layers, save

TIES = """\
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.3}}
  - {model: b, parameters: {weight: [0.2, 0.5, 0.8], density: [{filter: mlp, value: 0.2}, {value: 0.4}]}}
parameters: {lambda: 0.7}
"""
LINEAR = "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 3}}\n- {model: b, parameters: {weight: 1}}\n"
SLICES = """\
merge_method: nuslerp
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [1, 2]}, {model: b, layer_range: [1, 2], parameters: {weight: 2}}]
parameters: {weight: 1}
"""
CHAIN = (
    f"name: mix\n{LINEAR}---\nmerge_method: slerp\nbase_model: mix\nmodels: [{{model: b}}]\nparameters: {{t: 0.5}}\n"
)
SAMPLE = {"ties": TIES, "linear": LINEAR, "slices": SLICES, "chain": CHAIN}


@pytest.fixture
def models(tmp_path, monkeypatch):
    """base/, a/ and b/ in the current folder, with cards that state a licence, and configurations."""
    for i, name in enumerate(("base", "a", "b")):
        save(tmp_path / name, layers(1, noise=0.1 * i))
        (tmp_path / name / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 3}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def blocks(text: str) -> dict[str, str]:
    """The fenced blocks of a card, by language."""
    return dict(re.findall(r"^```(\w*)\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float32", "rounding": "stochastic", "seed": 3, "max_shard_size": 200}]
)
@pytest.mark.parametrize("name", SAMPLE)
def test_the_command_of_a_card_makes_the_same_files_of_its_recipe(models, name, options):
    fastinterp.merge(SAMPLE[name], "out", **options)
    told = blocks((models / "out" / "README.md").read_text())
    assert told["yaml"] == SAMPLE[name].rstrip()
    (models / "recipe.yml").write_text(told["yaml"] + "\n")
    program, *args = shlex.split(told["sh"])
    assert (program, args[0]) == ("fastinterp", "merge")
    done = CliRunner().invoke(commands, args, prog_name=program, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert files(models / "OUT") == files(models / "out")


@pytest.mark.parametrize("name", SAMPLE)
def test_a_card_is_what_the_hub_reads(models, name):
    fastinterp.merge(SAMPLE[name], "out")
    card = ModelCard.load(models / "out" / "README.md")
    assert isinstance(card.data, ModelCardData)
    found = card.data.to_dict()
    assert (found["library_name"], found["license"]) == ("transformers", "apache-2.0")
    assert found["tags"][:3] == ["merge", "mergekit", "fastinterp"] and "base_model" not in found
    assert card.text.lstrip().startswith("# Merged model\n")


def test_the_hubs_validator_gets_a_card_that_it_can_parse(monkeypatch):
    """ModelCard.validate sends the card to the Hub, which is not reached here: it gets the whole of it."""
    text = model_card("merge_method: ties\n", ["org/a@main", "org/b", "./local"], "ties", "0.1.0")
    card = ModelCard(text)
    found = card.data.to_dict()
    assert (found["base_model"], found["base_model_relation"]) == (["org/a", "org/b"], "merge")
    for name in found["base_model"]:
        validate_repo_id(name)
    sent: list[Any] = []

    class Session:
        def post(self, url, json, headers):
            sent.append((url, json))

            class Response:
                def raise_for_status(self):
                    return None

            return Response()

    monkeypatch.setattr("huggingface_hub.repocard.get_session", Session)
    card.validate()
    ((url, body),) = sent
    assert url.startswith(constants.ENDPOINT) and body["content"].startswith("---\nbase_model:\n- org/a\n")


def test_a_card_tells_models_parameters_formula_and_rounding(models):
    fastinterp.merge(TIES, "out")
    text = (models / "out" / "README.md").read_text()
    assert f"Made with fastinterp {fastinterp.__version__} by the method `ties`: Keep the largest changes" in text
    assert "out = x0 + lambda * sum_A w_i*t_i / sum_A w_i" in blocks(text)[""]
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows == [
        "|  | model | weight | density |",
        "|---|---|---|---|",
        "| `x0` | `base` | base |  |",
        "| `x1` | `a` | 0.5 | 0.3 |",
        "| `x2` | `b` | 0.2 to 0.5 to 0.8 over the layers | mlp 0.2, others 0.4 |",
    ]
    assert "* rounding kept 100 % of the change: effective strength 1\n" in text
    assert "lambda 0.7, int8_mask false (default), preset mergekit (default)" in text


def test_a_card_tells_slices(models):
    fastinterp.merge(SLICES, "out")
    rows = [line for line in (models / "out" / "README.md").read_text().splitlines() if line.startswith("|")]
    assert rows == [
        "|  | model | layers | weight |",
        "|---|---|---|---|",
        "| `x0` | `a` | 0 to 1 | copied |",
        "| `x0` | `a` | 1 to 1 | 1 |",
        "| `x1` | `b` | 1 to 1 | 2 |",
    ]


def test_a_card_tells_what_a_weight_acts_as(models):
    """Where b differs from a by one ulp, rounding to nearest makes 0.25 of it 0."""
    ones = np.full(4096, 0x3F80, np.uint16)
    save(models / "x", {"w": ones})
    save(models / "y", {"w": ones + 1})
    fastinterp.interpolate("x", "y", 0.75, "out")
    text = (models / "out" / "README.md").read_text()
    assert "* rounding made the change 1.33 times as large" in text
    assert "* weight 0.75 of y acts as 1\n" in text
    (models / "r.yml").write_text(LINEAR.replace("model: a", "model: x").replace("model: b", "model: y"))
    done = CliRunner().invoke(commands, ["merge", "r.yml", "other"], prog_name="fastinterp", catch_exceptions=False)
    assert "rounding kept 0 % of the change" in done.stdout and "  weight 0.25 of y acts as 0\n" in done.stdout
