"""All that is wrong with a recipe at once, and what is odd about it."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from fastinterp.errors import CheckpointError, ShapeError
from fastinterp.recipe.check import check_recipe
from tests.support import architectures as arch

FAULTY = """\
merge_method: linear
dtyp: float16
dtype: float61
models:
  - {model: a, parameters: {wieght: 1}}
  - {model: b, parameters: {weight: high}}
  - {modle: c}
  - {model: c, parameters: {weight: [1, 2, two], normalize: true}}
parameters:
  weight: [{filter: mlp}]
  normalize: [{filter: mlp, value: 3}]
seed: -1
tokenizer: {source: basis, tokens: {x: {source: z}, y: {kind: 3}}}
chat_template: short
rounding: up
"""


def wrong(text: str) -> list[str]:
    return [f"{error.line}: {error.message}" for error in check_recipe(text).errors]  # type: ignore[attr-defined]


def odd(text: str, *names: Collection[str]) -> list[str]:
    """What is odd, with line; models are called a, b, ..."""
    known = dict(zip("abcdef", names, strict=False))
    found = check_recipe(text, names=known.__getitem__ if names else None)
    assert found.errors == ()
    return [f"{finding.line}: {finding.message}" for finding in found.warnings]


def test_all_that_is_wrong():
    """Once each, in the order of the lines; what follows from another error is not told."""
    found = wrong(FAULTY)
    assert [int(line.partition(":")[0]) for line in found] == sorted(int(line.partition(":")[0]) for line in found)
    assert found == [
        "2: unknown key `dtyp`, did you mean `dtype`?",
        "3: unknown dtype `float61`, did you mean `float64`?",
        "5: unknown parameter `wieght` of `linear`, did you mean `weight`?",
        "6: `weight` must be a finite number (at most 3.4e38), got 'high'",
        "7: unknown key `modle`, did you mean `model`?",
        "8: `weight` must be a finite number (at most 3.4e38), got 'two'",
        "8: `normalize` is one value for the whole merge. Write it in $.parameters",
        "10: the key `value` is missing",
        "11: `normalize` must be true or false, got 3",
        "12: `seed` must be in 0..2**64-1, got -1",
        "13: expected a model that is merged, or base_model, got 'z'",
        "13: unknown key `kind`. Known: source, force",
        "13: expected union, base, a model that is merged, or base_model, got 'basis', did you mean `base`?",
        "14: `chat_template` must be a name, or a Jinja template (20 characters or more, with a `{`), got `short`."
        " Known: auto, alpaca, chatml, exaone, llama3, mistral",
        "15: `rounding` must be nearest or stochastic, got 'up'",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("merge_method: [\n", ["2: not valid YAML: did not find expected node content"]),
        (
            "merge_method: liner\nmodels: []\n",
            [
                "1: unknown merge method `liner`, did you mean `linear`?",
                "2: `models` lists no model. Write `- model: NAME` for each",
            ],
        ),
        ("merge_method: linear\nmodels: 3\n", ["2: expected a list, got a whole number"]),
        ("models: 3\n", ["1: expected a list, got a whole number", "1: the key `merge_method` is missing"]),
        ("- a\n", ["1: expected a mapping, got a list. A recipe starts with `merge_method: ...`"]),
        ("merge_method: linear\n", ["1: the key `models` is missing (or `slices`, or `modules`)"]),
        (
            "merge_method: ties\nmodels: [{model: a}]\n",
            ["1: `ties` needs the key `base_model`: the model that the others were made from, or one of them"],
        ),
        (
            "merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [3, 1]}]\n"
            "  - sources: []\n  - {sources: [{model: a, layer_range: [0, 1], parameters: {x: 1}}]}\n",
            [
                "3: `layer_range` [first, end) ends before it begins, got [3, 1]",
                "4: `sources` lists no model. Write `- {model: NAME, layer_range: [0, 16]}` for each",
                "5: unknown parameter `x` of `linear`. Known: weight",
            ],
        ),
        (
            "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 1]}]}]\nparameters: {weight: 1}\n",
            ["2: `layer_range` [first, end) ends before it begins, got [3, 1]"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nslices: []\nparameters: {weight: 1, normalize: x}\n",
            ["3: `models` and `slices` exclude each other: give one of `models`, `slices`, `modules`",
             "3: `slices` lists no slice. Write `- sources: [{model: NAME, layer_range: [0, 16]}]` for each",
         "4: `normalize` must be true or false, got 'x'"],
        ),
        (
            "name: a\nmerge_method: linear\nmodels: []\n---\nmerge_method: linear\nmodels: [{model: b}]\nx: 1\n",
            ["3: `models` lists no model. Write `- model: NAME` for each",
         "6: `linear` needs the parameter `weight`, and 'b' has none",
             "7: unknown key `x`"],
        ),
    ],
)  # fmt: skip
def test_wrong(text, expected):
    assert [found.partition(". Known: merge_method")[0] for found in wrong(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param(
            "merge_method: linear\nslices:\n  - sources: [{model: a, layer_range: [1, 0]}]\n"
            "  - sources:\n      - {model: a, layer_range: [0, 1]}\n      - {model: b, layer_range: [0, 1, 2]}\n"
            "      - {model: c, layer_range: [1, -2]}\n      - {model: d, layer_range: [1, 3]}\n"
            "      - {model: a, layer_range: [1, 2], parameters: {wight: 1}}\nparameters: {weight: 1}\n",
            [
                "3: `layer_range` [first, end) ends before it begins, got [1, 0]",
                "6: `layer_range` is [first, end], got [0, 1, 2]",
                "7: `layer_range` counts from the first layer, 0; got [1, -2]. Negative numbers have no meaning",
                "8: the sources of a slice must have the same number of layers: 2 here, 1 in $.slices[1].sources[0]",
                "9: 'a' is already listed as $.slices[1].sources[0]. mergekit would drop one of them. Give it to"
                " another slice",
                "9: unknown parameter `wight` of `linear`, did you mean `weight`?",
            ],
            id="slices",
        ),
        pytest.param(
            "merge_method: liner\nmodels:\n  - {model: a, parameters: {wieght: 1, density: x}}\n"
            "  - {modle: b}\n  - {model: c, parameters: {weight: high}}\ndtyp: float32\nseed: -1\n",
            [
                "1: unknown merge method `liner`, did you mean `linear`?",
                "3: unknown parameter `wieght`, did you mean `weight`?",
                "4: unknown key `modle`, did you mean `model`?",
                "5: `weight` must be a finite number (at most 3.4e38), got 'high'",
                "6: unknown key `dtyp`, did you mean `dtype`?",
                "7: `seed` must be in 0..2**64-1, got -1",
            ],
            id="method",
        ),
        pytest.param(
            "merge_method: 3\nmodels: [{model: a, weight: 1}, {model: b}]\nparameters: {weight: z, whatever: 3}\n"
            "dtype: float61\n",
            [
                "1: expected text, got a whole number",
                "2: unknown key `weight`: what a method takes goes under `parameters`",
                "3: unknown parameter `whatever`",
                "4: unknown dtype `float61`, did you mean `float64`?",
            ],
            id="no method",
        ),
        pytest.param(
            "merge_method: linear\nmodels:\n  - model: a\n    parameters:\n      weight:\n"
            "        - {filter: attn, value: x}\n        - {filtr: mlp, vale: 1}\n        - {filter: 3, value: .inf}\n"
            "        - 7\n        - {filter: mlp, value: [1, y, null]}\n"
            "  - {model: b, parameters: {weight: [1, two, null]}}\n",
            [
                "6: `weight` must be a finite number (at most 3.4e38), got 'x'",
                "7: unknown key `filtr`, did you mean `filter`?",
                "7: unknown key `vale`, did you mean `value`?",
                "7: the key `value` is missing",
                "8: `filter` must be text, a part of tensor names, got 3",
                "8: `weight` must be a finite number (at most 3.4e38), got inf",
                "9: numbers and filters do not mix in one list: expected `{filter: ..., value: ...}`, got 7",
                "10: `weight` must be a finite number (at most 3.4e38), got 'y'",
                "10: a gradient consists of numbers, got nothing",
                "11: `weight` must be a finite number (at most 3.4e38), got 'two'",
                "11: a gradient consists of numbers, got nothing",
            ],
            id="filters",
        ),
        pytest.param(
            "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 3}}]\n"
            "slices:\n  - sources: [{model: a, layer_range: [2, 1]}]\n"
            "modules:\n  m: {models: [{model: a, parameters: {weight: x}}]}\n",
            [
                "2: unknown parameter `wieght` of `linear`, did you mean `weight`?",
                "3: `models` and `slices` exclude each other: give one of `models`, `slices`, `modules`",
                "4: `layer_range` [first, end) ends before it begins, got [2, 1]",
                "6: `weight` must be a finite number (at most 3.4e38), got 'x'",
            ],
            id="models, slices and modules",
        ),
        pytest.param(
            "merge_method: linear\nmodels:\n  - {model: a, parameters: {weight: [{filter: x, value: y}]}}\n"
            "tokenizer:\n  source: b\n  pad_to_multiple_of: 0\n  tokens: {t: {source: c}}\n",
            [
                "3: `weight` must be a finite number (at most 3.4e38), got 'y'",
                "5: expected union, base, a model that is merged, or base_model, got 'b'",
                "6: `pad_to_multiple_of` must be in 1..2**20, got 0",
                "7: expected a model that is merged, or base_model, got 'c'",
            ],
            id="tokenizer and filters",
        ),
        pytest.param(
            "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n---\n"
            "merge_method: linear\nmodels: [{model: b}]\nparameters: {weight: 1}\n",
            ["1: the key `name` is missing: every document but the last needs one that those after it use"],
            id="unnamed",
        ),
        pytest.param(
            "name: first-mix\nmerge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1}\n---\n"
            "merge_method: linear\nmodels: [{model: first_mix}]\nparameters: {weight: 1}\n",
            ["1: 'first-mix' is never used by another document, but line 7 names 'first_mix': did you mean"
             " 'first-mix'?"],
            id="close",
        ),
    ],
)  # fmt: skip
def test_no_fault_hides_another(text, expected):
    assert [found.partition(". Known: alpha")[0] for found in wrong(text)] == expected


def test_faults_of_tensors_are_told_together():
    """Slices that go beyond the layers, and weights that cancel, in every document that can be looked at."""
    text = (
        "merge_method: passthrough\nslices:\n  - sources: [{model: a, layer_range: [0, 9]}]\n"
        "  - sources: [{model: a, layer_range: [0, 1]}]\n  - sources: [{model: b, layer_range: [1, 7]}]\n"
    )
    known = {"a": arch.llama(2), "b": arch.llama(3)}
    found = check_recipe(text, names=known.__getitem__).errors
    assert [f"{e.line}: {e.message}" for e in found] == [  # type: ignore[attr-defined]
        "3: `layer_range` [0, 9] goes beyond the 2 layers of a",
        "5: `layer_range` [1, 7] goes beyond the 3 layers of b",
    ]


def test_what_is_wrong_with_the_models():
    """Errors of the models' names count, whoever raises them."""
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"

    def names(model: str) -> list[str]:
        if model == "b":
            raise CheckpointError("there is no such folder", file="b")
        return arch.llama()

    (error,) = check_recipe(text, names=names).errors
    assert str(error) == "b: there is no such folder"
    (error,) = check_recipe(text, names={"a": arch.llama(), "b": arch.llama(3)}.__getitem__).errors
    assert isinstance(error, ShapeError)
    assert check_recipe(text, names={"a": arch.llama(), "b": arch.llama()}.__getitem__).errors == ()


