"""Recipes: what they mean; and that nothing but RecipeError comes out of anything else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinterp.errors import RecipeError
from fastinterp.methods import find
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import BF16, F16, F32
from fastinterp.recipe.check import check_recipe
from fastinterp.recipe.load import load_recipe, load_recipes
from fastinterp.recipe.references import AdapterRef, ModelRef
from tests.support.recipes import LINEAR, PASS, TASK
from tests.support.references import texts


def test_mergekits_linear_example():
    """Three 13B models, weights 1.0 / 0.3 / 0.5, float16 (examples/linear.yml)."""
    recipe = load_recipe(
        "models:\n"
        "  - model: psmathur/orca_mini_v3_13b\n    parameters:\n      weight: 1.0\n"
        "  - model: WizardLM/WizardLM-13B-V1.2\n    parameters:\n      weight: 0.3\n"
        "  - model: garage-bAInd/Platypus2-13B\n    parameters:\n      weight: 0.5\n"
        "merge_method: linear\ndtype: float16\n"
    )
    assert recipe.method is find("linear")
    assert texts(recipe.models) == (
        "psmathur/orca_mini_v3_13b",
        "WizardLM/WizardLM-13B-V1.2",
        "garage-bAInd/Platypus2-13B",
    )
    assert recipe.combine("model.norm.weight") == Combine((1 / 1.8, 0.3 / 1.8, 0.5 / 1.8), sums_to_one=True)
    assert (recipe.base, recipe.origin, recipe.dtype, recipe.out_dtype) == (None, recipe.models[0], F16, None)
    assert (recipe.rounding, recipe.seed, recipe.fp8_overflow, recipe.integers) == ("nearest", 0, "saturate", None)


def test_task_arithmetic_puts_the_base_first_and_skips_it_among_the_models():
    recipe = load_recipe(TASK)
    assert texts(recipe.models) == ("base", "ft1", "ft2")
    assert (recipe.base, str(recipe.origin)) == (0, "base")
    assert recipe.parameters == {"weight": (0.6, -0.3), "normalize": False, "lambda": 1.0, "int8_mask": False}
    assert recipe.combine("x") == Combine((0.0, 0.6, -0.3), base=0)
    assert recipe.combine("x") is recipe.combine("y")
    assert load_recipe(TASK.replace("  - model: base\n", "")).combine("x") == recipe.combine("x")
    assert load_recipe(TASK.replace("- model: base", "- model: ./base/")).models == recipe.models


def test_lambda_and_a_weight_for_all():
    recipe = load_recipe(
        "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b, parameters: {weight: 3}}]\n"
        "parameters: {weight: 1, normalize: true, lambda: 2}\n"
    )
    assert recipe.combine("x") == Combine((0.0, 0.5, 1.5), base=0)


def test_what_copied_recipes_hold_and_what_changes_nothing():
    """`tokenizer_source: base` is what happens where a base_model is named; int8_mask saves memory in mergekit."""
    copied = TASK + "tokenizer_source: base\nparameters: {int8_mask: true}\n"
    assert load_recipe(copied).combine("x") == load_recipe(TASK).combine("x")
    assert str(load_recipe(copied).origin) == "base"


def test_base_model_of_linear_only_gives_config_and_tokenizer():
    recipe = load_recipe(LINEAR + "base_model: models/c\n")
    assert (texts(recipe.models), recipe.base, str(recipe.origin)) == (("models/a", "models/b"), None, "models/c")
    assert texts(load_recipe(LINEAR + "base_model: models/b\n").models) == ("models/a", "models/b")


def test_passthrough():
    assert load_recipe(PASS).combine("x") == Combine((1.0,))
    assert load_recipe(PASS.replace("model: a", "model: a, parameters: {scale: -2}")).combine("x") == Combine((-2.0,))
    assert load_recipe(PASS.replace("model: a", "model: a, parameters: {scale: null}")).combine("x") == Combine((1.0,))


def test_every_key():
    recipe = load_recipe(
        LINEAR + "base_model: {model: {path: with+plus@at, revision: v1}}\nparameters: {normalize: off}\n"
        "dtype: torch.bfloat16\nout_dtype: F32\nrounding: stochastic\nseed: 18446744073709551615\n"
        "fp8_overflow: nonfinite\nintegers: ./models/b\n"
    )
    assert recipe.combine("x") == Combine((1.0, 0.3))
    assert str(recipe.origin) == "with+plus@at@v1"
    assert (recipe.dtype, recipe.out_dtype, recipe.rounding, recipe.seed) == (BF16, F32, "stochastic", 2**64 - 1)
    assert (recipe.fp8_overflow, str(recipe.integers)) == ("nonfinite", "models/b")


def test_model_references():
    """`name`, `name@revision`, and the long forms; what a string cannot say, the long form can."""
    for given_name, expected in [
        ("org/name@main", "org/name@main"),
        ({"model": "org/name@main"}, "org/name@main"),
        ({"model": {"path": "org/name"}}, "org/name"),
        ({"model": {"path": "org/name", "revision": "main"}}, "org/name@main"),
        ({"model": {"path": "a+b"}}, "a+b"),
        (Path("models") / "a", "models/a"),
    ]:
        recipe = load_recipe({"merge_method": "passthrough", "models": ({"model": given_name},)})
        assert texts(recipe.models) == (expected,)


def test_yaml_anchors_and_merge_keys():
    recipe = load_recipe(
        "merge_method: linear\n"
        "models:\n"
        "  - &one {model: a, parameters: &p {weight: 0.5}}\n"
        "  - {<<: *one, model: b}\n"
        "  - {model: c, parameters: *p}\n"
        "  - {model: d, parameters: {<<: [{weight: 1.5}, *p]}}\n"
    )
    assert texts(recipe.models) == ("a", "b", "c", "d")
    assert recipe.parameters is not None
    assert recipe.parameters["weight"] == (0.5, 0.5, 0.5, 1.5)


def test_sources_agree(tmp_path, monkeypatch):
    """Text, a YAML file, a JSON file, a str path and a mapping give the same recipe; text is kept word for word."""
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "# a comment\n" + LINEAR
    yml, js = tmp_path / "merge.yml", tmp_path / "merge.json"
    yml.write_text(text)
    js.write_text("\ufeff" + json.dumps(yaml.safe_load(text), indent="\t"), encoding="utf-8")
    recipes = [load_recipe(s) for s in (text, yml, str(yml), js, yaml.safe_load(text))]
    assert len({(r.models, r.coefficients, r.origin) for r in recipes}) == 1
    assert [r.text == text for r in recipes] == [True, True, True, False, False]
    assert yaml.safe_load(recipes[4].text) == yaml.safe_load(text)
    assert load_recipe("~/merge.yml").text == text
    assert [r.file for r in recipes] == ["<recipe>", str(yml), str(yml), str(js), None]


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        (LINEAR.replace("1.0", "0.7"), "out = 0.7*x0 + 0.3*x1\nx0 = models/a\nx1 = models/b"),
        (
            LINEAR.replace("1.0", "-1.0") + "parameters: {normalize: false}\n",
            "out = -x0 + 0.3*x1\nx0 = models/a\nx1 = models/b",
        ),
        (LINEAR.replace("1.0", "0"), "out = x1\nx0 = models/a (weight 0: not read)\nx1 = models/b"),
        (TASK, "out = x0 + 0.6*(x1 - x0) - 0.3*(x2 - x0)\nx0 = base\nx1 = ft1\nx2 = ft2"),
        (PASS, "out = x0\nx0 = a"),
    ],
)
def test_formula(text, formula):
    assert load_recipe(text).formula() == formula


# Anything at all.

KEYS = st.sampled_from(
    [
        *(
            "merge_method",
            "models",
            "model",
            "base_model",
            "parameters",
            "weight",
            "normalize",
            "lambda",
            "scale",
            "dtype",
        ),
        *("out_dtype", "rounding", "seed", "integers", "path", "revision", "slices", "filter", "value", "wieght"),
    ]
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates()
    | st.sampled_from(["linear", "task_arithmetic", "passthrough", "a", "b@c", "bf16", 10**400])
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)
NUMBERS = st.integers() | st.floats() | st.booleans() | LEAVES
VALUES = (
    NUMBERS
    | st.lists(NUMBERS, max_size=3)
    | st.lists(
        st.fixed_dictionaries({"value": NUMBERS}, optional={"filter": st.sampled_from(["mlp", "*", ""]) | LEAVES}),
        max_size=3,
    )
)
NEARLY = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["linear", "task_arithmetic", "passthrough"]),
        "models": st.lists(
            st.fixed_dictionaries(
                {"model": st.sampled_from("abcdef") | LEAVES},
                optional={"parameters": st.fixed_dictionaries({"weight": VALUES}) | TREES},
            ),
            max_size=4,
        ),
    },
    optional={
        "base_model": st.sampled_from("abz") | TREES,
        "parameters": st.dictionaries(st.sampled_from(["weight", "normalize", "lambda", "scale"]), VALUES, max_size=2),
        "seed": NUMBERS,
        "dtype": st.sampled_from(["bf16", "x"]) | LEAVES,
    },
)


PARTS = st.fixed_dictionaries(
    {
        "merge_method": st.sampled_from(["linear", "task_arithmetic", "passthrough"]),
        "slices": st.lists(
            st.fixed_dictionaries(
                {
                    "sources": st.lists(
                        st.fixed_dictionaries(
                            {
                                "model": st.sampled_from("abc"),
                                "layer_range": st.lists(st.integers(0, 4), min_size=2, max_size=2) | TREES,
                            },
                            optional={"parameters": st.dictionaries(st.sampled_from(["weight", "scale"]), LEAVES)},
                        ),
                        max_size=3,
                    )
                },
                optional={"base_model": LEAVES, "parameters": st.fixed_dictionaries({"weight": VALUES})},
            ),
            max_size=3,
        ),
    },
    optional={
        "base_model": st.sampled_from("abz"),
        "parameters": st.dictionaries(st.sampled_from(["weight", "normalize", "lambda", "scale"]), VALUES, max_size=2),
        "tokenizer": st.fixed_dictionaries(
            {}, optional={"source": LEAVES, "tokens": TREES, "pad_to_multiple_of": LEAVES}
        ),
        "tokenizer_source": st.sampled_from(["union", "base", "a"]) | TREES,
        "chat_template": LEAVES,
        "name": LEAVES,
        "modules": st.dictionaries(st.text(max_size=3), TREES, max_size=2),
    },
)


def loads_or_refuses(source: object) -> None:
    """Nothing but RecipeError comes out; what loads has finite coefficients and can be told to people. Gathering the
    errors finds some if and only if loading fails, and the one that loading fails with is among them.
    """
    refusal: str | None = None
    try:
        recipe = load_recipes(source)[-1]  # type: ignore[arg-type]
    except RecipeError as error:
        refusal = str(error)
    wrong = [str(error) for error in check_recipe(source).errors]  # type: ignore[arg-type]
    assert refusal in wrong if wrong else refusal is None
    if refusal is not None:
        assert len(refusal) < 10_000
        return
    assert recipe.formula().startswith("out = ")
    assert load_recipes(recipe.text + "\n")[-1].coefficients == recipe.coefficients
    if recipe.coefficients is not None:
        assert all(abs(w) <= 3.41e38 for w in recipe.combine("x").weights)
        assert recipe.combine("x").row().inputs


@settings(deadline=None, max_examples=150)
@given(NEARLY | PARTS | st.dictionaries(KEYS, TREES, max_size=5))
def test_any_mapping_loads_or_is_refused(value):
    loads_or_refuses(value)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["linear", "task_arithmetic"]),
    st.lists(st.floats(1e-3, 1e3) | st.integers(1, 9), min_size=1, max_size=12),
    st.booleans(),
)
def test_any_positive_weights_load(name, weights, normalize):
    """Every model keeps its place and its share, and the text stored for receipts says the same again."""
    models = [{"model": f"m{i}", "parameters": {"weight": w}} for i, w in enumerate(weights)]
    wish = {"merge_method": name, "models": models, "base_model": "base", "parameters": {"normalize": normalize}}
    recipe = load_recipe(wish)
    first = 1 if name == "task_arithmetic" else 0
    assert texts(recipe.models)[first:] == tuple(f"m{i}" for i in range(len(weights)))
    total = sum(weights) if normalize else 1.0
    assert recipe.combine("x").weights[first:] == pytest.approx([w / total for w in weights])
    loads_or_refuses(wish)


@settings(deadline=None, max_examples=100)
@given(NEARLY | PARTS | TREES, st.booleans())
def test_any_yaml_loads_or_is_refused(value, flow):
    loads_or_refuses(yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True) + "\n")


@settings(deadline=None, max_examples=200)
@given(st.text(alphabet=st.sampled_from(" \n\t-:?[]{},&*!|>'\"%@`#<=~.01aeb\u00e9\ud800\x00\ufeff"), max_size=30))
def test_any_text_loads_or_is_refused(text):
    loads_or_refuses(text + "\n")
    loads_or_refuses(LINEAR + text)


def test_two_names_of_one_model_are_equal():
    """By their text forms, whatever the form in which they were written; adapters and revisions count."""
    assert ModelRef.of("models/a") == ModelRef.of("./models//a/") == ModelRef("models/b/../a")
    assert len({ModelRef.of("a"), ModelRef.of("./a"), ModelRef("a/")}) == 1
    assert ModelRef.of("org/m@v1") == ModelRef("org/m", "v1") != ModelRef("org/m")
    assert ModelRef.of("a") != "a"
    for text in ("a", "a@", "@b", "a@b@c", "./a/", "with+plus"):
        assert str(ModelRef.of(text)) == text
    x, y = AdapterRef("x"), AdapterRef("org/y", "v2", 0.5)
    assert str(ModelRef("a", "v1", (x, y))) == "a@v1+x+org/y@v2:0.5"
    assert ModelRef.of("a@v1+x+org/y@v2:0.5") == ModelRef("./a", "v1", (AdapterRef("x/"), y))
    assert ModelRef.of("a+x") != ModelRef.of("a") and ModelRef.of("a+x") != ModelRef.of("a+x:2")
    assert ModelRef.of("a+x+y") != ModelRef.of("a+y+x")
    assert AdapterRef.of("x:1e-3") == AdapterRef("x", None, 0.001)
    assert AdapterRef.of("C:/x:y") == AdapterRef("C:/x:y")


def test_what_is_there_under_the_whole_name_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    assert ModelRef.of("a+b") == ModelRef("a+b") and not ModelRef.of("a+b").adapters
    assert ModelRef.of("a+c").adapters == (AdapterRef("c"),)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("org/m@v1", ModelRef("org/m", "v1")),
        ("{model: org/m@v1}", ModelRef("org/m", "v1")),
        ("{model: {path: org/m, revision: v1}}", ModelRef("org/m", "v1")),
        ("{model: {path: 'a+b@c'}}", ModelRef("a+b@c")),
        ("a+b", ModelRef("a", None, (AdapterRef("b"),))),
        ("a+b@v+c:2", ModelRef("a", None, (AdapterRef("b", "v"), AdapterRef("c", None, 2.0)))),
        ("{model: a, lora: b}", ModelRef("a", None, (AdapterRef("b"),))),
        ("{model: a, lora: b, scale: -0.5}", ModelRef("a", None, (AdapterRef("b", None, -0.5),))),
        (
            "{model: a, lora: ['b:1', 'c:2', d], scale: 3}",
            ModelRef("a", None, (AdapterRef("b"), AdapterRef("c", None, 2.0), AdapterRef("d", None, 3.0))),
        ),
        ("{model: a, lora: {path: b, revision: v}}", ModelRef("a", None, (AdapterRef("b", "v"),))),
        (
            "{model: {path: a, revision: w}, lora: [{path: 'b:1', scale: 2}, c@v], scale: 3}",
            ModelRef("a", "w", (AdapterRef("b:1", None, 2.0), AdapterRef("c", "v", 3.0))),
        ),
    ],
)
def test_a_model_is_parsed_once(written, expected):
    recipe = load_recipe(f"merge_method: passthrough\nmodels: [{{model: {written}}}]\n")
    (model,) = recipe.models
    assert (model.path, model.revision, model.adapters) == (expected.path, expected.revision, expected.adapters)
    assert recipe.sections[0].groups[0].sources[0].ref is recipe.origin
