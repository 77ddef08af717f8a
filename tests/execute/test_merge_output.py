"""What lies in the output beside the weights, and that others load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import fastinterp
from fastinterp.ops.combine import NUMERICS, Combine
from fastinterp.ops.dtypes import BF16, DTYPES, F16
from fastinterp.output.receipt import RECEIPT
from tests.support.checkpoints import assert_same, expected, family, read, receipt, recipe, saved, weights
from tests.support.written import tree


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_safe_open_loads_the_output(tmp_path, shard):
    """The safetensors library itself, with torch, sees the same names, shapes, dtypes and bytes."""
    import torch

    models = family(2)
    paths = saved(tmp_path, models)
    report = fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out", max_shard_size=shard)
    want = expected(models, Combine((0.5, 0.5), sums_to_one=True))
    seen = set()
    for file in report.files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata()["format"] == "pt"
            for name in opened.keys():  # noqa: SIM118 - safe_open cannot be iterated
                x = opened.get_tensor(name)
                assert tuple(x.shape) == want[name].shape
                raw = x.contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else np.empty(0, np.uint8)
                assert np.array_equal(raw, want[name].raw)
                seen.add(name)
    assert seen == set(want)


def test_receipt_and_model_card(tmp_path):
    """Every file says how it was made, and the README for people."""
    models = family(2)
    paths = saved(tmp_path, models)
    text = (
        f"# mine\nmerge_method: linear\nmodels:\n- model: {paths[0]}\n- model: {paths[1]}\nparameters: {{weight: 2}}\n"
    )
    (tmp_path / "recipe.yml").write_text(text)
    names, shown = [Path(path).name for path in paths], text.replace(f"{tmp_path}/", "")
    fastinterp.merge(tmp_path / "recipe.yml", tmp_path / "out", rounding="stochastic", seed=3, max_shard_size="20KB")
    assert receipt(tmp_path / "out") == {
        "fastinterp": fastinterp.__version__,
        "numerics": NUMERICS,
        "method": "linear",
        "models": names,
        "coefficients": {"weights": [0.5, 0.5], "base": None, "sums_to_one": True},
        "dtype": None,
        "rounding": "stochastic",
        "seed": 3,
        "fp8_overflow": "saturate",
        "recipe": shown,
        "max_shard_size": 20_000,
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert shown.strip() in card and names[0] in card and fastinterp.__version__ in card
    assert not any(str(tmp_path).encode() in content for content in tree(tmp_path / "out").values())


OVERRIDES = {"dtype": "bf16", "rounding": "stochastic", "seed": 7}


@pytest.mark.parametrize("keys", [{}, {"dtype": "float16"}, {"dtype": "float16", "out_dtype": "float8_e5m2"}], ids=str)
@pytest.mark.parametrize("options", [{}, OVERRIDES], ids=["as-it-is", "overridden"])
def test_replaying_the_receipt_gives_the_same_bytes(tmp_path, options, keys, monkeypatch):
    """By the engine from the recipe in it, and by the reference from nothing but its fields."""
    models = family(2, mixed=True)
    paths = saved(tmp_path, models)
    fastinterp.merge(recipe("linear", paths, weights=[0.1, 0.7], **keys), tmp_path / "out", **options)
    found = receipt(tmp_path / "out")
    again = {name: found[name] for name in ("dtype", "rounding", "seed")}
    monkeypatch.chdir(tmp_path)  # the receipt names models without the folders of this machine
    fastinterp.merge(found["recipe"], tmp_path / "again", **again)
    assert tree(tmp_path / "out") == tree(tmp_path / "again")
    asked = Combine(tuple(found["coefficients"].pop("weights")), **found["coefficients"])
    how = {name: found[name] for name in ("rounding", "seed", "fp8_overflow")}
    got = read(tmp_path / "out")
    want: dict[str, Any] = {}
    for name, tensor in got.items():  # without a dtype, in the one that holds those of both models
        dtype = tensor.dtype if found["dtype"] is None else DTYPES[found["dtype"]]
        want |= expected([{name: m[name]} for m in models], asked, out=dtype if tensor.dtype.merges else None, **how)
    assert_same(want, got)


def test_sidecars_come_along_and_the_config_names_the_dtype(tmp_path):
    models = family(2)
    paths = saved(tmp_path, models)
    small = {"config.json": '{"torch_dtype": "bfloat16"}', "tokenizer.json": "{}", "generation_config.json": "{}"}
    for name, text in small.items():
        (Path(paths[0]) / name).write_text(text)
    (Path(paths[1]) / "vocab.json").write_text("{}")  # of the second model: stays behind
    fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "kept")
    fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "f32", dtype="float32")
    assert sorted(tree(tmp_path / "kept")) == sorted([*small, "README.md", RECEIPT, "model.safetensors"])
    assert json.loads((tmp_path / "kept" / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    assert json.loads((tmp_path / "f32" / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_the_config_names_the_dtype_that_holds_all(tmp_path):
    models = [{"x": weights(i, dtype, (99,))} for i, dtype in enumerate((BF16, F16))]
    paths = saved(tmp_path, models)
    (Path(paths[0]) / "config.json").write_text('{"torch_dtype": "bfloat16"}')
    report = fastinterp.merge(recipe("linear", paths, weights=[1, 1]), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}
    note = (
        "1 tensor of dtypes BF16, F16, which differ between the models: stored as F32, which holds all. Another one: "
        "`dtype` in the recipe, or --dtype"
    )
    how = recipe("linear", paths, weights=[1, 1])
    assert note in report.remarks
    for text in (str(fastinterp.explain(how)), str(fastinterp.check(how))):
        assert note in " ".join(text.split())
    assert note not in fastinterp.merge(how, tmp_path / "asked", dtype="bfloat16").remarks


def tiny_llama(folder: Path, seed: int, tokenizer: bool) -> Path:
    """A Llama in several shards, its weights multiples of 2^-10 that bf16 holds, so that means of two are exact."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randint(-128, 129, p.shape) / 1024)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="15KB")
    if tokenizer:
        vocab = {f"t{i}": i for i in range(96)}
        table = {
            "version": "1.0",
            "added_tokens": [],
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
        }
        (folder / "tokenizer.json").write_text(json.dumps(table))
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (folder / "special_tokens_map.json").write_text('{"unk_token": "t0"}')
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # transformers' own
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_transformers_loads_the_output(tmp_path, dtype):
    """Its logits are those of a model that was averaged in float64: the same bits, since both means are exact.

    Each mean is (j + k) / 2048 with |j|, |k| <= 128: exact in float32, and in bf16 both sides round the same number.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    a, b = (tiny_llama(tmp_path / name, seed, name == "a") for seed, name in enumerate("ab"))
    assert len(list(a.glob("*.safetensors"))) > 2
    how = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 1}}
    fastinterp.merge(how, tmp_path / "out", dtype=dtype, max_shard_size="40KB")
    stored = torch.float32 if dtype else torch.bfloat16
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert merged.dtype == stored

    mean, other = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64).state_dict() for p in (a, b))
    with torch.no_grad():
        tokens = torch.arange(24).reshape(2, 12)
        merged.to(torch.float32)
        got = merged(tokens).logits
        # Into the same tensors: the same arithmetic on the same addresses.
        merged.load_state_dict({n: ((p + other[n]) / 2).to(stored) for n, p in mean.items()})
        want = merged(tokens).logits
    assert want.std() > 0.01
    assert torch.equal(want, got)

    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= names
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 96
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
