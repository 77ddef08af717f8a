"""Every way of getting a recipe wrong, with the message it earns."""

from __future__ import annotations

import re

import pytest
import yaml

from fastinterp.errors import MethodError, RecipeError
from fastinterp.methods import method
from fastinterp.ops.combine import Combine
from fastinterp.ops.dtypes import DTYPE_NAMES
from fastinterp.recipe import document
from fastinterp.recipe.build import Builder
from fastinterp.recipe.check import check_recipe
from fastinterp.recipe.document import ErrorCollector
from fastinterp.recipe.load import load_recipe, load_recipes
from fastinterp.recipe.parameters import Resolver
from fastinterp.recipe.schema import raw_recipe
from tests.support.recipes import LINEAR, PASS, TASK
from tests.support.references import texts

AT_W0 = "$.models[0].parameters.weight (merge.yml:5)"
NUMBER = "`weight` must be a finite number (at most 3.4e38), got"
DIGITS = "1" * 57 + "..."


def w0(value: str) -> str:
    return LINEAR.replace("1.0", value)


BAD = {
    "one for the merge": (
        LINEAR.replace("weight: 0.3", "normalize: true"),
        "`normalize` is one value for the whole merge. Write it in $.parameters - at $.models[1].parameters"
        " (merge.yml:8)",
    ),
    # keys
    "unknown key": (LINEAR + "dtyp: f\n", "unknown key `dtyp`, did you mean `dtype`? - at $ (merge.yml:9)"),
    "unknown key in a model": (
        LINEAR.replace("    parameters:\n      weight: 0.3", "    wieght: 0.3"),
        "unknown key `wieght`, did you mean `weight`? It goes under `parameters` - at $.models[1] (merge.yml:7)",
    ),
    "parameter as a key": (
        LINEAR.replace("    parameters:\n      weight: 0.3", "    weight: 0.3"),
        "unknown key `weight`: what a method takes goes under `parameters` - at $.models[1] (merge.yml:7)",
    ),
    "parameter at the top": (
        LINEAR + "normalize: true\n",
        "unknown key `normalize`: what a method takes goes under `parameters` - at $ (merge.yml:9)",
    ),
    "unknown key far from all": (
        LINEAR + "base_model: {zzz: 1}\n",
        "unknown key `zzz`. Known: model, lora, scale, override_architecture - at $.base_model (merge.yml:9)",
    ),
    "unknown parameter": (
        LINEAR.replace("weight: 0.3", "wieght: 0.3"),
        "unknown parameter `wieght` of `linear`, did you mean `weight`? - at $.models[1].parameters (merge.yml:8)",
    ),
    "key twice": (
        LINEAR + "dtype: bf16\nmerge_method: linear\n",
        "the key `merge_method` is given twice, first in line 1 - at $ (merge.yml:10)",
    ),
    "key is a number": (LINEAR + "1: 2\n", "a key must be text, got `1`. Put it in quotes - at $ (merge.yml:9)"),
    "key is a list": (LINEAR + "? [a]\n: 1\n", "a key must be plain text - at $ (merge.yml:9)"),
    "no method": ("models:\n  - model: a\n", "the key `merge_method` is missing - at $ (merge.yml:1)"),
    "no model in an entry": (
        "merge_method: linear\nmodels:\n  - parameters: {weight: 1}\n",
        "the key `model` is missing - at $.models[0] (merge.yml:3)",
    ),
    # what is not done
    "documents": (
        LINEAR + "---\n" + LINEAR,
        "several documents (`---`) in one recipe are not supported yet - at $ (merge.yml:9)",
    ),
    # adapters
    "no adapter": (
        LINEAR.replace("models/b", "b+"),
        "the name of an adapter, behind `+`, must not be empty: 'b+'. If it belongs to the path, write"
        " `{model: {path: ...}}` for the name - at $.models[1].model (merge.yml:6)",
    ),
    "two revisions of an adapter": (
        LINEAR.replace("models/b", "b+c@d@e"),
        "'b+c@d@e' has more than one `@`. If it belongs to the path, write `{model: {path: ...}}` for the name"
        " - at $.models[1].model (merge.yml:6)",
    ),
    "lora beside the model": (
        LINEAR.replace("models/b", "models/b\n    lora: c"),
        "`lora` is a key of a model's long form: `model: {model: NAME, lora: ADAPTER}`, or `model: NAME+ADAPTER`"
        " - at $.models[1] (merge.yml:7)",
    ),
    "no adapters": (
        LINEAR.replace("models/b", "{model: b, lora: []}"),
        "`lora` is an empty list. Leave it out - at $.models[1].model.lora (merge.yml:6)",
    ),
    "several adapters in one name": (
        LINEAR.replace("models/b", "{model: b, lora: c+d}"),
        "'c+d' is one adapter. Write several as a list, without `+` - at $.models[1].model.lora (merge.yml:6)",
    ),
    "an adapter that is a number": (
        LINEAR.replace("models/b", "{model: b, lora: [c, 1]}"),
        "an adapter is a name, or `{path: NAME, revision: ..., scale: ...}` - at $.models[1].model.lora[1]"
        " (merge.yml:6)",
    ),
    "a misspelt key of an adapter": (
        LINEAR.replace("models/b", "{model: b, lora: {path: c, scael: 1}}"),
        "unknown key `scael`, did you mean `scale`? - at $.models[1].model.lora (merge.yml:6)",
    ),
    "a scale that is a word": (
        LINEAR.replace("models/b", "{model: b, lora: {path: c, scale: half}}"),
        "`scale` must be a number, got 'half' - at $.models[1].model.lora.scale (merge.yml:6)",
    ),
    "an infinite scale": (
        LINEAR.replace("models/b", "{model: b, lora: c, scale: .inf}"),
        "`scale` must be a finite number, got inf - at $.models[1].model.lora (merge.yml:6)",
    ),
    "a scale of nothing": (
        LINEAR.replace("models/b", "{model: b, scale: 0.5}"),
        "`scale` is that of a `lora`, and there is none - at $.models[1].model.scale (merge.yml:6)",
    ),
    # types and values
    "not a mapping": (
        "- a\n- b\n",
        "expected a mapping, got a list. A recipe starts with `merge_method: ...` - at $ (merge.yml:1)",
    ),
    "models are names": (
        "merge_method: linear\nmodels: [a, b]\n",
        "expected a mapping, got text. Write `- model: NAME` - at $.models[0] (merge.yml:2)",
    ),
    "models is a mapping": (
        "merge_method: linear\nmodels: {a: 1}\n",
        "expected a list, got a mapping - at $.models (merge.yml:2)",
    ),
    "model is a number": (
        LINEAR.replace("models/b", "3"),
        "expected text or a mapping, got a whole number - at $.models[1].model (merge.yml:6)",
    ),
    "text for a number": (w0("high"), f"{NUMBER} 'high' - at {AT_W0}"),
    "yes for a number": (
        w0("yes"),
        f"`weight` must be a number, got true (YAML reads yes and on as true) - at {AT_W0}",
    ),
    "a decimal comma": (w0("0,5"), f"{NUMBER} '0,5'. A decimal comma? Write 0.5 - at {AT_W0}"),
    "a decimal comma in braces": (
        PASS.replace("model: a", "model: a, parameters: {scale: 0,5}"),
        "a key must be text, got `5`. A decimal comma? Write a point: 0.5 - at $.models[0].parameters (merge.yml:2)",
    ),
    "nan": (w0(".nan"), f"{NUMBER} nan - at {AT_W0}"),
    "inf": (w0("-.inf"), f"{NUMBER} -inf - at {AT_W0}"),
    "too large": (w0("3.5e+38"), f"{NUMBER} 3.5e+38 - at {AT_W0}"),
    "nothing": (w0(""), f"{NUMBER} nothing - at {AT_W0}"),
    "an integer of 5000 digits": (w0("1" * 5000), f"`{DIGITS}` is no valid int - at {AT_W0}"),
    "not a truth value": (
        LINEAR + "parameters: {normalize: 2}\n",
        "`normalize` must be true or false, got 2 - at $.parameters.normalize (merge.yml:9)",
    ),
    "dtype": (
        LINEAR + "dtype: bfloat61\n",
        "unknown dtype `bfloat61`, did you mean `bfloat16`? - at $.dtype (merge.yml:9)",
    ),
    "dtype that never merges": (
        LINEAR + "out_dtype: int64\n",
        f"unknown dtype `int64`. Known: {', '.join(DTYPE_NAMES)} - at $.out_dtype (merge.yml:9)",
    ),
    "rounding": (
        LINEAR + "rounding: up\n",
        "`rounding` must be nearest or stochastic, got 'up' - at $.rounding (merge.yml:9)",
    ),
    "fp8_overflow": (
        LINEAR + "fp8_overflow: clip\n",
        "`fp8_overflow` must be saturate or nonfinite, got 'clip' - at $.fp8_overflow (merge.yml:9)",
    ),
    "negative seed": (LINEAR + "seed: -1\n", "`seed` must be in 0..2**64-1, got -1 - at $.seed (merge.yml:9)"),
    "seed with a point": (LINEAR + "seed: 1.5\n", "expected a whole number, got a number - at $.seed (merge.yml:9)"),
    "integers of a stranger": (
        LINEAR + "integers: c\n",
        "`integers` must name a model that is merged, got 'c' - at $.integers (merge.yml:9)",
    ),
    # models
    "no models": (
        "merge_method: linear\nmodels: []\n",
        "`models` lists no model. Write `- model: NAME` for each - at $.models (merge.yml:2)",
    ),
    "listed twice": (
        LINEAR.replace("models/b", "./models/a/"),
        "'./models/a/' is already listed as $.models[0]. List a model once, with the weights added up"
        " - at $.models[1] (merge.yml:6)",
    ),
    "empty name": (
        LINEAR.replace("models/b", "''"),
        "the name of a model must not be empty - at $.models[1].model (merge.yml:6)",
    ),
    "empty path": (
        LINEAR.replace("models/b", "{model: {path: ''}}"),
        "`path` and `revision` must not be empty - at $.models[1].model.model (merge.yml:6)",
    ),
    "two revisions": (
        LINEAR.replace("models/b", "b@c@d"),
        "'b@c@d' has more than one `@`. If it belongs to the path, write `{model: {path: ...}}` for the name"
        " - at $.models[1].model (merge.yml:6)",
    ),
    # YAML itself
    "broken": ("merge_method: [linear\n", "not valid YAML: did not find expected ',' or ']' - at merge.yml:2"),
    "empty": ("# nothing\n", "the recipe is empty - at merge.yml"),
    "a date": (
        LINEAR + "name: 2024-01-01\n",
        "`2024-01-01` is read as `timestamp` here; put it in quotes if it is text - at $.name (merge.yml:9)",
    ),
    "a Python object": (
        LINEAR + "x: !!python/object:os.system {}\n",
        "the YAML tag `tag:yaml.org,2002:python/object:os.system` has no meaning in a recipe - at $.x (merge.yml:9)",
    ),
    "an anchor inside itself": (
        LINEAR + "x: &a [*a]\n",
        "`*a` names nothing that is complete above it - at $.x[0] (merge.yml:9)",
    ),
    "a merge key of a number": (LINEAR + "<<: 3\n", "`<<` takes mappings, got 3 - at $ (merge.yml:9)"),
    "brackets": ("[" * 100_000 + "\n", "nested deeper than 32 levels - at $ (merge.yml:1)"),
    "dashes": ("- " * 100_000 + "\n", "nested deeper than 32 levels - at $ (merge.yml:1)"),
    "an alias bomb": (
        "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)),
        "more than 100000 values (aliases expanded), so hardly a recipe - at $.a4[7] (merge.yml:5)",
    ),
    "megabytes": ("#" * (1 << 20) + "\n", "larger than 1048576 bytes, so hardly a recipe - at merge.yml"),
}

