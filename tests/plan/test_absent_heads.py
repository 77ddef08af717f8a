"""Outputs without a language-model head: a warning, where software would make one up; else nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from safetensors.torch import load_file, save_file

import fastinterp
from tests.plan.test_tensor_sets_loaded import HEAD, TEXT, saved

WITHOUT_BIAS = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}


def warnings(folder: Path, **keys: Any) -> list[str]:
    """Of the merge of a model with itself, about heads; `check` finds the same."""
    models = [{"model": str(folder), "parameters": {"weight": 1}}]
    recipe = {"merge_method": "linear", "models": models, **keys}
    found = [w for w in fastinterp.merge(recipe, folder.parent / "out", force=True).warnings if "head" in w]
    assert [w.message for w in fastinterp.check(recipe).warnings if "head" in w.message] == found
    return found


def without(name: str, folder: Path, **config: Any) -> Path:
    """The folder, with a tensor left out of its file, and other values in its config.json; None: none."""
    file = folder / "model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if n != name}, file, {"format": "pt"})
    table = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in table.items() if v is not None}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("says", [False, None])
def test_a_head_that_no_model_stores(tmp_path, says):
    """Untied, as config.json says, or as Llama is where that says nothing. What the warning advises is true."""
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=False))
    folder = without(HEAD, saved(tmp_path / "a", llama, 1), tie_word_embeddings=says)
    (warning,) = warnings(folder)
    assert f"no language-model head (lm_head): config.json of {folder} says LlamaForCausalLM" in warning
    _, info = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert info["missing_keys"] == {HEAD}
    assert warnings(without(HEAD, folder, tie_word_embeddings=True)) == []
    _, info = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]


MODELS: dict[str, Any] = {
    "tied by its class": lambda: tf.GemmaForCausalLM(tf.GemmaConfig(**TEXT, head_dim=8)),
    "GPT-2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1, n_positions=16)),
    "base model": lambda: tf.LlamaModel(tf.LlamaConfig(**TEXT)),
    "classifier": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**TEXT, num_labels=3)),
    "head of another name": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**WITHOUT_BIAS)),
    "encoder": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**WITHOUT_BIAS, tie_word_embeddings=False, cls_token_id=1, sep_token_id=2)
    ),
    "encoder and decoder": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False)
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_nothing_is_absent(tmp_path, make):
    assert warnings(without("", saved(tmp_path / "a", make(), 1))) == []


@pytest.mark.slow
def test_the_top_of_the_configuration_counts(tmp_path):
    """As for transformers: a model that is untied at its top, and whose language model would be tied alone."""
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    text = tf.Qwen3VLMoeTextConfig(**TEXT, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=12)
    model = tf.Qwen3VLMoeForConditionalGeneration(tf.Qwen3VLMoeConfig(text_config=text.to_dict(), vision_config=vision))
    folder = saved(tmp_path / "a", model, 1)
    config = json.loads((folder / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["text_config"].get("tie_word_embeddings")) == (False, True)
    assert warnings(folder) == []
    _, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
