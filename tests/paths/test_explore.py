"""The page's sliders and data: which models they stand for, and how much each layer changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import fastinterp
from fastinterp.errors import StorageError, UsageError
from fastinterp.inspect.compare import deltas
from fastinterp.paths.explore.facts import facts
from fastinterp.paths.explore.sliders import Sliders, read_report
from tests.support.models import bf16, layers, save

ROOT = Path(__file__).resolve().parents[2]


# --- sliders


def recipe(folder, text):
    (folder / "r.yml").write_text(text)
    return str(folder / "r.yml")


def test_two_checkpoints_are_a_line():
    assert Sliders.of(["a", "b"], None, {}) == Sliders("a", {"alpha": "b"}, {"alpha": 0.5})


def test_task_vectors_of_a_recipe_are_sliders_at_their_weights(tmp_path):
    text = "{merge_method: task_arithmetic, base_model: z/base, models: [{model: y/ft-1, parameters: {weight: 0.7}}, "
    text += "{model: x/ft-1@v2, parameters: {weight: -0.2}}, {model: 7b, parameters: {weight: 1}}]}"
    found = Sliders.of([recipe(tmp_path, text)], None, {})
    assert found.base == "z/base"
    assert found.models == {"ft_1": "y/ft-1", "ft_1_2": "x/ft-1@v2", "_7b": "7b"}
    assert found.start == {"ft_1": 0.7, "ft_1_2": -0.2, "_7b": 1.0}


def test_an_average_starts_at_its_first_model(tmp_path):
    text = "{merge_method: linear, models: [{model: a, parameters: {weight: 3}}, {model: b, parameters: {weight: 1}}]}"
    assert Sliders.of([recipe(tmp_path, text)], None, {}) == Sliders("a", {"b": "b"}, {"b": 0.25})


@pytest.mark.parametrize(
    "text",
    [
        "{merge_method: slerp, base_model: a, models: [{model: a}, {model: b}], parameters: {t: 0.5}}",
        "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1, normalize: false}}",
        "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: [0, 1]}}",
    ],
    ids=["curved", "sum", "gradient"],
)
def test_recipes_without_straight_lines_are_refused(tmp_path, text):
    for name in "ab":
        save(tmp_path / name, layers(1))
    text = text.replace("model: a", f"model: {tmp_path / 'a'}").replace("model: b", f"model: {tmp_path / 'b'}")
    with pytest.raises(UsageError, match="no straight lines to move along"):
        Sliders.of([recipe(tmp_path, text)], None, {})


@pytest.mark.parametrize(
    ("models", "base", "added"),
    [([], None, {}), (["a", "b", "c"], None, {}), (["a"], "b", {"x": "c"}), ([], "b", {}), ([], None, {"x": "c"})],
)
def test_arguments_that_say_nothing_clear_are_refused(models, base, added):
    with pytest.raises(UsageError):
        Sliders.of(models, base, added)


def test_one_checkpoint_is_no_path(tmp_path):
    for name in (tmp_path, "a/model.safetensors"):
        with pytest.raises(UsageError, match="is one checkpoint, and a path has two ends"):
            Sliders.of([str(name)], None, {})


def test_report_must_have_the_directions_of_the_sliders(tmp_path):
    one = {"w": np.ones(1, np.float32)}
    found = fastinterp.path({"w": np.zeros(1, np.float32)}, one).evaluate(lambda w, a, s: {"m": a}, [0, 1])
    found.to_json(tmp_path / "r.json")
    assert read_report(str(tmp_path / "r.json"), Sliders.of(["a", "b"], None, {})) == found
    with pytest.raises(UsageError, match="has the directions alpha, but the sliders are x"):
        read_report(str(tmp_path / "r.json"), Sliders.of([], "a", {"x": "b"}))
    with pytest.raises(StorageError):
        read_report(str(tmp_path / "none.json"), Sliders.of(["a", "b"], None, {}))


# --- change by layer


def test_deltas_give_the_size_of_any_sum_of_changes(tmp_path):
    """|sum alpha_i d_i| of three models by the Gram matrices, against float64."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 300)).astype(np.float32)
    paths = [str(save(tmp_path / str(i), {"h.0.w": x[i], "n": np.arange(3)})) for i in range(4)]
    found = deltas(paths[0], paths[1:])
    assert list(found) == ["h.0.w"]
    alphas = np.array([0.7, -0.2, 1.3])
    wanted = np.linalg.norm(alphas @ (x[1:].astype(float) - x[0]))
    gram = np.array(found["h.0.w"].gram)
    assert np.sqrt(alphas @ gram @ alphas) == pytest.approx(wanted, rel=1e-6)
    assert found["h.0.w"].aa == pytest.approx(np.square(x[0].astype(float)).sum())


def test_facts_are_json_even_where_weights_are_not_finite(tmp_path):
    x = layers(1)
    y = layers(1, noise=0.1) | {"model.layers.1.norm.weight": bf16([np.inf] * 4)}
    a, b = str(save(tmp_path / "a", x)), str(save(tmp_path / "b", y))
    sliders = Sliders.of([a, b], None, {})
    found = facts(sliders, deltas(a, [b]), None, prompt="p", low=-1, high=2, most_tokens=9)
    json.dumps(found, allow_nan=False)
    assert found["sliders"] == [{"name": "alpha", "model": b, "start": 0.5, "low": -1, "high": 2}]
    cells = {
        (found["change"]["kinds"][c["kind"]], found["change"]["layers"][c["layer"]]): c
        for c in found["change"]["cells"]
    }
    assert cells["norm.weight", "1"]["gram"] is None
    assert cells["norm.weight", "0"]["gram"][0][0] > 0
    assert ("model.embed_tokens.weight", "") in cells
