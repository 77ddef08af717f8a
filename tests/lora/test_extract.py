"""Adapters extracted from fine-tunes: factors compared with dense singular value decompositions in float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, OutputError, ShapeError, UsageError
from fastinterp.lora.extract import extract_lora
from tests.lora.adapters import assert_close, changes, factors, read_adapter, recipe, write_adapter
from tests.support.stated_checksums import checked_weights

LAYERS = "model.layers"
SHAPES = {
    "model.embed_tokens.weight": (50, 24), "lm_head.weight": (50, 24), "model.norm.weight": (24,),
    **{f"{LAYERS}.{i}.self_attn.q_proj.weight": (40, 24) for i in (0, 1)},
    **{f"{LAYERS}.{i}.self_attn.q_proj.bias": (40,) for i in (0, 1)},
    **{f"{LAYERS}.{i}.mlp.down_proj.weight": (24, 64) for i in (0, 1)},
    **{f"{LAYERS}.{i}.input_layernorm.weight": (24,) for i in (0, 1)},
}  # fmt: skip
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
_CODES = {"num_bits": 8, "type": "float", "strategy": "tensor"}
FLOAT8 = {
    "quant_method": "compressed-tensors", "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CODES}},
}  # fmt: skip
WEIGHTS = [name.removesuffix(".weight") for name in SHAPES if "_proj.weight" in name]


def normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal(shape).astype(np.float32)


def save(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] = CONFIG) -> str:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def models(
    tmp_path: Path,
    changed: tuple[str, ...] = ("_proj.weight",),
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    **config: Any,
) -> tuple[str, str, dict[str, np.ndarray]]:
    """(base, fine-tune, what differs: tensors whose names end so)"""
    base = {name: normal(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    delta = {n: 0.1 * normal(100 + i, s) for i, (n, s) in enumerate(shapes.items()) if n.endswith(changed)}
    tuned = {name: x + delta[name] if name in delta else x for name, x in base.items()}
    delta = {name: tuned[name] - base[name] for name in delta}  # as it is in float32
    return save(tmp_path / "base", base, CONFIG | config), save(tmp_path / "tuned", tuned, CONFIG | config), delta


def extract(tmp_path: Path, **settings: Any) -> Any:
    given = {"rank": 64} | settings
    return extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", **given)


def test_of_full_rank_it_is_the_change(tmp_path):
    """Singular vectors and values are float64, factors float32: their product misses D by some 2^-24 |D|."""
    _, _, delta = models(tmp_path)
    report = extract(tmp_path)
    assert_close(changes(tmp_path / "out"), {n.removesuffix(".weight"): d for n, d in delta.items()}, 1e-5)
    tensors, config = read_adapter(tmp_path / "out")
    assert len(tensors) == 2 * len(WEIGHTS) and config["modules_to_save"] is None and config["bias"] == "none"
    assert sorted(config["target_modules"]) == ["down_proj", "q_proj"]
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "base"))
    assert report.total.relative_error < 1e-6 and not report.warnings
    checked_weights(tmp_path / "out" / "adapter_model.safetensors")


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_rank_is_close_to_the_best_approximation(tmp_path, rank):
    _, _, delta = models(tmp_path)
    report = extract(tmp_path, rank=rank)
    got = changes(tmp_path / "out")
    for module in report.modules:
        d = delta[f"{module.name}.weight"].astype(np.float64)
        best = np.linalg.norm(np.linalg.svd(d, compute_uv=False)[rank:])
        error = np.linalg.norm(d - got[module.name])
        assert best * (1 - 1e-6) <= error <= best * 1.02 and module.rank == rank
        assert module.error == pytest.approx(error, rel=1e-5) and module.norm == pytest.approx(np.linalg.norm(d))
    whole = np.sqrt(sum(m.error**2 for m in report.modules) / sum(m.norm**2 for m in report.modules))
    assert report.total.relative_error == pytest.approx(whole)


def test_energy_chooses_the_rank_of_each_module(tmp_path):
    _, _, delta = models(tmp_path)
    report = extract(tmp_path, rank=24, energy=0.7)
    _, config = read_adapter(tmp_path / "out")
    for module in report.modules:
        squares = np.linalg.svd(delta[f"{module.name}.weight"].astype(np.float64), compute_uv=False) ** 2
        want = int(np.searchsorted(np.cumsum(squares), 0.7 * squares.sum())) + 1
        assert module.rank == want and module.energy >= 0.7
    assert {module.rank for module in report.modules} == {config["r"], *config["rank_pattern"].values()}
    assert len(changes(tmp_path / "out")) == len(WEIGHTS)  # whose scales and ranks are read by the rules of peft


@pytest.mark.parametrize("energy", [None, 0.5])
def test_energy_of_experts_is_a_warning(tmp_path, energy):
    """peft loads factors of modules that transformers fuses if they have one rank."""
    shapes = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (8, 8) for i in range(3)}
    models(tmp_path, shapes=shapes | {"model.norm.weight": (300,)})
    warnings = extract(tmp_path, rank=8, energy=energy).warnings
    assert any("Without --energy all have one rank" in text for text in warnings) is (energy is not None)


@pytest.mark.parametrize("module", ["embed_out", "vit.encoder.layer.0.attention.attention.query"])
def test_modules_that_transformers_renames_are_a_warning(tmp_path, module):
    """peft looks for the new names; behind its base here the adapter is whole, as the warning says."""
    shapes = {f"{module}.weight": (8, 8), "model.layers.0.up_proj.weight": (8, 8), "model.norm.weight": (8,)}
    base, tuned, _ = models(tmp_path, (f"{module}.weight", "_proj.weight"), shapes)
    assert any("transformers has other names" in text for text in extract(tmp_path, rank=8).warnings)
    fastinterp.interpolate(base, f"{base}+{tmp_path / 'out'}", 1.0, tmp_path / "back", dtype="float32")
    got, want = (load_file(Path(f) / "model.safetensors")[f"{module}.weight"] for f in (tmp_path / "back", tuned))
    # Eight singular values of an 8 x 8 matrix are all; factors are rounded to float32.
    np.testing.assert_allclose(got.astype(np.float64), np.asarray(want, np.float64), rtol=0, atol=1e-4)


def test_energy_has_the_rank_as_its_limit(tmp_path):
    models(tmp_path)
    assert {m.rank for m in extract(tmp_path, rank=3, energy=0.99).modules} == {3}


def test_what_has_no_factors_is_stored_whole(tmp_path):
    _, tuned, _ = models(tmp_path, ("weight",))
    report = extract(tmp_path)
    tensors, config = read_adapter(tmp_path / "out")
    want = load_file(f"{tuned}/model.safetensors")
    whole = {name: x for name, x in tensors.items() if ".lora_" not in name}
    assert whole.keys() == {name for name in SHAPES if "_proj" not in name}
    assert all(x.tobytes() == want[name].tobytes() for name, x in whole.items())
    assert config["modules_to_save"] == ["embed_tokens", "input_layernorm", "lm_head", "norm"]
    assert len(report.saved) == len(whole)


def test_unchanged_modules_are_left_out(tmp_path):
    models(tmp_path, ("0.self_attn.q_proj.weight", "1.input_layernorm.weight"))
    extract(tmp_path)
    tensors, config = read_adapter(tmp_path / "out")
    assert tensors.keys() == {
        f"{LAYERS}.0.self_attn.q_proj.lora_A.weight", f"{LAYERS}.0.self_attn.q_proj.lora_B.weight",
        f"{LAYERS}.1.input_layernorm.weight",
    }  # fmt: skip
    assert config["target_modules"] == [f"{LAYERS}.0.self_attn.q_proj"]
    assert config["modules_to_save"] == [f"{LAYERS}.1.input_layernorm"]


def test_biases_of_layers_with_factors(tmp_path):
    _, tuned, _ = models(tmp_path, ("_proj.weight", "0.self_attn.q_proj.bias"))
    extract(tmp_path)
    tensors, config = read_adapter(tmp_path / "out")
    assert config["bias"] == "lora_only" and config["modules_to_save"] is None
    want = load_file(f"{tuned}/model.safetensors")
    names = {name: f"{name.removesuffix('.bias')}.base_layer.bias" for name in SHAPES if name.endswith("bias")}
    assert {name for name in tensors if name.endswith("bias")} == {*names.values()}
    assert all(tensors[stored].tobytes() == want[name].tobytes() for name, stored in names.items())


def test_without_whole_modules_is_a_warning(tmp_path):
    models(tmp_path, ("weight", "bias"))
    report = extract(tmp_path, whole_modules=False)
    tensors, config = read_adapter(tmp_path / "out")
    assert all(".lora_" in name for name in tensors) and config["modules_to_save"] is None
    assert set(report.left_out) == {name for name in SHAPES if "_proj.weight" not in name}
    assert "7 tensors differ, and are not in the adapter" in report.warnings[-1]


def test_convolutions(tmp_path):
    shapes = {"conv_in.weight": (8, 6, 3, 3), "conv_in.bias": (8,), "proj.weight": (12, 8, 1, 1)}
    _, _, delta = models(tmp_path, ("weight",), shapes, architectures=["UNet"], model_type="unet")
    extract(tmp_path, rank=6)
    tensors, _ = read_adapter(tmp_path / "out")
    assert tensors["conv_in.lora_A.weight"].shape == (6, 6, 3, 3)
    assert tensors["conv_in.lora_B.weight"].shape == (8, 6, 1, 1)
    d = delta["conv_in.weight"].astype(np.float64).reshape(8, -1)
    s = np.linalg.svd(d, compute_uv=False)
    assert np.linalg.norm(changes(tmp_path / "out")["conv_in"].reshape(8, -1) - d) == pytest.approx(
        np.linalg.norm(s[6:]), rel=1e-4
    )


def test_transposed_weights_of_gpt2(tmp_path):
    """transformers' Conv1D stores [in, out]."""
    shapes = {"transformer.h.0.attn.c_attn.weight": (24, 72), "transformer.h.0.mlp.c_proj.weight": (96, 24)}
    _, _, delta = models(tmp_path, ("weight",), shapes, architectures=["GPT2LMHeadModel"], model_type="gpt2")
    extract(tmp_path)
    got, (_, config) = changes(tmp_path / "out"), read_adapter(tmp_path / "out")
    assert config["fan_in_fan_out"] is True
    assert_close(got, {name.removesuffix(".weight"): d.T for name, d in delta.items()}, 1e-5)