BAD_FOR_THE_METHOD = {
    "unknown method": (
        LINEAR.replace("linear", "liner"),
        "unknown merge method `liner`, did you mean `linear`? - at $.merge_method (merge.yml:1)",
    ),
    "an unknown method, with keys of its own": (
        "slices: []\nmerge_method: slarp\nparameters: {t: 0.5}\n",
        "unknown merge method `slarp`, did you mean `slerp`? - at $.merge_method (merge.yml:2)",
    ),
    "no base": (
        TASK.replace("base_model: base\n", ""),
        "`task_arithmetic` needs the key `base_model`: the model that the others were made from, or one of them"
        " - at $ (merge.yml:1)",
    ),
    "too many": (
        PASS.replace("{model: a}", "{model: a}, {model: b}"),
        "`passthrough` takes exactly 1 model, got 2. For more: `linear`, or `slices` - at $.models (merge.yml:2)",
    ),
    "too few": (
        "merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: a}]\n",
        "`task_arithmetic` takes 2 to 64 models, the base included, got 1 - at $.models (merge.yml:3)",
    ),
    "no weight": (
        LINEAR.replace("    parameters:\n      weight: 0.3\n", ""),
        "`linear` needs the parameter `weight`, and 'models/b' has none - at $.models[1] (merge.yml:6)",
    ),
    "weights that cancel": (
        w0("-0.3"),
        "the weights -0.3, 0.3 sum to 0, which is too near 0 to divide by. Change them, or write `normalize: false` to"
        " use them as they are - at $.models (merge.yml:2)",
    ),
    "a product beyond float32": (
        TASK.replace("0.6", "1.0e+30") + "parameters: {lambda: -1.0e+30}\n",
        "the parameters make a coefficient of 1e+60, beyond float32's 3.4e38 - at $.models (merge.yml:3)",
    ),
}

