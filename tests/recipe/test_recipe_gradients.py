"""Lists of numbers that are gradients over the layers, and were hardly meant so."""

from __future__ import annotations

import pytest

from fastinterp.recipe.layers import LayerPosition
from fastinterp.recipe.load import load_recipe, load_recipes

CANCELLED = "`weight` changes nothing: {}, the same for all models, and `{}` divides it away. Per model, write it under"
LIST, FILTERS = "a list is a gradient over the layers", "filters choose by tensor"


def warned(text: str) -> list[str]:
    return [warning.message for recipe in load_recipes(text) for warning in recipe.warnings]


def two(parameters: str, method: str = "linear", more: str = "", models: str = "[{model: a}, {model: b}]") -> str:
    return f"merge_method: {method}\nmodels: {models}\nparameters: {parameters}\n{more}"


BASE = "base_model: base\n"


@pytest.mark.parametrize(
    ("text", "what", "by"),
    [
        (two("{weight: [0.3, 0.7]}"), LIST, "normalize"),
        (two("{weight: [0.3, 0.5, 0.7]}"), LIST, "normalize"),
        (two("{weight: [1, 2]}", "ties", BASE), LIST, "normalize"),
        (two("{weight: [1, 2], normalize: true}", "task_arithmetic", BASE), LIST, "normalize"),
        (two("{weight: [1, 2], normalize: true, preset: paper}", "dare_linear", BASE), LIST, "normalize"),
        (two("{weight: [1, 2]}", "multislerp"), LIST, "normalize_weights"),
        (two("{weight: [1, 2]}", "nuslerp"), LIST, "nuslerp"),
        (two("{weight: [1, 2, 3]}", "geometric_median"), LIST, "geometric_median"),
        (two("{weight: [{filter: mlp, value: [1, 2]}, {value: 1}]}"), LIST, "normalize"),
        (two("{weight: [{filter: mlp, value: 2}, {value: 1}]}"), FILTERS, "normalize"),
        # Under each model, but in the same proportion in every layer.
        (
            two("{}", models="[{model: a, parameters: {weight: [1, 2]}}, {model: b, parameters: {weight: [2, 4]}}]"),
            LIST,
            "normalize",
        ),
        (
            "merge_method: linear\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n"
            "    parameters: {weight: [1, 3]}\n",
            LIST,
            "normalize",
        ),
        (
            "merge_method: linear\nmodules:\n  unet:\n    models: [{model: a}, {model: b}]\n"
            "    parameters: {weight: [1, 3]}\n",
            LIST,
            "normalize",
        ),
    ],
)
def test_a_gradient_that_normalising_cancels(text, what, by):
    (found,) = warned(text)
    assert found.startswith(CANCELLED.format(what, by))


@pytest.mark.parametrize(
    "text",
    [
        two("{weight: 1}"),
        two("{weight: [1, 1, 1]}"),
        two("{weight: [1, 2, 3], normalize: false}"),
        two("{weight: [1, 2, 3, 4], normalize: true, preset: paper}", "ties", BASE),  # divides by a number of models
        two("{weight: [0, 2, 3, 4]}", "ties", BASE),  # nothing is added to the first layer
        two("{weight: [-1, 1, 2]}"),
        two("{}", models="[{model: a, parameters: {weight: [1, 2]}}, {model: b, parameters: {weight: [2, 1]}}]"),
        two("{}", models="[{model: a, parameters: {weight: [1, 2]}}, {model: b, parameters: {weight: 1}}]"),
        two("{weight: [1, 2, 3]}", models="[{model: a, parameters: {weight: 1}}, {model: b}]"),
        two("{density: [0.1, 0.9, 0.5, 0.5], weight: 1}", "ties", BASE),
        two("{t: [0, 0.5, 1]}", "slerp", "base_model: a\n"),
        two("{t: [{filter: mlp, value: [1, 0.5, 0]}, {value: 0.5}]}", "slerp", "base_model: a\n"),
    ],
)
def test_a_gradient_that_is_meant(text):
    assert warned(text) == []


def test_a_lone_model_divides_its_weight_by_itself():
    """A list of any length: there is no other model."""
    (found,) = warned(two("{weight: [1, 2]}", models="[{model: a}]"))
    assert found == (
        "`weight` changes nothing: a list is a gradient over the layers, and there is one model, and `normalize` "
        "divides it away. Write `normalize: false`"
    )


@pytest.mark.parametrize(
    ("text", "name", "numbers"),
    [
        (two("{weight: [0.3, 0.7], normalize: false}"), "weight", "0.3, 0.7"),
        (two("{weight: 1, density: [0.3, 0.7]}", "ties", BASE), "density", "0.3, 0.7"),
        (two("{weight: 1, density: [0.3, 0.7, 0.9]}", "ties", BASE), "density", "0.3, 0.7, 0.9"),  # with the base
        (two("{weight: 1, density: [{filter: mlp, value: [3e-1, 0.7]}]}", "ties", BASE), "density", "0.3, 0.7"),
        (two("{weight: 1, lambda: [0.3, 0.7]}", "ties", BASE), "lambda", "0.3, 0.7"),
        (two("{t: [0.3, 0.7]}", "slerp", "base_model: a\n"), "t", "0.3, 0.7"),
        (
            "merge_method: ties\nbase_model: base\nparameters: {weight: 1}\nmodules:\n  unet:\n"
            "    models: [{model: a}, {model: b}]\n    parameters: {density: [0.3, 0.7]}\n",
            "density",
            "0.3, 0.7",
        ),
        (
            "merge_method: linear\nparameters: {normalize: false}\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]\n"
            "    parameters: {weight: [{value: [0.3, 0.7]}]}\n",
            "weight",
            "0.3, 0.7",
        ),
    ],
)  # fmt: skip
def test_as_many_numbers_as_models(text, name, numbers):
    (found,) = warned(text)
    assert found.startswith(f"`{name}` [{numbers}] has as many numbers as there are models, but a list is a gradient")


def test_what_the_warning_says_to_write_is_the_same_and_is_not_warned_of():
    text = two("{weight: 1, density: [0.2, 0.4, 0.8]}", "ties", BASE)
    (found,) = warned(text)
    written = found.partition("For the gradient, write ")[2].partition(", which is the same")[0]
    longer = text.replace("[0.2, 0.4, 0.8]", written)
    assert warned(longer) == []
    short, long = (load_recipe(one).groups[0].levels[0]["density"] for one in (text, longer))
    for layer in range(12):
        assert short.pick(0, LayerPosition(layer, 12)) == pytest.approx(long.pick(0, LayerPosition(layer, 12)))


def test_a_list_for_what_has_no_gradient_says_where_it_goes():
    from fastinterp.recipe.check import check_recipe

    text = two("{fisher: [one, two], weight: 1}", "fisher")
    assert [error.message for error in check_recipe(text).errors] == [  # type: ignore[attr-defined]
        "`fisher` cannot have a gradient (a list of numbers): there is nothing between its values. Give one value, one "
        "under each model, or filters (`filter`, `value`)"
    ]
