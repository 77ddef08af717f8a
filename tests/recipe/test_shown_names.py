"""Names in receipts and model cards: those of the recipe, without the folders of absolute paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import yaml

from fastinterp.recipe.load import load_recipe, load_recipes
from fastinterp.recipe.renaming import shortened
from fastinterp.recipe.shown_names import shown_names


def linear(*names: str, **keys: Any) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 1}} for n in names], **keys}


CASES = {
    "last parts": (["/data/a", "/srv/models/b"], ["a", "b"]),
    "slashes at the end": (["/data/a/", "/data//b"], ["a", "b"]),
    "what tells them apart": (["/x/run/a", "/y/run/a", "/z/b"], ["x/run/a", "y/run/a", "b"]),
    "a relative one of that name": (["a", "/data/a"], ["a", "data/a"]),
    "relative ones and Hub ids stay": (["models/a", "org/model@v1", "../b"], ["models/a", "org/model@v1", "../b"]),
    "the user's folder": (["~/models/a", "/b"], ["a", "b"]),
    "files": (["/d/a.safetensors", "/e/a.safetensors"], ["d/a.safetensors", "e/a.safetensors"]),
    "adapters": (["/m/base+/l/one:0.5+two", "/m/other@main"], ["base+one:0.5+two", "other@main"]),
    "one in the other": (["/m/a", "/m/a/b"], ["a", "b"]),
    "spaces and marks": (["/m/a b/c'd", '/m/"e"'], ["c'd", '"e"']),
}


@pytest.mark.parametrize("name", CASES)
def test_names_of_models(name):
    given, want = CASES[name]
    assert shortened(given) == want
    recipe = load_recipe(linear(*given, *(["filler"] if len(given) < 2 else [])))
    shown = shown_names([recipe])
    assert [shown.model(str(model)) for model in recipe.models] == shortened([str(m) for m in recipe.models])


def test_the_text_of_a_recipe_keeps_its_form():
    """Comments, quotes and order; the values are those of the names."""
    text = (
        "# mine, of /data/models/a\nmerge_method: slerp\nbase_model: '/data/models/a'\n"
        'models: [{model: /data/models/a}, {model: "/data/models/b/"}]\nparameters: {t: 0.5}  # half\n'
    )
    shown = shown_names([load_recipe(text)]).recipe(text)
    assert shown == text.replace("/data/models/a", "a").replace("/data/models/b/", "b")


def test_other_texts_are_not_touched():
    """A path that is the start of another, or stands in a word."""
    models = "".join(f"- {{model: {name}, parameters: {{weight: 1}}}}\n" for name in ("/m", "/m/n"))
    text = f"merge_method: linear\nmodels:\n{models}chat_template: '{{{{ messages }}}} a/m and /m'\n"
    values = yaml.safe_load(shown_names([load_recipe(text)]).recipe(text))
    assert [model["model"] for model in values["models"]] == ["m", "n"]
    assert values["chat_template"] == "{{ messages }} a/m and /m"


def test_escapes_in_yaml():
    """A path that is written with escapes: the recipe is written anew."""
    weight = "parameters: {weight: 1}"
    text = f'merge_method: linear\nmodels:\n- {{model: "/data/\\u00e4", {weight}}}\n- {{model: b, {weight}}}\n'
    shown = shown_names([load_recipe(text)]).recipe(text)
    assert "/data" not in shown
    assert yaml.safe_load(shown)["models"][0]["model"] == "ä"


def test_private_recipes_name_nothing():
    documents = [
        {"merge_method": "linear", "name": "mix", "models": linear("/x/a", "org/b")["models"]},
        linear("mix", "c+/l/one"),
    ]
    text = "# secret\n" + yaml.safe_dump_all(documents, sort_keys=False)
    recipes = [replace(recipe, private=True) for recipe in load_recipes(text)]
    shown = shown_names(recipes)
    assert list(yaml.safe_load_all(shown.recipe(text))) == [
        {"merge_method": "linear", "name": "mix", "models": linear("model-1", "model-2")["models"]},
        linear("mix", "model-3+model-4"),
    ]
    assert "secret" not in shown.recipe(text)
    assert shown.recipe(shown.recipe(text)) == shown.recipe(text)