NEVER_USED = {
    "base": (
        TASK.replace("- model: base", "- {model: base, parameters: {weight: 1}}"),
        "`weight` is never used here: 'base' is the base of the merge - at $.models[0].parameters (merge.yml:4)",
    ),
    "every model has its own": (
        LINEAR + "parameters:\n  weight: 1\n",
        "`weight` is never used here: every model has its own - at $.parameters (merge.yml:10)",
    ),
    "of another method": (
        LINEAR + "parameters:\n  int8_mask: true\n",
        "`linear` has no parameter `int8_mask`: it is ignored - at $.parameters (merge.yml:10)",
    ),
}


@pytest.mark.parametrize(("text", "message"), NEVER_USED.values(), ids=NEVER_USED)
def test_parameters_that_are_never_used_are_warned_of(text, message):
    (warning,) = load_recipe(text, file="merge.yml").warnings
    assert str(warning) == message
    assert message in [str(warning) for warning in check_recipe(text, file="merge.yml").warnings]


@pytest.mark.parametrize(("text", "weight"), [("1e-3", 1e-3), ("'0.25'", 0.25), ("'-1E+2'", -100.0), ("'1'", 1.0)])
def test_numbers_that_yaml_reads_as_text(text, weight):
    parameters = load_recipe(w0(text)).parameters
    assert parameters is not None and parameters["weight"][0] == weight


