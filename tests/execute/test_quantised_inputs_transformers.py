"""What transformers makes of quantised models when it loads them as numbers is what is merged; it loads the outputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastinterp
from fastinterp.ops.dtypes import BF16
from tests.support.checkpoints import Tensor, integers, recipe, tensor, write_file
from tests.support.encodings import said, scaled

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 40, "head_dim": 8, "tie_word_embeddings": False,
}  # fmt: skip


def loaded(folder: Path, name: str, **more: Any) -> Mapping[str, Any]:
    """The state of the model of this class; no key is missing, none unexpected."""
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **more)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state: Mapping[str, Any] = model.state_dict()
    return state


def save(folder: Path, config: Any, name: str, stored: Mapping[str, Tensor], method: Mapping[str, Any]) -> str:
    folder.mkdir()
    write_file(folder / "model.safetensors", stored)
    table = {**config.to_dict(), "architectures": [name], "dtype": "bfloat16", **method}
    (folder / "config.json").write_text(json.dumps(table))
    return str(folder)


def assert_loads_as(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, x in one.items():
        assert torch.equal(x.float(), other[name].float()), name


def alone(path: str, out: Path) -> Path:
    fastinterp.merge(recipe("passthrough", [path]), out)
    return out


def dense(config: Any, name: str, seed: int) -> dict[str, np.ndarray]:
    torch.manual_seed(seed)
    return {n: x.float().numpy() for n, x in getattr(transformers, name)(config).state_dict().items()}


FP8 = {
    "blocks": (scaled(blocks=(16, 16), end="weight_scale_inv"), said("fp8", weight_block_size=[16, 16])),
    "blocks, exponents": (
        scaled(blocks=(16, 16), scale="F8_E8M0", end="weight_scale_inv"),
        said("fp8", weight_block_size=[16, 16], scale_fmt="ue8m0"),
    ),
    "one scale": (scaled(end="weight_scale_inv", shape=lambda _: (1, 1)), said("fp8", weight_block_size=None)),
}  # fmt: skip


@pytest.mark.parametrize(("encode", "method"), FP8.values(), ids=FP8)
def test_fine_grained_fp8(tmp_path: Path, encode: Any, method: Mapping[str, Any]) -> None:
    """Llama as DeepSeek and Qwen store theirs. The bytes are those that transformers de-quantises."""
    config, name = transformers.LlamaConfig(**SIZES), "LlamaForCausalLM"
    paths = []
    for seed in range(2):
        stored: dict[str, Tensor] = {}
        for key, x in dense(config, name, seed).items():
            if key.endswith("_proj.weight"):
                one = encode(x.astype(np.float64))
                stored |= {key.removesuffix("weight") + end: t for end, t in one.tensors.items()}
                stored[key.removesuffix("weight") + "activation_scale"] = tensor(1.0, BF16, ())
            else:
                stored[key] = tensor(x, BF16)
        paths.append(save(tmp_path / str(seed), config, name, stored, method))
    numbers = transformers.FineGrainedFP8Config(dequantize=True)
    wanted = loaded(Path(paths[0]), name, quantization_config=numbers, dtype=torch.bfloat16)
    assert_loads_as(loaded(alone(paths[0], tmp_path / "alone"), name), wanted)
    config_out = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert "quantization_config" not in config_out and config_out["dtype"] == "bfloat16"
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5]), tmp_path / "out")
    loaded(tmp_path / "out", name)


def test_mxfp4(tmp_path: Path) -> None:
    """gpt-oss: blocks and scales of experts, whose numbers transformers has transposed."""
    config = transformers.GptOssConfig(**SIZES | {"intermediate_size": 32}, num_local_experts=2, num_experts_per_tok=1)
    name, rng = "GptOssForCausalLM", np.random.default_rng(0)
    paths = []
    for seed in range(2):
        stored: dict[str, Tensor] = {}
        for key, x in dense(config, name, seed).items():
            if key.endswith(("gate_up_proj", "down_proj")):
                experts, inputs, outputs = x.shape  # transformers has the last two dimensions of the file swapped
                stored[f"{key}_blocks"] = integers(rng.integers(0, 256, (experts, outputs, inputs // 32, 16)), "U8")
                stored[f"{key}_scales"] = integers(rng.integers(118, 122, (experts, outputs, inputs // 32)), "U8")
            else:
                stored[key] = tensor(x, BF16)
        paths.append(save(tmp_path / str(seed), config, name, stored, said("mxfp4", modules_to_not_convert=[])))
    numbers = transformers.Mxfp4Config(dequantize=True)
    wanted = [loaded(Path(path), name, quantization_config=numbers, dtype=torch.bfloat16) for path in paths]
    assert_loads_as(loaded(alone(paths[0], tmp_path / "alone"), name), wanted[0])
    fastinterp.merge(recipe("linear", paths, weights=[0.5, 0.5], dtype="float32"), tmp_path / "out")
    got = loaded(tmp_path / "out", name, dtype=torch.float32)
    for key, x in got.items():  # the mean of two numbers of few bits is exact
        if key.endswith(("gate_up_proj", "down_proj")):
            assert torch.equal(x, (wanted[0][key].float() + wanted[1][key].float()) / 2), key


def test_scales_of_activations_are_not_unexpected(tmp_path: Path) -> None:
    """As ModelOpt writes them: no tensor is left in the output that transformers would not know."""
    config, name = transformers.LlamaConfig(**SIZES), "LlamaForCausalLM"
    stored: dict[str, Tensor] = {}
    for key, x in dense(config, name, 0).items():
        if not key.endswith("_proj.weight"):
            stored[key] = tensor(x, BF16)
            continue
        prefix = key.removesuffix("weight")
        stored |= {prefix + end: t for end, t in scaled(shape=lambda _: ())(x.astype(np.float64)).tensors.items()}
        stored[f"{prefix}input_scale"] = tensor(1.0, BF16, ())
        if key.endswith(("k_proj.weight", "v_proj.weight")):
            stored[f"{prefix}{prefix[-7]}_scale"] = tensor(1.0, BF16, ())
    assert "model.layers.0.self_attn.v_proj.v_scale" in stored
    path = save(tmp_path / "a", config, name, stored, said("modelopt", quant_algo="FP8", kv_cache_scheme="FP8"))
    (tmp_path / "a" / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    loaded(alone(path, tmp_path / "out"), name)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
