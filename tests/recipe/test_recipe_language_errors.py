"""Every way of getting slices, modules, filters, gradients and tokenizers wrong, with the message it earns."""

from __future__ import annotations

import pytest

from fastinterp.errors import RecipeError
from fastinterp.recipe.load import load_recipe
from tests.support.stand_ins import stand_ins  # noqa: F401  a fixture

PAIR = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: b}]\n"
SLICES = """\
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [4, 8]}
    parameters: {weight: 1}
"""
MODULES = """\
merge_method: linear
modules:
  text: {models: [{model: a}], parameters: {weight: 1}}
  vision:
    slices:
      - {sources: [{model: a, layer_range: [0, 4], parameters: {weight: 1}}]}
"""


def w(value: str) -> str:
    return f"merge_method: linear\nmodels:\n  - {{model: a, parameters: {{weight: 1}}}}\n  - model: b\n    parameters:\n      weight: {value}\n"  # noqa: E501


AT = "$.models[1].parameters.weight"
BAD = {
    "models and slices": (
        SLICES + "models: [{model: a}]\n",
        "`models` and `slices` exclude each other: give one of `models`, `slices`, `modules` - at $ (merge.yml:2)",
    ),
    "nothing to merge": (
        "merge_method: linear\n",
        "the key `models` is missing (or `slices`, or `modules`) - at $ (merge.yml:1)",
    ),
    "no slices": (
        "merge_method: linear\nslices: []\n",
        "`slices` lists no slice. Write `- sources: [{model: NAME, layer_range: [0, 16]}]` for each"
        " - at $.slices (merge.yml:2)",
    ),
    "no sources": (
        "merge_method: linear\nslices: [{sources: []}]\n",
        "`sources` lists no model. Write `- {model: NAME, layer_range: [0, 16]}` for each"
        " - at $.slices[0].sources (merge.yml:2)",
    ),
    "no layer_range": (
        SLICES.replace(", layer_range: [4, 8]", ""),
        "the key `layer_range` is missing - at $.slices[0].sources[1] (merge.yml:5)",
    ),
    "a layer_range of words": (
        SLICES.replace("[4, 8]", "[4, all]"),
        "expected a whole number, got text. Write `layer_range: [first, end]`, as [0, 16]: two whole numbers, and end "
        "is not in it - at $.slices[0].sources[1].layer_range[1] (merge.yml:5)",
    ),
    "a layer_range of text": (
        SLICES.replace("[4, 8]", "4-8"),
        "expected a list, got text. Write `layer_range: [first, end]`, as [0, 16]: two whole numbers, and end is not "
        "in it - at $.slices[0].sources[1].layer_range (merge.yml:5)",
    ),
    "a layer_range of three": (
        SLICES.replace("[4, 8]", "[4, 8, 2]"),
        "`layer_range` is [first, end], got [4, 8, 2] - at $.slices[0].sources[1].layer_range (merge.yml:5)",
    ),
    "a negative layer_range": (
        SLICES.replace("[4, 8]", "[-4, -1]"),
        "`layer_range` counts from the first layer, 0; got [-4, -1]. Negative numbers have no meaning"
        " - at $.slices[0].sources[1].layer_range (merge.yml:5)",
    ),
    "a layer_range that ends before it begins": (
        SLICES.replace("[4, 8]", "[8, 4]"),
        "`layer_range` [first, end) ends before it begins, got [8, 4]"
        " - at $.slices[0].sources[1].layer_range (merge.yml:5)",
    ),
    "unequal lengths": (
        SLICES.replace("[4, 8]", "[4, 9]"),
        "the sources of a slice must have the same number of layers: 5 here, 4 in $.slices[0].sources[0]"
        " - at $.slices[0].sources[1].layer_range (merge.yml:5)",
    ),
    "a model twice in a slice": (
        SLICES.replace("model: b", "model: a"),
        "'a' is already listed as $.slices[0].sources[0]. mergekit would drop one of them. Give it to another slice"
        " - at $.slices[0].sources[1] (merge.yml:5)",
    ),
    "residual_weight of a recipe": (
        w("1") + "residual_weight: 1\n",
        "`residual_weight` is a key of a slice, where it has no effect, in mergekit neither. Leave it out"
        " - at $ (merge.yml:7)",
    ),
    "a parameter as a key of a source": (
        SLICES.replace("[4, 8]}", "[4, 8], weight: 2}"),
        "unknown key `weight`: what a method takes goes under `parameters` - at $.slices[0].sources[1] (merge.yml:5)",
    ),
    "sources that are names": (
        "merge_method: linear\nslices: [{sources: [a]}]\n",
        "expected a mapping, got text. Write `- {model: NAME, layer_range: [0, 16]}`"
        " - at $.slices[0].sources[0] (merge.yml:2)",
    ),
    "a base of a slice that has none": (
        SLICES + "    base_model: a\n",
        "`base_model` of a slice is never used here: `linear` has no base. Remove it - at $.slices[0] (merge.yml:7)",
    ),
    "the layers of a base": (
        SLICES.replace("linear", "ties\nbase_model: c"),
        "it is not clear which layers of the base, 'c', belong here. List it among the sources, with its `layer_range`"
        " - at $.slices[0] (merge.yml:4)",
    ),
    "slices without a base": (
        SLICES.replace("linear", "ties"),
        "`ties` needs the key `base_model`: the model that the others were made from, or one of them"
        " - at $ (merge.yml:1)",
    ),
    "no modules": (
        "merge_method: linear\nmodules: {}\n",
        "`modules` names no module. Write `NAME: {models: [{model: NAME}]}` for each - at $.modules (merge.yml:2)",
    ),
    "a module without models": (
        MODULES.replace("models: [{model: a}], ", ""),
        "a module needs one of `models` and `slices` - at $.modules.text (merge.yml:3)",
    ),
    "a key of a module": (
        MODULES.replace("{models: [{model: a}], ", "{model: [{model: a}], "),
        "unknown key `model`, did you mean `models`? - at $.modules.text (merge.yml:3)",
    ),
    "a source in a module": (
        MODULES.replace("{model: a, layer", "{modle: a, layer"),
        "unknown key `modle`, did you mean `model`? - at $.modules.vision.slices[0].sources[0] (merge.yml:6)",
    ),
    # values
    "an empty list": (w("[]"), f"`weight` has an empty list - at {AT} (merge.yml:6)"),
    "numbers and filters": (
        w("[{filter: mlp, value: 1}, 0.5]"),
        "numbers and filters do not mix in one list: expected `{filter: ..., value: ...}`, got 0.5"
        f" - at {AT}[1] (merge.yml:6)",
    ),
    "a filter of another name": (
        w("[{fliter: mlp, value: 1}]"),
        f"unknown key `fliter`, did you mean `filter`? - at {AT}[0] (merge.yml:6)",
    ),
    "a filter without a value": (w("{filter: mlp}"), f"the key `value` is missing - at {AT} (merge.yml:6)"),
    "a filter that is a number": (
        w("[{filter: 1, value: 1}]"),
        f"`filter` must be text, a part of tensor names, got 1 - at {AT}[0].filter (merge.yml:6)",
    ),
    "a filter behind one that matches all": (
        w("\n        - value: 1\n        - {filter: mlp, value: 1}"),
        f"what follows is never used: {AT}[0] matches every tensor. Put it last - at {AT}[1] (merge.yml:8)",
    ),
    "text in a gradient": (
        w("\n        - 0.5\n        - high"),
        f"`weight` must be a finite number (at most 3.4e38), got 'high' - at {AT}[1] (merge.yml:8)",
    ),
    "a list in a gradient": (
        w("[[1, 2], 3]"),
        f"`weight` must be a finite number (at most 3.4e38), got [1, 2] - at {AT}[0] (merge.yml:6)",
    ),
    "out of range in a gradient": (
        "merge_method: sce\nbase_model: a\nmodels: [{model: b}]\nparameters:\n  select_topk:\n"
        "    - {filter: mlp, value: [0, 1.1]}\n    - value: 0\n",
        "`select_topk` must be in 0..1, got 1.1 - at $.parameters.select_topk[0].value[1] (merge.yml:6)",
    ),
    "a gradient of truth values": (
        w("1") + "parameters: {normalize: [0, 1]}\n",
        "`normalize` cannot have a gradient (a list of numbers): there is nothing between its values. Give one value,"
        " or filters (`filter`, `value`) - at $.parameters.normalize (merge.yml:7)",
    ),
    "nothing in a gradient": (
        "merge_method: passthrough\nmodels: [{model: a}]\nparameters: {scale: [1, null]}\n",
        "a gradient consists of numbers, got nothing - at $.parameters.scale[1] (merge.yml:3)",
    ),
    "a word out of its list": (
        PAIR.replace("linear", "words").replace("weight: 1", "fisher: f, preset: papr"),
        "`preset` must be one of paper, mergekit, got 'papr' - at $.parameters.preset (merge.yml:2)",
    ),
    "a side-car that is no model": (
        PAIR.replace("linear", "words").replace("weight: 1", "fisher: a+"),
        "the name of an adapter, behind `+`, must not be empty: 'a+'. If it belongs to the path, write"
        " `{model: {path: ...}}` for the name - at $.parameters.fisher (merge.yml:2)",
    ),
    # tokenizer
    "two tokenizers": (
        PAIR + "tokenizer: {}\ntokenizer_source: union\n",
        "`tokenizer` and `tokenizer_source` exclude each other. Write `tokenizer: {source: ...}` - at $ (merge.yml:5)",
    ),
    "a tokenizer of nothing": (
        PAIR + "tokenizer: {source: basis}\n",
        "expected union, base, a model that is merged, or base_model, got 'basis', did you mean `base`?"
        " - at $.tokenizer.source (merge.yml:4)",
    ),
    "a stranger's tokenizer": (
        PAIR + "tokenizer_source: c\n",
        "expected union, base, a model that is merged, or base_model, got 'c' - at $.tokenizer_source (merge.yml:4)",
    ),
    "a misspelled union": (
        PAIR + "tokenizer_source: unionx\n",
        "expected union, base, a model that is merged, or base_model, got 'unionx', did you mean `union`?"
        " - at $.tokenizer_source (merge.yml:4)",
    ),
    "a stranger's token": (
        PAIR + "tokenizer:\n  tokens:\n    <s.x>:\n      source: c\n",
        "expected a model that is merged, or base_model, got 'c' - at $.tokenizer.tokens.<s.x>.source (merge.yml:7)",
    ),
    "no multiple": (
        PAIR + "tokenizer: {pad_to_multiple_of: 0}\n",
        "`pad_to_multiple_of` must be in 1..2**20, got 0 - at $.tokenizer.pad_to_multiple_of (merge.yml:4)",
    ),
    "a key of a token": (
        PAIR + "tokenizer: {tokens: {x: {sorce: a}}}\n",
        "unknown key `sorce`, did you mean `source`? - at $.tokenizer.tokens.x (merge.yml:4)",
    ),
    "a kind of token": (
        PAIR + "tokenizer: {tokens: {x: {source: {kind: zeros}}}}\n",
        "unknown kind 'zeros', did you mean `zero`? - at $.tokenizer.tokens.x.source.kind (merge.yml:4)",
    ),
    "a token and an id": (
        PAIR + "tokenizer: {tokens: {x: {source: {kind: model_token, model: a, token: y, token_id: 3}}}}\n",
        "a model_token needs one of `token` and `token_id` - at $.tokenizer.tokens.x.source (merge.yml:4)",
    ),
    "force without a source": (
        PAIR + "tokenizer: {tokens: {x: {force: true}}}\n",
        "`force` does nothing without a `source`. Name one, or remove it - at $.tokenizer.tokens.x (merge.yml:4)",
    ),
    "a chat template": (
        PAIR + "chat_template: chatmll\n",
        "`chat_template` must be a name, or a Jinja template (20 characters or more, with a `{`), got `chatmll`,"
        " did you mean `chatml`? - at $.chat_template (merge.yml:4)",
    ),
}  # fmt: skip