@pytest.mark.parametrize(("text", "value"), [("'true'", True), ("'False'", False), ('"no"', False), ("1", True)])
def test_truth_values_in_quotes(text, value):
    parameters = load_recipe(LINEAR + f"parameters: {{normalize: {text}}}\n").parameters
    assert parameters is not None and parameters["normalize"] is value


def test_gradients_of_numbers_in_quotes():
    recipe = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {t: ['0', 1e-1]}\n"
    assert load_recipe(recipe).groups[0].levels[0]["t"].cases == ((None, (0.0, 0.1)),)


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_recipe(text, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(text, file="merge.yml")
    assert str(error.value) == message
    assert error.value.file == "merge.yml"


@pytest.mark.parametrize(("text", "message"), BAD_FOR_THE_METHOD.values(), ids=BAD_FOR_THE_METHOD)
def test_recipe_that_does_not_suit_its_method(text, message):
    with pytest.raises(MethodError) as error:
        load_recipe(text, file="merge.yml")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"merge_method": "linear",}', "not valid JSON: .* - at .*merge.json:1$"),
        ('{"models": [], "models": []}', "the key `models` is given twice - at .*merge.json$"),
        ("[" * 100_000, "nested deeper than 32 levels"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON: .*digits"),
        ('{"a": "\\ud800"}', r"is not valid Unicode text - at \$.a \(.*merge.json\)$"),
        ('{"merge_method": "linear", "models": 3}', r"expected a list, got a whole number - at \$.models \(.*json\)$"),
    ],
)
def test_bad_json(tmp_path, text, message):
    (tmp_path / "merge.json").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "merge.json")


