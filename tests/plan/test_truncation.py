"""`truncate_embeddings: true`: the bytes are those of models whose embeddings were cut by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import fastinterp
from fastinterp.errors import CheckpointError, ShapeError
from fastinterp.ops.dtypes import BF16, F32, DType
from fastinterp.reference.decode import decode
from tests.support import tokens
from tests.support.checkpoints import Tensor, assert_same, bell, read, recipe, tensor, weights, write
from tests.support.quantised_models import FORMS, stored

EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"


def phi(folder: Path, seed: int, rows: int, **keys: Any) -> str:
    """A tiny Phi, whose output layer has a bias."""
    torch.manual_seed(seed)
    config = transformers.PhiConfig(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, **keys
    )
    transformers.PhiForCausalLM(config).save_pretrained(folder)
    return str(folder)


def cut(folder: str, into: Path, rows: int) -> str:
    """The same model with the first rows of its embeddings."""
    found = read(Path(folder))
    for name in (EMBED, HEAD, BIAS):
        if name in found:
            nbytes = found[name].raw.size // found[name].shape[0] * rows
            found[name] = Tensor(found[name].dtype, (rows, *found[name].shape[1:]), found[name].raw[:nbytes])
    write(into, found)
    config = json.loads(Path(folder, "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    return str(into)


def merged(out: Path, method: str, models: list[str], **keys: Any) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    report = fastinterp.merge(recipe(method, models, **keys), out)
    return read(out), report.warnings


@pytest.mark.parametrize(
    ("method", "keys"),
    [
        ("linear", {"parameters": {"weight": 1}}),
        ("slerp", {"parameters": {"t": 0.3}}),
        ("ties", {"parameters": {"density": 0.5, "weight": 1}}),
        ("dare_ties", {"parameters": {"density": 0.5, "weight": 1}, "seed": 3}),
    ],
    ids=str,
)
@pytest.mark.parametrize("base", [10, 8])
def test_the_bytes_of_models_cut_by_hand(tmp_path, method, keys, base):
    rows = [base, 18 - base, *([12] if method != "slerp" else [])]
    models = [phi(tmp_path / f"m{i}", i, n) for i, n in enumerate(rows)]
    short = [cut(model, tmp_path / f"s{i}", 8) for i, model in enumerate(models)]
    of_base = (lambda m: {"base_model": m[0]}) if method != "linear" else lambda m: {}
    got, warnings = merged(tmp_path / "got", method, models, **keys, **of_base(models), truncate_embeddings=True)
    want, _ = merged(tmp_path / "want", method, short, **keys, **of_base(short))
    assert_same(want, got)
    (warning,) = [w for w in warnings if "truncate_embeddings" in w]
    assert f"{EMBED} to 8 ({base} in {models[0]}, {18 - base} in {models[1]}" in warning
    assert f"{BIAS} to 8" in warning
    assert not [w for w in warnings if "vocab_size" in w]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "got", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.vocab_size == 8 and model(torch.tensor([[1, 7]])).logits.shape[-1] == 8


def test_the_remedy_of_the_refusal(tmp_path):
    """Written as the message says, with a tokenizer and without one."""
    models = [phi(tmp_path / "a", 0, 8), phi(tmp_path / "b", 1, 10)]
    asked = recipe("linear", models, parameters={"weight": 1})
    for _ in range(2):
        with pytest.raises(ShapeError, match="`truncate_embeddings: true` in the recipe cuts to the fewest rows"):
            fastinterp.merge(asked, tmp_path / "out")
        assert fastinterp.check({**asked, "truncate_embeddings": True}).errors == ()
        for model in models:
            tokens.words(Path(model), ["<unk>", "cat"])


def test_what_needs_no_cut_is_left_alone(tmp_path):
    models = [phi(tmp_path / "a", 0, 8), phi(tmp_path / "b", 1, 8)]
    want, _ = merged(tmp_path / "want", "linear", models, parameters={"weight": 1})
    got, warnings = merged(tmp_path / "got", "linear", models, parameters={"weight": 1}, truncate_embeddings=True)
    assert_same(want, got)
    assert warnings == ()
    assert Path(tmp_path, "got", "config.json").read_bytes() == Path(tmp_path, "want", "config.json").read_bytes()


def test_tied_embeddings_are_cut_once(tmp_path):
    models = [phi(tmp_path / "a", 0, 9, tie_word_embeddings=True), phi(tmp_path / "b", 1, 8, tie_word_embeddings=True)]
    merged(tmp_path / "out", "linear", models, parameters={"weight": 1}, truncate_embeddings=True)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.get_input_embeddings().weight.shape[0] == 8


def test_each_tensor_is_cut_by_itself(tmp_path):
    """An output layer may have fewer rows than the input embedding, as in mergekit."""

    def model(name: str, rows: int, head: int, dtype: DType) -> str:
        found = {EMBED: weights(rows, dtype, (rows, 4)), HEAD: weights(head + 9, dtype, (head, 4))}
        return str(write(tmp_path / name, {**found, "norm.weight": weights(3, dtype, (4,))}))

    models = [model("a", 10, 10, BF16), model("b", 8, 7, F32)]
    got, _ = merged(tmp_path / "out", "linear", models, weights=[1.0, 1.0], truncate_embeddings=True)
    assert got[EMBED].shape == (8, 4) and got[HEAD].shape == (7, 4) and got["norm.weight"].shape == (4,)
    assert got[EMBED].dtype == F32


def test_what_the_tokenizer_and_configuration_name_beyond_the_rows(tmp_path):
    a, b = phi(tmp_path / "a", 0, 10, eos_token_id=9), phi(tmp_path / "b", 1, 8)
    tokens.words(Path(a), [f"w{i}" for i in range(10)])
    Path(a, "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 8]}))
    out = tmp_path / "out"
    _, warnings = merged(out, "linear", [a, b], parameters={"weight": 1}, truncate_embeddings=True)
    said = "\n".join(warnings)
    assert f"the tokenizer of {a} has 2 tokens without a row in the output, `w8`, `w9`" in said
    assert f"config.json of {a} names tokens without a row in the output: eos_token_id: 9" in said
    assert "generation_config.json of" in said and "eos_token_id: [2, 8]" in said
    assert (out / "tokenizer.json").read_bytes() == Path(a, "tokenizer.json").read_bytes()


def test_a_vocabulary_in_the_recipe_comes_first(tmp_path):
    a, b = phi(tmp_path / "a", 0, 10), phi(tmp_path / "b", 1, 8)
    for model, count in ((a, 10), (b, 8)):
        tokens.words(Path(model), [f"w{i}" for i in range(count)])
    keys = {"parameters": {"weight": 1}, "tokenizer_source": "base"}
    want, _ = merged(tmp_path / "want", "linear", [a, b], **keys)
    got, warnings = merged(tmp_path / "got", "linear", [a, b], **keys, truncate_embeddings=True)
    assert_same(want, got)
    assert got[EMBED].shape[0] == 10
    assert any("`truncate_embeddings` does nothing beside `tokenizer_source`" in w for w in warnings)


def test_rows_of_other_lengths_are_refused(tmp_path):
    a = write(tmp_path / "a", {EMBED: weights(0, BF16, (10, 4))})
    b = write(tmp_path / "b", {EMBED: weights(1, BF16, (8, 6))})
    with pytest.raises(ShapeError, match="the rows are of different lengths"):
        fastinterp.merge(recipe("linear", [str(a), str(b)], weights=[1.0, 1.0], truncate_embeddings=True), "out")


def test_a_tensor_of_a_document_above(tmp_path):
    """It is not stored as rows; the remedy is followed."""
    models = [phi(tmp_path / name, i, rows) for i, (name, rows) in enumerate((("a", 10), ("b", 10), ("c", 8)))]
    above = recipe("ties", models[:2], base_model=models[0], parameters={"weight": 1}, name="mix")
    last = recipe("linear", ["mix", models[2]], weights=[1.0, 1.0], truncate_embeddings=True)
    with pytest.raises(
        CheckpointError, match=r"a document above makes it\. Write that model as a checkpoint of its own first"
    ):
        fastinterp.merge([above, last], tmp_path / "out")
    above.pop("name")
    fastinterp.merge(above, tmp_path / "mix")
    last["models"][0]["model"] = str(tmp_path / "mix")
    fastinterp.merge(last, tmp_path / "out")
    assert read(tmp_path / "out")[EMBED].shape[0] == 8


def test_the_receipt_says_it(tmp_path):
    models = [phi(tmp_path / "a", 0, 8), phi(tmp_path / "b", 1, 10)]
    merged(tmp_path / "out", "linear", models, parameters={"weight": 1}, truncate_embeddings=True)
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "np") as file:
        (receipt,) = [json.loads(text) for key, text in file.metadata().items() if key == "fastinterp"]
    assert receipt["truncate_embeddings"] is True


def test_one_wrong_word_is_named(tmp_path):
    a = str(write(tmp_path / "a", {EMBED: tensor([[1.0]], F32)}))
    with pytest.raises(fastinterp.RecipeError, match="the key is `truncate_embeddings` here"):
        fastinterp.merge(recipe("linear", [a, a], weights=[1.0, 1.0], unsafe_truncate_embeddings=True), "out")


@pytest.mark.parametrize("kind", ["blocks", "rows", "tensor", "mxfp8"])
def test_codes_are_cut_with_their_scales(tmp_path, kind):
    form = FORMS[kind]

    def model(name: str, seed: int, rows: int, kept: int) -> str:
        shape = (rows, 64)
        made = stored(form, EMBED, bell(seed, rows * 64) * np.exp(bell(seed + 9, rows)).repeat(64), shape)
        scale = form.scale_name(EMBED)
        numbers = decode(form.decoder, made[EMBED].raw, [made[scale].raw], form.parameters(shape)[:4], rows * 64, 64)
        write(tmp_path / f"{name}-cut", {EMBED: Tensor(F32, (kept, 64), numbers[: kept * 64].view(np.uint8))})
        write(tmp_path / name, made)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", **form.config}))
        return str(tmp_path / name)

    models = [model("a", 0, 300, 200), model("b", 1, 200, 200)]
    got, _ = merged(tmp_path / "got", "linear", models, weights=[0.5, 0.5], truncate_embeddings=True)
    want, _ = merged(tmp_path / "want", "linear", [f"{m}-cut" for m in models], weights=[0.5, 0.5], dtype="bfloat16")
    assert_same(want, got)
