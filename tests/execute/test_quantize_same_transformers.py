"""`quantize: same` with the library that loads the output: transformers' fp8 with scales of blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastinterp

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow
BLOCK = 128


def quantised(weights: dict[str, Any]) -> dict[str, Any]:
    """With linear layers as codes and scales, by torch."""
    stored = {}
    for name, w in weights.items():
        stored[name] = w
        if name.endswith("_proj.weight"):
            rows, columns = w.shape
            blocks = w.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            stored[name] = (blocks / scales[:, None, :, None]).reshape(w.shape).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scales
    return stored


def numbers(stored: dict[str, Any]) -> dict[str, Any]:
    """What it stands for, in float64."""
    plain = {}
    for name, w in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None:
            scale = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        if not name.endswith("_scale_inv"):
            plain[name] = w.double() if scale is None else (w.float() * scale).double()
    return plain


def models(folder: Path) -> list[dict[str, Any]]:
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    said = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    text = {**config.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": said}
    every = []
    for name, size in (("a", 0.0), ("b", 0.01)):
        every.append(quantised({n: w + size * torch.randn_like(w) for n, w in base.items()}))
        (folder / name).mkdir()
        save_file(every[-1], folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(text))
    return every


def test_transformers_loads_the_output(tmp_path):
    """No key is missing or unexpected; every weight is within half a step of the codes of the float64 merge.

    A code is the nearest to y / scale: half the spacing of E4M3 there, 2^-4 of the power of two below it, at least
    2^-10, times the scale. The sum y, the division and the multiplication are float32: 2^-21 of the magnitudes.
    """
    import transformers

    a, b = map(numbers, models(tmp_path))
    fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.3, tmp_path / "out", quantize="same")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
    )  # fmt: skip
    assert not any(info.values()), info
    loaded = {n: w.double() for n, w in model.state_dict().items()}
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "out" / "model.safetensors")
    checked = 0
    for name, w in numbers(stored).items():
        assert torch.equal(loaded[name], w.double()), name
        if f"{name}_scale_inv" in stored:
            exact = 0.7 * a[name] + 0.3 * b[name]
            scale = stored[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1).double()
            codes = stored[name].double().abs()
            step = torch.exp2(torch.floor(torch.log2(codes.clamp(min=2.0**-6))) - 3) * scale
            assert ((w - exact).abs() <= step / 2 + (a[name].abs() + b[name].abs()) * 2.0**-21).all()
            checked += 1
    assert checked == 14


def test_fresh_scales_are_those_of_the_definition(tmp_path):
    """amax / 448 of the merged block, as DeepSeek's quantiser and torch compute it."""
    from safetensors.torch import load_file

    models(tmp_path)
    fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "float32", dtype="float32")
    fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out", quantize="same")
    sums, got = (load_file(tmp_path / f / "model.safetensors") for f in ("float32", "out"))
    want = quantised(sums)
    for name, w in got.items():
        if name.endswith(("_proj.weight", "_scale_inv")):
            assert torch.equal(w.view(torch.uint8), want[name].view(torch.uint8)), name