def test_bad_mapping():
    """A mapping has no lines and no file: the path alone says where."""
    known = "expected text, a number, a truth value, a list or a mapping"
    unweighted = {"merge_method": "linear", "models": [{"model": "a"}]}
    for value, message in [
        ({1: 2}, "a key must be text, got 1 - at $"),
        ({"models": [object]}, f"{known}, got <class 'object'> - at $.models[0]"),
        ({"seed": 10**5000}, f"{known}, got a number of thousands of digits - at $.seed"),
        (unweighted, "`linear` needs the parameter `weight`, and 'a' has none - at $.models[0]"),
    ]:
        with pytest.raises(RecipeError) as error:
            load_recipe(value)  # type: ignore[arg-type]
        assert str(error.value) == message
    circle: dict[str, object] = {}
    circle["a"] = circle
    with pytest.raises(RecipeError, match="nested deeper than 32 levels"):
        load_recipe(circle)


def test_sources_that_are_no_recipe(tmp_path):
    (tmp_path / "latin.yml").write_bytes(b"a: \xff\n")
    (tmp_path / "control.yml").write_bytes(b"a: \x01\n")
    (tmp_path / "large.yml").write_bytes(b" " * (1 << 20) + b"\n")
    for source, message in [
        (tmp_path / "none.yml", "there is no such recipe file - at .*none.yml$"),
        ("none.yml", "there is no such recipe file - at none.yml$"),
        (tmp_path, "this is a folder; a recipe is a .yml, .yaml or .json file"),
        ("a\0b", "cannot read the recipe: embedded null byte"),
        (tmp_path / "latin.yml", r"the file is not UTF-8 text \(byte 3\)"),
        (tmp_path / "control.yml", "not valid YAML: .*control characters"),
        (tmp_path / "large.yml", "larger than 1048576 bytes"),
        (3, "a recipe is a path, YAML text or a mapping, got int"),
    ]:
        with pytest.raises(RecipeError, match=message):
            load_recipe(source)


def test_without_libyaml(monkeypatch):
    """PyYAML's own parser gives the same values, lines and limits."""
    monkeypatch.setattr(document, "_LOADER", yaml.SafeLoader)
    assert load_recipe(LINEAR).combine("x") == load_recipe(yaml.safe_load(LINEAR)).combine("x")
    for name in ("unknown parameter", "key twice", "brackets", "an alias bomb", "documents"):
        test_bad_recipe(*BAD[name])


def test_relative_paths_start_at_the_current_folder(tmp_path, monkeypatch):
    """A model that is only found beside the recipe is an error that says so; nothing is guessed."""
    (tmp_path / "there" / "models" / "a").mkdir(parents=True)
    (tmp_path / "there" / "merge.yml").write_text(LINEAR)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        load_recipe("there/merge.yml")
    assert str(error.value) == (
        "there is no 'models/a' in the current folder, where relative paths start, but there is one beside the recipe."
        " Write 'there/models/a', or run in 'there' - at $.models[0].model (there/merge.yml:3)"
    )
    monkeypatch.chdir(tmp_path / "there")
    assert texts(load_recipe("merge.yml").models) == ("models/a", "models/b")


def test_the_first_error_is_that_of_what_is_read_first():
    """Keys inside `models` and `tokenizer` are looked at when these are read: after base_model and parameters."""
    text = """\
merge_method: ties
tokenizer: {tokens: {<a>: {sorce: a}}}
models: [{model: a, wieght: 1}, {modle: b}]
parameters: {weight: 1, densty: 0.5}
base_model: base@1@2
"""
    repairs = {
        "'base@1@2' has more than one `@`": ("@1@2", ""),
        "unknown parameter `densty`": ("densty", "density"),
        "unknown key `wieght`": (", wieght: 1", ""),
        "unknown key `modle`": ("modle", "model"),
        "unknown key `sorce`": ("sorce", "source"),
    }
    for message, (wrong, right) in repairs.items():
        with pytest.raises(RecipeError, match=f"^{re.escape(message)}"):
            load_recipe(text)
        text = text.replace(wrong, right)
    load_recipe(text)