NEVER_USED = {
    "residual_weight of a slice": (
        SLICES + "    residual_weight: 1\n",
        "`residual_weight` has no effect, in mergekit neither - at $.slices[0] (merge.yml:7)",
    ),
    "of a source that is copied": (
        "merge_method: slerp\nbase_model: b\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 4], parameters: {weight: 1}}]\n",
        "`slerp` has no parameter `weight`: it is ignored - at $.slices[0].sources[0].parameters (merge.yml:4)",
    ),
    "where all is copied": (
        "merge_method: slerp\nbase_model: b\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n"
        "parameters: {t: 0.5}\n",
        "`t` is never used here: one model alone is copied - at $.parameters (merge.yml:4)",
    ),
    "that slices hide": (
        SLICES + "parameters: {weight: 2}\n",
        "`weight` is never used here: a value nearer to the models always goes before it, or nothing below it takes it"
        " - at $.parameters (merge.yml:7)",
    ),
}


@pytest.mark.parametrize(("text", "message"), NEVER_USED.values(), ids=NEVER_USED)
def test_parameters_that_are_never_used_are_warned_of(text, message):
    assert [str(warning) for warning in load_recipe(text, file="merge.yml").warnings] == [message]


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_bad_recipe(text, message):
    with pytest.raises(RecipeError) as error:
        load_recipe(text, file="merge.yml")
    assert str(error.value) == message


