"""mergekit's recipes, in essence, with what every tensor gets; and all that the language has beside whole models."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from fastinterp.recipe.load import load_recipe
from fastinterp.recipe.targets import targets
from fastinterp.recipe.values import between
from tests.support import architectures as arch
from tests.support.references import texts
from tests.support.stand_ins import stand_ins  # noqa: F401  a fixture

TIES = """\
models:
  - model: psmathur/orca_mini_v3_13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: garage-bAInd/Platypus2-13B
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: WizardLM/WizardMath-13B-V1.0
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: TheBloke/Llama-2-13B-fp16
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
SLERP = """\
slices:
  - sources:
      - model: psmathur/orca_mini_v3_13b
        layer_range: [0, 40]
      - model: garage-bAInd/Platypus2-13B
        layer_range: [0, 40]
merge_method: slerp
base_model: psmathur/orca_mini_v3_13b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: float16
"""
STACK = """\
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: passthrough
dtype: float16
"""
ORCA, PLATYPUS = "psmathur/orca_mini_v3_13b", "garage-bAInd/Platypus2-13B"


def parameters(text: str, names: Collection[str]) -> dict[str, Any]:
    recipe = load_recipe(text)
    return {t.name: t.parameters for t in targets(recipe, [names] * len(recipe.models))}


def at(layer: int, name: str) -> str:
    return f"model.layers.{layer}.{name}.weight"


def test_what_mergekit_needs_for_models_is_accepted():
    """In the long form of a model: no LoRA, and an architecture to take it for."""
    model = "{model: {path: a@b, revision: v1}, lora: null, override_architecture: LlamaForCausalLM}"
    text = f"merge_method: linear\nmodels: [{{model: {model}, parameters: {{weight: 1}}}}]\n"
    (loaded,) = load_recipe(text).models
    assert str(loaded) == "a@b@v1" and not load_recipe(text).warnings


def test_ties():
    """Gradients over 5 layers, a filter with a fallback, and the first number where there is no layer."""
    recipe = load_recipe(TIES)
    assert texts(recipe.models) == ("TheBloke/Llama-2-13B-fp16", ORCA, PLATYPUS, "WizardLM/WizardMath-13B-V1.0")
    assert (recipe.base, recipe.origin, recipe.parameters) == (0, recipe.models[0], None)
    found = parameters(TIES, arch.llama(5))
    given = found[at(0, "mlp.up_proj")]
    assert (given["weight"], given["density"]) == ((1.0, 0.0, 0.5), (1.0, 0.5, 0.33))
    assert (given["normalize"], given["int8_mask"], given["lambda_"]) == (True, True, 1.0)
    for layer, density, weight in [(0, 1.0, 0.0), (1, 0.85, 0.225), (2, 0.7, 0.5), (3, 0.4, 0.775), (4, 0.1, 1.0)]:
        given = found[at(layer, "self_attn.q_proj")]
        assert given["density"] == pytest.approx((density, 0.5, 0.33), abs=1e-15)
        assert given["weight"] == pytest.approx((1.0, weight, 0.0), abs=1e-15)
        assert found[at(layer, "mlp.up_proj")]["weight"][2] == 0.5
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert (found[name]["density"], found[name]["weight"]) == ((1.0, 0.5, 0.33), (1.0, 0.0, 0.0))


def test_bio_merge():
    text = (
        "models:\n  - model: base\n  - {model: a, parameters: {density: 0.5, weight: 0.5}}\n"
        "  - {model: b, parameters: {density: 0.5, weight: 0.5}}\n"
        "merge_method: ties\nbase_model: base\nparameters: {normalize: false, int8_mask: true}\ndtype: float16\n"
    )
    recipe = load_recipe(text)
    assert texts(recipe.models) == ("base", "a", "b")
    given = {"weight": (0.5, 0.5), "density": (0.5, 0.5), "normalize": False, "int8_mask": True, "lambda": 1.0}
    assert recipe.parameters is not None
    assert dict(recipe.parameters) | given == recipe.parameters
    out, *legend = recipe.formula().splitlines()
    assert out.startswith("out = x0 + ")
    assert legend == ["x0 = base", "x1 = a", "x2 = b"]


def test_gradient_slerp():
    found = parameters(SLERP, arch.llama(40))
    assert [found[at(i, "self_attn.v_proj")]["t"] for i in (0, 39)] == [0.0, 1.0]
    assert [found[at(i, "mlp.down_proj")]["t"] for i in (0, 39)] == [1.0, 0.0]
    assert found[at(13, "self_attn.v_proj")]["t"] == pytest.approx(0.5 - 0.2 / 3, abs=1e-15)
    assert {found[at(i, "input_layernorm")]["t"] for i in range(40)} == {0.5}
    assert {found[name]["t"] for name in ("model.embed_tokens.weight", "lm_head.weight")} == {0.5}
    recipe = load_recipe(SLERP.replace("base_model: psmathur/orca_mini_v3_13b", f"base_model: {PLATYPUS}"))
    assert texts(recipe.models) == (PLATYPUS, ORCA)