def test_nothing_is_odd():
    text = (
        "merge_method: ties\nbase_model: a\nmodels:\n  - {model: b, parameters: {weight: 0.5, density: 0.4}}\n"
        "parameters: {normalize: [{filter: mlp, value: false}]}\n"
    )
    assert odd(text, arch.llama(), arch.llama()) == []
    assert len(check_recipe(text).recipes) == 1


LINEAR = "merge_method: linear\nmodels:\n  - {{model: a, parameters: {{weight: {}}}}}\n  - {{model: b, parameters: {{weight: {}}}}}\n"  # noqa: E501


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (LINEAR.format(0, 1), ["3: 'a' adds nothing: its weight is 0"]),
        (LINEAR.format(1, "[0]"), ["4: 'b' adds nothing: its weight is 0"]),
        (
            LINEAR.format(1, -0.95),
            ["2: the weights 1, -0.95 nearly cancel: divided by their sum, 0.05, they become large"],
        ),
        (
            LINEAR.format(0.5, 0.4) + "parameters: {normalize: false}\n",
            ["2: the weights 0.5, 0.4 sum to 0.9, and `normalize: false` does not divide by it"],
        ),
        ("merge_method: passthrough\nmodels: [{model: a, parameters: {scale: 1}}]\n", ["2: `scale` 1 changes nothing"]),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0}\n",
            ["4: `t` 0 leaves 'a' as it is"],
        ),
        (
            "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 1}\n",
            ["4: `t` 1 gives 'b' as it is"],
        ),
        (
            "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, lambda: 0}\n",
            ["4: `lambda` 0 leaves 'a' as it is"],
        ),
        (
            "merge_method: dare_linear\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1}\n",
            ["1: without a `density`, dare_linear drops nothing: its default is 1"],
        ),
        (
            "merge_method: dare_linear\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, density: 1}\n",
            ["4: `density` 1 drops nothing, and dropping is what dare_linear is for"],
        ),
        (
            "merge_method: ties\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, density: 0}\n",
            ["4: `density` 0 drops everything"],
        ),
    ],
)
def test_odd_values(text, expected):
    assert odd(text) == expected