def test_options_of_mergekit():
    """Keys that are options there: the error names the key or option here, or says that none is needed."""
    from click.testing import CliRunner

    from fastinterp.cli import commands
    from fastinterp.cli.merge import merge
    from fastinterp.recipe.mergekit_options import _OPTIONS, instead_of_key, instead_of_option

    def said(key: str) -> str:
        with pytest.raises(RecipeError) as error:
            load_recipe(f"merge_method: linear\nmodels: [{{model: a}}]\nparameters: {{weight: 1}}\n{key}: 1\n")
        return str(error.value)

    assert "unknown key `random_seed`: the key is `seed` here - at $" in said("random_seed")
    assert "unknown key `embed_slerp`: embeddings are merged by the method of the recipe" in said("embed_slerp")
    assert "unknown key `lazy_unpickle`: it is not needed: tensors are always read in pieces" in said("lazy_unpickle")
    assert "`out_shard_size`: it is an option of the command here: `--max-shard-size`" in said("out_shard_size")
    with pytest.raises(RecipeError, match="unknown parameter `embed_slerp` of `linear`: embeddings are merged by"):
        load_recipe("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1, embed_slerp: true}\n")
    known = {name for parameter in merge.params for name in parameter.opts}
    for key, (option, why) in _OPTIONS.items():
        assert (option.split(" ")[0] in known) if option else why, key
        assert instead_of_key(key) and instead_of_option(f"--{key.replace('_', '-')}")
    for option, instead in {
        "--cuda": "Use --device cuda.", "--out-shard-size": "Use --max-shard-size, in bytes: 5GB.",
        "--copy-tokenizer": "Omit it: the tokenizer is always copied.",
        "--no-copy-tokenizer": "Omit it: the tokenizer is always copied.", "--random-seed": "Use --seed.",
    }.items():  # fmt: skip
        result = CliRunner().invoke(commands, ["merge", "a", "b", option])
        assert result.exit_code == 2 and f"No such option: {option}. {instead}" in result.output
    assert instead_of_key("wieght") == instead_of_option("--thraeds") == instead_of_option("-v") == ""