def test_a_required_parameter_for_the_whole_merge():
    """As slerp's t would be: one value, at the top level, no default."""

    @method(base="none", models=(1, 2))
    def walk(n: int, *, t: float) -> Combine:
        return Combine((1.0 - t, t))

    def given_by(text: str) -> object:
        read = document.read("merge_method: linear\nmodels: [{model: a}, {model: b}]\n" + text, "merge.yml")
        raw = raw_recipe(read)
        assert raw is not None
        (section,) = Builder(read, raw, walk, (), ErrorCollector()).sections()
        return Resolver(read, walk, section.groups[0]).parameters("", ("", ""), None)

    assert given_by("parameters: {t: 0.25}\n") == {"t": 0.25}
    with pytest.raises(MethodError) as error:
        given_by("")
    assert str(error.value) == "`walk` needs the parameter `t`. Write it in $.parameters - at $ (merge.yml:1)"


DELLA = """\
merge_method: della
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
parameters:
  density: 0.9
"""
OUTSIDE = "gives probabilities from 0.75 to 1.05, and they must lie between 0 and 1. Use an `epsilon` below 0.1"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        (DELLA + "  epsilon: 0.15\n", "$.parameters.epsilon (merge.yml:8)"),
        (DELLA, "$.parameters.density (merge.yml:7)"),
        (DELLA.replace("weight: 1}", "weight: 1, epsilon: 0.15}", 1), "$.models[0].parameters.epsilon (merge.yml:4)"),
        (DELLA.replace("weight: 1}", "weight: 1, epsilon: 0.15}"), "$.models (merge.yml:3)"),
    ],
    ids=["given", "default", "of one model", "of several"],
)
def test_what_a_method_that_asks_refuses_is_told_with_its_line(text, where):
    """By load_recipe, without a tensor: the value that the message names last, where there is only one of it."""
    with pytest.raises(MethodError) as caught:
        load_recipe(text, file="merge.yml")
    assert str(caught.value) == f"`density` 0.9 with `epsilon` 0.15 {OUTSIDE} - at {where}"


def test_weights_that_cancel_in_a_method_that_asks_are_told_with_their_line():
    with pytest.raises(MethodError, match=r"sum to 0, .* - at \$\.models \(merge\.yml:3\)$"):
        load_recipe(DELLA.replace("weight: 1", "weight: -1", 1).replace("0.9", "1"), file="merge.yml")


EMPTY = {
    "models": "`models` lists no model. Write `- model: NAME` for each",
    "slices": "`slices` lists no slice. Write `- sources: [{model: NAME, layer_range: [0, 16]}]` for each",
    "modules": "`modules` names no module. Write `NAME: {models: [{model: NAME}]}` for each",
}


@pytest.mark.parametrize("key", EMPTY)
@pytest.mark.parametrize("value", ["", "null", "~", "[]"])
@pytest.mark.parametrize("method_name", ["linear", "passthrough", "slerp", "ties"])
@pytest.mark.parametrize("base", ["", "base_model: base\n"], ids=["alone", "base"])
def test_a_key_that_is_left_empty(key, value, method_name, base):
    """An error with its line, for every method, with a base and without, from load_recipes and from the check."""
    text = f"merge_method: {method_name}\n{base}{key}: {'{}' if (key, value) == ('modules', '[]') else value}\n"
    line = text.count("\n")
    with pytest.raises(RecipeError) as error:
        load_recipes(text, file="merge.yml")
    assert str(error.value) == f"{EMPTY[key]} - at $.{key} (merge.yml:{line})"
    (wrong,) = check_recipe(text, file="merge.yml").errors
    assert str(wrong) == str(error.value)


def test_an_empty_key_beside_one_that_is_given():
    """As if it were not there."""
    (section,) = load_recipe("merge_method: passthrough\nslices:\nmodels: [{model: a}]\nmodules: ~\n").sections
    assert [str(source.ref) for group in section.groups for source in group.sources] == ["a"]