def test_the_base_and_the_adapter_give_the_fine_tune(tmp_path):
    """What is extracted is read back by the engine: base + adapter is the fine-tune, but for rounding."""
    base, tuned, _ = models(tmp_path, ("weight",))
    extract(tmp_path)
    merged = fastinterp.load(
        {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'out'}"}]}, framework="numpy"
    )
    for name, x in load_file(f"{tuned}/model.safetensors").items():
        assert np.abs(merged[name] - x).max() <= 1e-6 * max(1.0, np.abs(x).max()), name


def test_a_fine_tune_that_is_an_adapter_on_its_base(tmp_path):
    """The adapter is found again, of its rank."""
    base, _, _ = models(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", {m: factors(i, *_shape(m)) for i, m in enumerate(WEIGHTS)}, r=4)
    report = extract_lora(f"{base}+{adapter}", base, tmp_path / "out", rank=8, energy=0.9999)
    assert {module.rank for module in report.modules} == {4}
    assert_close(changes(tmp_path / "out"), changes(adapter), 1e-4)  # W + D was rounded to float32


def test_a_base_with_an_adapter_is_a_warning(tmp_path):
    """peft would not find it by the name that the configuration has."""
    base, tuned, _ = models(tmp_path)
    adapter = write_adapter(tmp_path / "adapter", {m: factors(i, *_shape(m)) for i, m in enumerate(WEIGHTS)}, r=4)
    report = extract_lora(tuned, f"{base}+{adapter}", tmp_path / "out", rank=8)
    assert any("peft loads it into the merged model" in warning for warning in report.warnings)


def _shape(module: str) -> tuple[int, int, int]:
    out, columns = SHAPES[f"{module}.weight"]
    return out, 4, columns


def test_a_fine_tune_in_float8(tmp_path):
    """Codes with a scale each tensor: the change is that of what they stand for."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    base, _, _ = models(tmp_path)
    tensors, want = {}, {}
    for name, x in load_file(f"{base}/model.safetensors").items():
        tensors[name] = x
        if "_proj.weight" in name:
            codes = (x * 50).astype(ml_dtypes.float8_e4m3fn)
            scale = np.float32(1 / 64)
            want[name.removesuffix(".weight")] = codes.astype(np.float32) * scale - x
            tensors[name], tensors[f"{name}_scale"] = codes.view(np.uint8), np.array(scale)
    folder = tmp_path / "float8"
    save(folder, tensors, CONFIG | {"quantization_config": FLOAT8})
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    extract_lora(folder, base, tmp_path / "out", rank=24)
    assert_close(changes(tmp_path / "out"), want, 1e-5)


def test_extracted_adapters_can_be_merged(tmp_path):
    models(tmp_path)
    extract(tmp_path, rank=4)
    out = str(tmp_path / "out")
    fastinterp.merge_adapters(recipe({out: 0.5}), tmp_path / "half")
    assert_close(changes(tmp_path / "half"), {m: 0.5 * d for m, d in changes(out).items()}, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes_of_factors(tmp_path, dtype):
    models(tmp_path)
    report = extract(tmp_path, dtype=dtype)
    header = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()[8:3000].decode("utf-8", "ignore")
    assert {"float16": '"F16"', "bfloat16": '"BF16"', "float64": '"F64"'}[dtype] in header
    assert report.total.relative_error < {"float16": 1e-3, "bfloat16": 1e-2, "float64": 1e-6}[dtype]


def test_same_bytes_for_every_number_of_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("fastinterp.lora.algebra._ROWS", 1)
    monkeypatch.setattr("fastinterp.lora.algebra._BLOCK", 24 * 9)
    models(tmp_path)
    files = []
    for threads in (1, 2, 7):
        extract(tmp_path, rank=4, threads=threads, force=True)
        files.append((tmp_path / "out" / "adapter_model.safetensors").read_bytes())
    assert files[1:] == files[:-1]
    extract(tmp_path, rank=4, seed=1, force=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != files[0]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(tmp_path: Path, kind: type[Exception], match: str, **settings: Any) -> None:
    with pytest.raises(kind, match=match):
        extract(tmp_path, **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "`rank` must be a whole number in 1"),
        ({"rank": 2.0}, "`rank` must be a whole number in 1"),
        ({"energy": 0}, "`energy` must be a number above 0"),
        ({"energy": 1.5}, "`energy` must be a number above 0"),
        ({"seed": -1}, "`seed` must be a whole number"),
        ({"dtype": "float8_e4m3fn"}, "`dtype` must be one of"),
        ({"dtype": "int8"}, "`dtype` must be one of"),
    ],
)
def test_arguments(tmp_path, settings, match):
    models(tmp_path)
    refused(tmp_path, UsageError, match, **settings)


def test_nothing_differs(tmp_path):
    models(tmp_path, ("nothing",))
    refused(tmp_path, CheckpointError, "its numbers are those of the base .* there is nothing to extract")


def test_only_norms_differ(tmp_path):
    models(tmp_path, ("norm.weight",))
    refused(tmp_path, CheckpointError, "there is nothing for factors")


def test_layers_in_modules_of_which_a_parameter_differs(tmp_path):
    """As of Mamba, whose layers lie beside `A_log`: the remedy works."""
    base = {"model.mixer.in_proj.weight": normal(1, (8, 8)), "model.mixer.A_log": normal(2, (8,))}
    base |= {"model.mixer.out_proj.weight": normal(1, (8, 8)), "model.norm.weight": normal(5, (300,))}
    tuned = {name: x + (normal(4, x.shape) if "mixer" in name else 0) for name, x in base.items()}
    save(tmp_path / "base", base)
    save(tmp_path / "tuned", tuned)
    with pytest.raises(CheckpointError, match=r"in_proj.*To leave those tensors out: --no-modules-to-save"):
        extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4)
    report = extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=4, whole_modules=False)
    assert {module.name for module in report.modules} == {"model.mixer.in_proj", "model.mixer.out_proj"}


def test_the_base_itself(tmp_path):
    base, _, _ = models(tmp_path)
    with pytest.raises(UsageError, match="the same checkpoint"):
        extract_lora(base, base, tmp_path / "out", rank=4)


def test_other_tensors(tmp_path):
    base, _, _ = models(tmp_path)
    save(tmp_path / "other", {"encoder.0.weight": normal(0, (8, 8)), "encoder.1.weight": normal(0, (8, 8))})
    with pytest.raises(ShapeError, match="An adapter needs a fine-tune that has the tensors of its base") as caught:
        extract_lora(tmp_path / "other", base, tmp_path / "out", rank=4)
    assert "missing:" not in str(caught.value)  # a key of recipes


def test_other_shapes(tmp_path):
    _, tuned, _ = models(tmp_path)
    tensors = load_file(f"{tuned}/model.safetensors")
    tensors["model.embed_tokens.weight"] = normal(1, (51, 24))
    save_file(tensors, f"{tuned}/model.safetensors")
    refused(tmp_path, ShapeError, r"embed_tokens.weight .*\[5[01], 24\]")


def test_nan(tmp_path):
    _, tuned, _ = models(tmp_path)
    tensors = load_file(f"{tuned}/model.safetensors")
    tensors[f"{WEIGHTS[0]}.weight"][0, 0] = np.nan
    save_file(tensors, f"{tuned}/model.safetensors")
    refused(tmp_path, CheckpointError, f"tensor `{WEIGHTS[0]}.weight`: there is NaN or Inf")


def test_a_parameter_of_the_whole_model(tmp_path):
    shapes = {**SHAPES, "model.position": (7, 24)}
    models(tmp_path, ("weight", "position"), shapes)
    message = r"no place for 1 tensor that differ: `model.position`.*--no-modules-to-save"
    refused(tmp_path, ShapeError, message)
    report = extract(tmp_path, whole_modules=False)  # the remedy
    assert "model.position" in report.left_out


def test_a_file_is_no_adapter(tmp_path):
    base, tuned, _ = models(tmp_path)
    with pytest.raises(UsageError, match=r"Give `.*/out`"):
        extract_lora(tuned, base, tmp_path / "out.safetensors", rank=4)


def test_inputs_are_never_written_over(tmp_path):
    base, tuned, _ = models(tmp_path)
    with pytest.raises(OutputError, match="inputs are never overwritten"):
        extract_lora(tuned, base, tuned, rank=4, force=True)


def test_an_interrupt_leaves_nothing(tmp_path):
    models(tmp_path)

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path, progress=stop)
    assert not (tmp_path / "out").exists()


def test_progress_reaches_its_end(tmp_path):
    models(tmp_path)
    seen: list[tuple[int, int]] = []
    extract(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen) and all(done <= total for done, total in seen) and seen[-1][0] > seen[-1][1] // 2


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: str) -> Any:
    return CliRunner().invoke(commands, ["extract-lora", *arguments])


def test_command(tmp_path):
    base, tuned, _ = models(tmp_path, ("weight",))
    out = str(tmp_path / "out")
    result = run(tuned, "--base", base, "--rank", "8", "-o", out)
    assert result.exit_code == 0 and "4 modules of rank 8" in result.stdout and "energy kept" in result.stdout
    again = run(tuned, "--base", base, "--rank", "8", "-o", out)
    assert again.exit_code == 4 and "--force" in again.stderr
    as_json = run(tuned, "--base", base, "--rank", "8", "--energy", "0.5", "-o", out, "--force", "--json")
    made = json.loads(as_json.stdout)
    assert made["replaced"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    text = run(tuned, "--base", base, "--rank", "8", "-o", out, "--force").stdout
    assert "\n  replaced: README.md, adapter_config.json, adapter_model.safetensors\n" in text
    assert made["modules"].keys() == set(WEIGHTS) and all(0.5 <= m["energy"] <= 1 for m in made["modules"].values())
    quiet = run(tuned, "--base", base, "--rank", "8", "-o", out, "--force", "--quiet", "--no-modules-to-save")
    assert quiet.stdout == "" and "not in the adapter" in quiet.stderr


def test_command_with_errors(tmp_path):
    base, tuned, _ = models(tmp_path)
    assert run(tuned, "--base", base, "--rank", "0", "-o", "x").exit_code == 2
    assert run(tuned, "--base", base, "--rank", "8", "--energy", "2", "-o", str(tmp_path / "x")).exit_code == 2
    missing = run(str(tmp_path / "none"), "--base", base, "--rank", "8", "-o", str(tmp_path / "x"))
    assert missing.exit_code == 3 and "no such folder or file" in missing.stderr
    assert not (tmp_path / "x").exists()
