"""Outputs with other layers than their inputs, and documents that build on others' vocabularies, in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fastinterp
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, F32
from tests.support import tokens
from tests.support.checkpoints import read, tensor, write
from tests.tokenizer.test_merge_tokenizer import assert_runs, llama


@pytest.fixture
def tall(tmp_path: Path) -> list[str]:
    """Two Llamas of four layers."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        folders.append(str(tmp_path / f"tall{seed}"))
        transformers.LlamaForCausalLM(config).save_pretrained(folders[-1])
    return folders


def slices(*ranges: tuple[str, int, int]) -> list[dict[str, Any]]:
    return [{"sources": [{"model": m, "layer_range": [first, end]}]} for m, first, end in ranges]


def generates(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 2, 3]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert made.shape == (1, 6) or made[0, -1] == 0


@pytest.mark.slow
def test_six_layers_of_four(tmp_path, tall):
    """config.json says so, and transformers loads all of them."""
    a, b = tall
    stack = {"merge_method": "passthrough", "slices": slices((a, 0, 3), (b, 1, 4))}
    fastinterp.merge(stack, tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.num_hidden_layers == 6
    assert {"num_hidden_layers": 4} | json.loads(Path(a, "config.json").read_text()) | {"num_hidden_layers": 6} == {
        **json.loads((tmp_path / "out" / "config.json").read_text())
    } | ({"layer_types": config.layer_types} if hasattr(config, "layer_types") else {})
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    generates(tmp_path / "out")
    made, theirs = read(tmp_path / "out"), read(Path(b))
    name = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(made[name.format(3)].raw, theirs[name.format(1)].raw)


def test_a_stack_of_a_merge(tmp_path, tall):
    """The configuration follows the layers of both documents: four, then three, then five."""
    a, _ = tall
    documents: list[dict[str, Any]] = [
        {"name": "mean", "merge_method": "linear", "models": [{"model": m} for m in tall], "parameters": {"weight": 1}},
        {"name": "cut", "merge_method": "passthrough", "slices": slices(("mean", 0, 2), (a, 3, 4))},
        {"merge_method": "passthrough", "slices": slices(("cut", 0, 3), ("cut", 1, 3))},
    ]
    fastinterp.merge(documents, tmp_path / "out")
    assert fastinterp.explain(documents).bytes_made == 0
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").num_hidden_layers == 5
    generates(tmp_path / "out")
    made, theirs = read(tmp_path / "out"), read(Path(a))
    name = "model.layers.{}.mlp.up_proj.weight"
    np.testing.assert_array_equal(made[name.format(4)].raw, theirs[name.format(3)].raw)


def test_a_configuration_that_counts_no_layers(tmp_path, tall):
    a = Path(tall[0])
    config = json.loads((a / "config.json").read_text())
    del config["num_hidden_layers"]
    config.pop("layer_types", None)
    (a / "config.json").write_text(json.dumps(config))
    report = fastinterp.merge({"merge_method": "passthrough", "slices": slices((str(a), 0, 3))}, tmp_path / "out")
    assert [w for w in report.warnings if "config.json does not say how many layers" in w]


def test_filters_without_a_match(tmp_path, tall):
    weight = [{"filter": "mpl", "value": 0.3}, {"filter": "layers.1.", "value": 0.2}, {"value": 1.0}]
    values = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": weight}} for m in tall]}
    report = fastinterp.merge(values, tmp_path / "out")
    found = [w for w in report.warnings if "the filter 'mpl' matches nothing: no tensor's name has it" in w]
    assert len(found) == 2, "one for each model"
    assert "matches nothing" in str(fastinterp.explain(values))


@pytest.fixture
def words(tmp_path) -> list[str]:
    base = tokens.words(tmp_path / "base", ["<unk>", "cat", "dog", "own0"])
    one = tokens.words(tmp_path / "one", ["<unk>", "own1", "cat", "dog", "pair"])
    return [str(llama(f, i, n)) for i, (f, n) in enumerate(((base, 4), (one, 5)))]


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_vocabulary_from_above(tmp_path, words, method):
    """A document's vocabulary is that of those that build on it, and further models with it can be merged."""
    base, one = words
    union = ["<unk>", "cat", "dog", "own0", "own1", "pair"]
    third = str(llama(tokens.words(tmp_path / "third", union), 3, 6))
    given: Any = {"weight": 1.0} if method == "linear" else {"t": 0.5}
    both = {"model": base}, {"model": one}
    first: dict[str, Any] = {"name": "both", "merge_method": method, "models": list(both), "parameters": given}
    first |= {"tokenizer_source": "union", "base_model": base}
    last: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "both", "models": [{"model": third}]}
    last |= {"parameters": {"weight": 0.5}, "tokenizer_source": "base"}
    fastinterp.merge([first, last], tmp_path / "out")
    assert_runs(tmp_path / "out", ["cat", "dog", "own0", "own1", "pair"])
    fastinterp.merge({k: v for k, v in first.items() if k != "name"} | {"dtype": "float32"}, tmp_path / "first")
    apart = json.loads(json.dumps(last).replace('"both"', json.dumps(str(tmp_path / "first"))))
    fastinterp.merge(apart, tmp_path / "apart")
    for name, t in read(tmp_path / "apart").items():
        np.testing.assert_allclose(
            t.raw.view(np.float32), read(tmp_path / "out")[name].raw.view(np.float32), atol=1e-8, err_msg=name
        )
    assert not list(Path(tmp_path).glob("fastinterp-*"))


def test_a_vocabulary_that_comes_too_late(tmp_path, words):
    base, one = words
    first = {"name": "first", "merge_method": "passthrough", "models": [{"model": base, "parameters": {"scale": 0.9}}]}
    last = {"merge_method": "linear", "models": [{"model": "first"}, {"model": one}], "parameters": {"weight": 1.0}}
    with pytest.raises(CheckpointError, match="rows of `first`, which a document above makes, would have to be moved"):
        fastinterp.merge([first, last | {"tokenizer_source": "union"}], tmp_path / "out")


def test_layers_that_the_origin_lacks_have_its_dtypes(tmp_path):
    """Those of its own layers, whatever their sources are stored in; else the merge says so."""
    low, high = tmp_path / "low", tmp_path / "high"
    name = "model.layers.{}.mlp.w.weight"
    weights = [np.full((2, 2), i / 8) for i in range(6)]
    norm = {"model.norm.weight": tensor(np.ones(2), F32)}
    write(low, {name.format(i): tensor(weights[i], F32) for i in range(3)} | norm)
    write(high, {name.format(i): tensor(weights[i], BF16) for i in range(6)} | norm)
    parts = slices((str(low), 0, 2), (str(high), 2, 6))
    report = fastinterp.merge({"merge_method": "passthrough", "slices": parts}, tmp_path / "out")
    made = read(tmp_path / "out")
    assert {str(made[name.format(i)].dtype) for i in range(6)} == {"F32"} and len(made) == 7
    assert report.warnings == ()
    write(high, {f"model.layers.{i}.mlp.{w}.weight": tensor(weights[i], BF16) for i in range(6) for w in "wv"} | norm)
    other = fastinterp.merge({"merge_method": "passthrough", "slices": parts}, tmp_path / "other")
    assert str(read(tmp_path / "other")[name.format(5)].dtype) == "F32"
    (told,) = [w for w in other.warnings if "dtype" in w]
    assert "has no tensor like model.layers.2.mlp.v.weight" in told and "--dtype" in told
