"""The commands that errors about quantised weights name are run as they are printed, and their outputs merge."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fastinterp
from fastinterp.cli import commands as fastinterp_commands
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, DTYPES, F8_E4M3, F32
from fastinterp.reference import combine as reference
from tests.support.checkpoints import (
    Tensor,
    assert_same,
    floats,
    integers,
    read,
    read_header,
    recipe,
    tensor,
    write_file,
)
from tests.support.quantised_formats import FORMATS, save_format

torch = pytest.importorskip("torch")


def commands(paths: list[str]) -> list[str]:
    """The commands in the error of a merge."""
    with pytest.raises(CheckpointError, match=r"(are|is) quantised") as caught:
        fastinterp.merge(recipe("linear", paths, weights=[1.0] * len(paths)), Path(paths[0]).parent / "none")
    return re.findall(r"`([^` ]+ [^`]*)`", str(caught.value))  # keys are quoted, too


def run(command: str, folder: Path) -> None:
    """In a shell in `folder`, as a user would."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": programs, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SCALES = {
    "of tensors, ComfyUI": ("scale_weight", ()),
    "of tensors": ("weight_scale", (1,)),
    "of tensors, TensorRT-LLM": ("weights_scaling_factor", (1,)),
    "of rows": ("weight_scale", (200, 1)),
    "of rows, a vector": ("weight_scale", (200,)),
    "of blocks": ("weight_scale_inv", (2, 3)),
    "of other blocks": ("scale", (4, 10)),
}


def spread(scale: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A scale for each element."""
    if scale.ndim == 0 or scale.size == 1:
        return np.full(shape, scale.ravel()[0])
    if scale.shape[0] == shape[0]:
        return np.broadcast_to(scale.reshape(-1, 1), shape)
    sizes = [128 if -(-n // 128) == k else n // k for n, k in zip(shape, scale.shape, strict=True)]
    return scale.repeat(sizes[0], 0)[: shape[0]].repeat(sizes[1], 1)[:, : shape[1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "shape", "codes"), [*((*of, "fp8") for of in SCALES.values()), ("weight_scale", (200, 1), "int8")],
    ids=[*SCALES, "int8"],
)  # fmt: skip
def test_products(tmp_path, end, shape, codes):
    """One file with scales: what the command writes is code * scale in bfloat16, and the other tensors."""
    rng = np.random.default_rng(0)
    paths, wanted = [], []
    for name in "ab":
        values = rng.integers(-100, 100, (200, 320))
        stored = tensor(values, F8_E4M3) if codes == "fp8" else integers(values, "I8")
        numbers = floats(stored).reshape(values.shape) if codes == "fp8" else values.astype(np.float64)
        scale = tensor(rng.uniform(0.01, 1.0, shape), F32, shape)
        model = {
            "blocks.0.weight": stored, f"blocks.0.{end}": scale, "blocks.0.scale_input": tensor(1.0, F32, ()),
            "scaled_fp8": Tensor(F8_E4M3, (0,), np.empty(0, np.uint8)),
            "blocks.0.bias": tensor(rng.normal(size=200), BF16),
        }  # fmt: skip
        paths.append(str(write_file(tmp_path / f"{name}.safetensors", model, metadata={"config": "{}"})))
        product = (numbers * spread(floats(scale).reshape(shape), values.shape)).astype(np.float32)
        wanted.append({"blocks.0.weight": tensor(product, BF16), "blocks.0.bias": model["blocks.0.bias"]})
    [command] = commands(paths)
    run(command, tmp_path)
    got = tmp_path / "got"
    got.mkdir()
    (tmp_path / "NEW.safetensors").rename(got / "model.safetensors")
    assert read_header(got / "model.safetensors")[0]["__metadata__"] == {"format": "pt", "config": "{}"}
    assert_same(read(got), wanted[0])


@pytest.mark.slow
def test_products_with_exponents(tmp_path):
    """mxfp8: a scale is 2 to the power of its code less 127, one for 32 numbers of a row."""
    rng = np.random.default_rng(0)
    for name in "ab":
        stored = tensor(rng.integers(-100, 100, (64, 96)), F8_E4M3)
        exponents = rng.integers(120, 134, (64, 3)).astype(np.uint8)
        scale = Tensor(DTYPES["F8_E8M0"], (64, 3), exponents)
        write_file(tmp_path / f"{name}.safetensors", {"wq.weight": stored, "wq.scale": scale})
    [command] = commands([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")])
    run(command.replace("a.safetensors", "b.safetensors"), tmp_path)
    (tmp_path / "got").mkdir()
    (tmp_path / "NEW.safetensors").rename(tmp_path / "got" / "model.safetensors")
    numbers = floats(stored).reshape(64, 96) * np.exp2(exponents.astype(np.float32) - 127).repeat(32, 1)
    assert_same(read(tmp_path / "got"), {"wq.weight": tensor(numbers, BF16)})


# --- transformers ----------------------------------------------------------------------------------------------------


def block_quantised(weight: np.ndarray, block: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """Codes, scales of blocks, and the numbers that they stand for."""
    rows, columns = weight.shape[0] // block, weight.shape[1] // block
    tiles = weight.reshape(rows, block, columns, block)
    scale = (np.abs(tiles).max((1, 3)) / 448).astype(np.float32)
    codes = tensor((tiles / scale[:, None, :, None]).reshape(weight.shape), F8_E4M3)
    numbers = floats(codes).reshape(tiles.shape) * scale[:, None, :, None]
    return codes, tensor(scale, F32), numbers.reshape(weight.shape).astype(np.float32)


def llama(folder: Path, seed: int) -> dict[str, np.ndarray]:
    """A tiny Llama with fp8 weights and scales of blocks, as DeepSeek and Qwen store them; returns its numbers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    stored: dict[str, Tensor] = {}
    numbers = {}
    for name, x in model.state_dict().items():
        value = x.numpy()
        if name.endswith("_proj.weight"):
            codes, scale, value = block_quantised(value, 16)
            stored |= {name: codes, f"{name}_scale_inv": scale}
        else:
            stored[name] = tensor(value, BF16)
            value = floats(stored[name]).reshape(value.shape)
        numbers[name] = value
    folder.mkdir()
    write_file(folder / "model.safetensors", stored)
    said = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}
    table = config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "quantization_config": said}
    (folder / "config.json").write_text(json.dumps(table))
    return numbers