@pytest.mark.parametrize(
    ("value", "names", "expected"),
    [
        (
            "[{filter: self_atn, value: 2}, {value: 1}]",
            arch.llama(),
            ["3: the filter 'self_atn' matches nothing: no tensor's name has it, did you mean `self_attn`?"],
        ),
        (
            "[{filter: mlp, value: 2}, {filter: up_proj, value: 3}, {value: 1}]",
            arch.llama(),
            ["3: the filter 'up_proj' matches nothing: a filter above it, or a value nearer to the model, comes first"],
        ),
        (
            "[{filter: layers.1, value: 2}, {value: 1}]",
            arch.llama(12),
            ["3: the filter 'layers.1' also matches layers.10. Write 'layers.1.' for that one"],
        ),
        ("[{filter: layers.1, value: 2}, {value: 1}]", arch.llama(4), []),
        ("[{filter: layers.1., value: 2}, {value: 1}]", arch.llama(12), []),
        ("[0, 1]", arch.llama(), []),
        (
            "[{filter: b, value: [0, 1]}, {value: 1}]",
            ["a.weight", "b.weight"],
            ["3: a gradient, but the models have no layers: its first number is used for all"],
        ),
    ],
)
def test_odd_for_these_tensors(value, names, expected):
    assert (
        odd(f"merge_method: passthrough\nmodels: [{{model: a}}]\nparameters: {{scale: {value}}}\n", names) == expected
    )


def test_weights_that_nearly_cancel_for_some_tensors():
    text = LINEAR.format("[1, -0.95]", 1)
    assert odd(text, arch.llama(12), arch.llama(12)) == [
        "2: the weights -0.95, 1 nearly cancel: divided by their sum, 0.05, they become large, in"
        " model.layers.11.self_attn.q_proj.weight for example"
    ]


def test_the_tensors_of_a_document_above():
    """A later document is looked at with what the earlier one makes: 2 layers, and no layers.3."""
    text = (
        "name: cut\nmerge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]\n---\n"
        "merge_method: passthrough\nmodels: [{model: cut}]\n"
        "parameters: {scale: [{filter: layers.1., value: 2}, {filter: layers.3., value: 3}]}\n"
    )
    assert odd(text, arch.llama()) == ["7: the filter 'layers.3.' matches nothing: no tensor's name has it"]