def test_44_layers():
    recipe = load_recipe(STACK)
    assert (texts(recipe.models), str(recipe.origin)) == ((ORCA, PLATYPUS), ORCA)
    found = {t.name: t.inputs for t in targets(recipe, [arch.llama(40)] * 2)}
    assert list(found) == arch.llama(44)
    assert found[at(23, "mlp.up_proj")] == ((0, at(23, "mlp.up_proj")),)
    assert found[at(24, "mlp.up_proj")] == ((1, at(20, "mlp.up_proj")),)
    assert found[at(43, "mlp.up_proj")] == ((1, at(39, "mlp.up_proj")),)


def test_arcee_fusion():
    text = "models: [{model: a}, {model: b}]\nmerge_method: arcee_fusion\nbase_model: a\ndtype: bfloat16\n"
    recipe = load_recipe(text)
    assert (texts(recipe.models), recipe.base, recipe.parameters) == (("a", "b"), 0, {})


def test_scaling_by_filter():
    text = (
        "merge_method: passthrough\nmodels:\n  - model: a\n    parameters:\n      scale:\n"
        "        - {filter: o_proj, value: 0.5}\n        - {filter: down_proj, value: 0.25}\n        - {value: 1}\n"
    )
    found = parameters(text, arch.llama(1))
    assert [found[at(0, n)]["scale"] for n in ("self_attn.o_proj", "mlp.down_proj", "mlp.up_proj")] == [
        (0.5,), (0.25,), (1.0,),
    ]  # fmt: skip
    assert load_recipe(text).coefficients is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{filter: mlp, value: 2}", {"mlp.up_proj": 2.0, "self_attn.q_proj": None}),
        ("[{filter: mlp, value: 2}]", {"mlp.up_proj": 2.0, "self_attn.q_proj": None}),
        ("[{filter: '*', value: 2}]", {"mlp.up_proj": 2.0}),
        ("[{filter: null, value: 2}]", {"mlp.up_proj": 2.0}),
        ("{value: [3, 5]}", {"mlp.up_proj": 5.0}),
        ("[3]", {"mlp.up_proj": 3.0}),
        ("[{filter: up, value: 2}, {filter: mlp, value: 3}]", {"mlp.up_proj": 2.0, "mlp.down_proj": 3.0}),
        ("[{filter: mlp, value: null}, {value: 2}]", {"mlp.up_proj": None, "self_attn.q_proj": 2.0}),
    ],
)
def test_forms_of_a_value(given, expected):
    """In a model of one layer, where a gradient gives its last number."""
    found = parameters(
        f"merge_method: passthrough\nmodels: [{{model: a, parameters: {{scale: {given}}}}}]\n", arch.llama(1)
    )
    assert {name: found[at(0, name)]["scale"][0] for name in expected} == expected


def test_a_top_level_value_where_no_filter_matches():
    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: {filter: mlp, value: 3}}}, {model: b}]\n"
        "parameters: {weight: [{filter: q_proj, value: 2}, {value: 1}]}\n"
    )
    found = parameters(text, arch.llama(1))
    assert [found[at(0, n)]["weight"] for n in ("mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj")] == [
        (3.0, 1.0), (2.0, 2.0), (1.0, 1.0),
    ]  # fmt: skip


def test_parameters_of_every_kind():
    text = (
        "merge_method: words\nmodels: [{model: a, parameters: {fisher: a/fisher}}, {model: b}]\n"
        "parameters:\n  fisher: [{filter: mlp, value: b/mlp}, {value: b/fisher}]\n"
        "  preset: [{filter: mlp, value: paper}]\n  weights: {decay: 1-sqrt}\n"
        "  steps: [{filter: q_proj, value: 7}]\n  radius: [0, 1]\n"
    )
    recipe = load_recipe(text)
    assert texts(recipe.sidecars) == ("a/fisher", "b/mlp", "b/fisher")
    found = parameters(text, arch.llama(2))
    assert found[at(1, "mlp.up_proj")] == {
        "fisher": ("a/fisher", "b/mlp"), "preset": "paper", "weights": "1-sqrt", "steps": 3, "radius": 1.0,
    }  # fmt: skip
    assert found[at(0, "self_attn.q_proj")]["steps"] == 7


@pytest.mark.parametrize(
    ("numbers", "place", "expected"),
    [
        ((1.0, 0.7, 0.1), (1, 5), 0.85),
        ((1.0, 0.7, 0.1), None, 1.0),
        ((1.0, 0.7, 0.1), (0, 1), 0.1),
        ((0.0, 1.0), (1, 3), 0.5),
        ((0.1, 0.7), (2, 3), 0.7),
        ((0.3,), (1, 3), 0.3),
        ((0.3, 0.3), (1, 4), 0.3),
        ((0.0, 0.3, 0.7, 1.0), (1, 4), 0.3),
    ],
)
def test_gradient(numbers, place, expected):
    assert between(numbers, place) == expected