def loaded(folder: Path, name: str):
    """The model of this class; no key is missing, none unexpected."""
    transformers = pytest.importorskip("transformers")
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.slow
def test_fine_grained_fp8_with_transformers(tmp_path):
    numbers = [llama(tmp_path / name, seed) for seed, name in enumerate("ab")]
    [command] = commands([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "import LlamaForCausalLM as M, FineGrainedFP8Config as Q" in command
    run(command, tmp_path)
    config = json.loads((tmp_path / "NEW" / "config.json").read_text())
    assert "quantization_config" not in config
    (tmp_path / "c").mkdir()  # the other one, by hand
    write_file(tmp_path / "c" / "model.safetensors", {name: tensor(x, BF16) for name, x in numbers[1].items()})
    models = [str(tmp_path / "NEW"), str(tmp_path / "c")]
    fastinterp.merge(recipe("linear", models, weights=[1.0, 1.0], dtype="float32"), tmp_path / "out")
    state = loaded(tmp_path / "out", "LlamaForCausalLM").state_dict()
    for name, first in numbers[0].items():
        a, b = (reference.widen(tensor(x[name], BF16).raw, BF16).reshape(first.shape) for x in numbers)
        assert np.allclose(state[name].float().numpy(), (a + b) / 2, rtol=1e-5, atol=1e-7), name


@pytest.mark.slow
def test_mxfp4_with_transformers(tmp_path):
    """gpt-oss: blocks and scales of experts; the same way."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, head_dim=8, num_local_experts=2, num_experts_per_tok=1, tie_word_embeddings=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        stored: dict[str, Tensor] = {}
        for key, x in transformers.GptOssForCausalLM(config).state_dict().items():
            if key.endswith(("gate_up_proj", "down_proj")):
                experts, inputs, outputs = x.shape  # transformers has the last two dimensions of the file swapped
                stored[f"{key}_blocks"] = integers(rng.integers(0, 256, (experts, outputs, inputs // 32, 16)), "U8")
                stored[f"{key}_scales"] = integers(rng.integers(118, 122, (experts, outputs, inputs // 32)), "U8")
            else:
                stored[key] = tensor(x.float().numpy(), BF16)
        (tmp_path / name).mkdir()
        write_file(tmp_path / name / "model.safetensors", stored)
        said = {"quant_method": "mxfp4", "modules_to_not_convert": []}
        table = config.to_dict() | {"architectures": ["GptOssForCausalLM"], "dtype": "bfloat16"}
        (tmp_path / name / "config.json").write_text(json.dumps(table | {"quantization_config": said}))
    [command] = commands([str(tmp_path / "a"), str(tmp_path / "b")])
    assert "import GptOssForCausalLM as M, Mxfp4Config as Q" in command
    run(command, tmp_path)
    numbers = loaded(tmp_path / "NEW", "GptOssForCausalLM").state_dict()
    how = {"merge_method": "linear", "models": [{"model": str(tmp_path / "NEW")}], "parameters": {"weight": 1}}
    fastinterp.merge({**how, "dtype": "float32"}, tmp_path / "out")
    for key, x in loaded(tmp_path / "out", "GptOssForCausalLM").state_dict().items():
        assert torch.equal(x.float(), numbers[key].float()), key
    codes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    first = read(tmp_path / "a")
    blocks, scales = (first[f"model.layers.0.mlp.experts.down_proj_{end}"] for end in ("blocks", "scales"))
    bytes_ = blocks.raw.reshape(blocks.shape)
    pairs = np.stack([bytes_ & 15, bytes_ >> 4], -1)
    values = (
        codes[pairs & 7]
        * np.where(pairs & 8, -1, 1)
        * 2.0 ** (scales.raw.reshape(scales.shape) - 127.0)[..., None, None]
    )
    dense = values.reshape(*blocks.shape[:2], -1).swapaxes(1, 2)
    assert np.array_equal(numbers["model.layers.0.mlp.experts.down_proj"].float().numpy(), dense.astype(np.float32))


# --- what else is said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GPTQ", ["from gptqmodel.utils.model_dequant import dequantize_model as d"]),
        ("AWQ", ["from gptqmodel.utils.model_dequant import dequantize_model as d"]),
        (
            "bitsandbytes nf4",
            ["import AutoModelForCausalLM as M", '.dequantize().save_pretrained("NEW", save_original_format=False)'],
        ),
        ("int4, compressed-tensors", ["CompressedTensorsConfig as Q", "Q(dequantize=True)"]),
        ("MLX", ["mlx_lm.convert --hf-path ", "--mlx-path NEW --dequantize"]),
        ("Metal", ["MetalConfig as Q"]),
    ],
)
def test_commands_of_programs_that_are_not_installed_here(tmp_path, name, said):
    paths = [save_format(tmp_path / n, FORMATS[name], seed) for seed, n in enumerate("ab")]
    [command] = commands(paths)
    assert all(part in command for part in said) and paths[0] in command
    if command.startswith("python"):
        compile(shlex.split(command)[2], "command", "exec")


@pytest.mark.parametrize(
    "name",
    ["EXL2", "AQLM", "HQQ", "torchao", "bitsandbytes fp4, stored as bfloat16", "Marlin", "fp8, ModelOpt's quantizer"],
)
def test_formats_without_a_command(tmp_path, name):
    """None is invented: the models from before are named."""
    paths = [save_format(tmp_path / n, FORMATS[name], seed) for seed, n in enumerate("ab")]
    assert commands(paths) == []


@pytest.mark.slow
def test_names_that_a_shell_would_read(tmp_path):
    paths = [save_format(tmp_path / n, FORMATS["fp8 E5M2"], seed) for seed, n in enumerate(("a $(touch x) 'y\"", "b"))]
    [command] = commands(paths)
    run(command, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*(Path(p).name for p in paths), "NEW.safetensors"])


@pytest.mark.parametrize("name", ["GPTQ", "AWQ"])
def test_configurations_that_say_nothing_of_the_format(tmp_path, name):
    """It is told what is missing: the file, or a key of it."""
    paths = [save_format(tmp_path / n, FORMATS[name], seed) for seed, n in enumerate("ab")]
    made = recipe("linear", paths, weights=[1.0] * 2)
    for path in paths:
        (Path(path) / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"}))
    with pytest.raises(
        CheckpointError, match=r"GPTQModel, with the `quantization_config` of the model's config\.json$"
    ):
        fastinterp.merge(made, tmp_path / "none")
    for path in paths:
        (Path(path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"GPTQModel, which needs the model's config\.json beside the weights"):
        fastinterp.merge(made, tmp_path / "none")


@pytest.mark.parametrize("name", ["GPTQ", "AWQ", "HQQ"])
def test_inspect_names_the_format(tmp_path, name):
    path = save_format(tmp_path / "a", FORMATS[name], 1)
    text = CliRunner().invoke(fastinterp_commands, ["inspect", path]).stdout
    assert re.search(rf"^quantised: {name}, \d+ tensors?$", text, re.MULTILINE)
    (found,) = json.loads(CliRunner().invoke(fastinterp_commands, ["inspect", path, "--json"]).stdout)["quantised"]
    assert found["format"] == name and found["tensors"] > 0
    plain = write_file(tmp_path / "plain.safetensors", {"a": tensor(np.zeros(4), F32)})
    assert "quantised" not in CliRunner().invoke(fastinterp_commands, ["inspect", str(plain)]).stdout
    assert (
        json.loads(CliRunner().invoke(fastinterp_commands, ["inspect", str(plain), "--json"]).stdout)["quantised"] == []
    )
