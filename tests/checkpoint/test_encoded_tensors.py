"""Readers find codes with their scales; what is missing, misshapen or left over is an error that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from fastinterp.checkpoint.formats.scales import grid
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, DTYPES, F8_E4M3
from fastinterp.plan.models import open_model
from tests.support.checkpoints import Tensor, integers, write_file
from tests.support.encodings import said
from tests.support.quantised_formats import Layout, model

W = "layers.0.up_proj.weight"
V = "layers.1.up_proj.weight"
CODES = ("F8_E4M3", (256, 384))
FP8 = said("fp8", weight_block_size=[128, 128])


def saved(folder: Path, layout: Layout, config: Mapping[str, Any] | None = None, **more: Tensor) -> str:
    write_file(folder / "model.safetensors", {**model(layout, 0), **{n.replace("__", "."): t for n, t in more.items()}})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def parameters(path: str, name: str = W) -> tuple[str, tuple[float, ...]]:
    tensor = open_model(path).tensors[name]
    assert tensor.decoded and tensor.encoding is not None  # type: ignore[attr-defined]
    return tensor.encoding.decoder, tensor.encoding.parameters  # type: ignore[attr-defined]


# --- which scale an element has --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scale", "blocks", "places"),
    [
        ((256, 384), (), [], (256, 384, 256)),
        ((256, 384), (1,), [], (256, 384, 256)),
        ((256, 384), (1, 1), [], (256, 384, 256)),
        ((256, 384), (256,), [], (1, 384, 256)),
        ((256, 384), (256, 1), [], (1, 384, 256)),
        ((256, 384), (1, 384), [], (256, 1, 256)),
        ((256, 384), (2, 3), [], (128, 128, 256)),
        ((256, 384), (2, 3), [(128, 128)], (128, 128, 256)),
        ((300, 200), (3, 2), [], (128, 128, 300)),  # 100 x 100 would fit as well: nobody writes such
        ((300, 200), (3, 2), [(100, 100)], (100, 100, 300)),
        ((64, 32), (2, 2), [], (32, 16, 64)),
        ((96, 64), (3, 1), [], (32, 64, 96)),
        ((256, 384), (256, 12), [], (1, 32, 256)),
        ((256, 384), (256, 3), [(1, 128)], (1, 128, 256)),
        ((256, 384), (2, 1, 3, 1), [], (128, 128, 256)),
        ((4, 256, 384), (), [], (1024, 384, 1024)),
        ((4, 256, 384), (4,), [], (256, 384, 256)),
        ((4, 256, 384), (4, 1, 1), [], (256, 384, 256)),
        ((4, 256, 384), (4, 256), [], (1, 384, 1024)),
        ((4, 256, 384), (4, 256, 1), [], (1, 384, 1024)),
        ((4, 256, 384), (4, 1, 384), [], (256, 1, 256)),
        ((4, 300, 200), (4, 3, 2), [(128, 128)], (128, 128, 300)),
        ((8, 4, 3, 3), (8, 1, 1, 1), [], (12, 3, 12)),
        ((8, 4, 3, 3), (8,), [], (12, 3, 12)),
        ((96,), (), [], (1, 96, 1)),
    ],
)  # fmt: skip
def test_scales_that_fit(shape, scale, blocks, places):
    found = grid(shape, scale, blocks, strict=False)
    assert found is not None
    assert (found.block_rows, found.block_columns, found.rows) == places


@pytest.mark.parametrize(
    ("shape", "scale", "blocks", "strict"),
    [
        ((256, 384), (3, 2), [(128, 128)], True),
        ((256, 384), (3, 2), [(128, 128)], False),
        ((256, 384), (3, 2), [], False),
        ((256, 384), (384,), [], False),
        ((256, 384), (256, 2, 1), [], False),
        ((256, 384), (1,), [(128, 128)], True),
        ((256, 384), (256, 1), [(128, 128)], True),
        ((96, 96), (2, 2), [], False),  # 48, or 64 and a rest
        ((4, 256, 384), (3, 2, 3), [], False),
        ((96,), (96,), [], False),
    ],
)  # fmt: skip
def test_scales_that_do_not_fit(shape, scale, blocks, strict):
    assert grid(shape, scale, blocks, strict) is None


def test_small_matrices_of_strict_blocks():
    """One block may be all: its scale may have any shape of one element."""
    for scale in ((1, 1), (1,), ()):
        found = grid((100, 64), scale, [(128, 128)], strict=True)
        assert found is not None and found.rows == 100


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "of"),
    [("layers.0.up_proj." + end, ()) for end in (
        "weight_scale", "weight_scale_inv", "scale", "scale_weight", "qscale_weight", "weights_scaling_factor",
    )],
)  # fmt: skip
def test_names_of_scales(tmp_path: Path, scale: str, of: tuple[int, ...]):
    path = saved(tmp_path, {W: CODES, scale: ("F32", of), "norm.weight": ("BF16", (4,))})
    assert parameters(path) == ("scaled_f8_e4m3", (0, 256, 384, 256))
    assert sorted(open_model(path).tensors) == [W, "norm.weight"]


def test_names_in_a_component(tmp_path: Path):
    """Of a pipeline: its configuration is that of its folder."""
    (tmp_path / "transformer").mkdir()
    layout: Layout = {W: ("F8_E4M3", (48, 80)), f"{W}_scale_inv": ("F32", (3, 4)), "norm.weight": ("BF16", (4,))}
    write_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", model(layout, 0))
    config = {"_class_name": "T", **said("fp8", weight_block_size=[20, 24])}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "P", "transformer": ["diffusers", "T"]}))
    assert parameters(str(tmp_path), f"transformer/{W}") == ("scaled_f8_e4m3", (0, 20, 24, 48))


def test_fused_experts(tmp_path: Path):
    layout: Layout = {
        "experts.gate_up_proj": ("F8_E4M3", (2, 64, 32)), "experts.gate_up_proj_scale_inv": ("F32", (2, 2, 1)),
        "experts.down_proj": ("F8_E4M3", (2, 32, 64)), "experts.down_proj_scale": ("F32", (2, 1, 64)),
    }  # fmt: skip
    path = saved(tmp_path, layout)
    assert parameters(path, "experts.gate_up_proj") == ("scaled_f8_e4m3", (0, 32, 32, 64))
    assert parameters(path, "experts.down_proj") == ("scaled_f8_e4m3", (0, 32, 1, 32))


def test_mxfp4_of_experts(tmp_path: Path):
    """gpt-oss: numbers have their last two dimensions the other way round."""
    layout: Layout = {
        "experts.down_proj_blocks": ("U8", (2, 8, 3, 16)), "experts.down_proj_scales": ("U8", (2, 8, 3)),
        "experts.down_proj_bias": ("BF16", (2, 8)),
    }  # fmt: skip
    tensors = open_model(saved(tmp_path, layout, said("mxfp4"))).tensors
    assert sorted(tensors) == ["experts.down_proj", "experts.down_proj_bias"]
    assert tensors["experts.down_proj"].shape == (2, 96, 8)
    assert parameters(str(tmp_path), "experts.down_proj") == ("mxfp4_transposed", (96,))


def test_scales_of_activations_are_left_out(tmp_path: Path):
    """And told; where nothing is codes they are parameters as any other."""
    attention = {
        "self_attn.k_proj.k_scale": ("F32", ()), "self_attn.k_scale": ("F32", ()), "attention.v_scale": ("F32", (1,)),
    }  # fmt: skip
    layout: Layout = {
        W: CODES, f"{W}_scale": ("F32", ()), "layers.0.up_proj.input_scale": ("F32", ()), "logit_scale": ("F32", ()),
        **attention,
    }  # fmt: skip
    opened = open_model(saved(tmp_path, layout))
    assert sorted(opened.tensors) == [W, "logit_scale"]
    [left] = [remark for remark in opened.remarks if remark.startswith("left out of ")]
    assert "scales of activations" in left and "input_scale" in left
    (tmp_path / "plain").mkdir()
    plain = open_model(saved(tmp_path / "plain", {"norm.weight": ("BF16", (4,)), **attention}))
    assert sorted(plain.tensors) == sorted([*attention, "norm.weight"])


def test_block_size_that_is_not_said(tmp_path: Path):
    opened = open_model(saved(tmp_path, {W: CODES, f"{W}_scale_inv": ("F32", (2, 3))}))
    assert any("no configuration says how large the blocks of" in r and "128 x 128" in r for r in opened.remarks)
    (tmp_path / "config.json").write_text(json.dumps(FP8))
    assert not any("no configuration" in r for r in open_model(str(tmp_path)).remarks)


# --- errors ----------------------------------------------------------------------------------------------------------

SCALE = f"{W}_scale_inv"
_OTHER: Layout = {V: CODES, f"{V}_scale_inv": ("F32", (2, 3))}
ERRORS: dict[str, tuple[Layout, Any, str]] = {
    "missing": ({W: CODES, **_OTHER}, FP8, f"`{W}` (F8_E4M3 [256, 384]) holds codes, which mean nothing without their "
                f"scale: expected `{SCALE}`, got none"),
    "missing, of the only one": ({W: CODES}, FP8, f"expected `{SCALE}`, got none"),
    "missing, of rows": ({W: CODES}, said("compressed-tensors"), f"expected `{W}_scale`, got none"),
    "missing, nothing said": ({W: CODES, **_OTHER}, None, f"expected `{SCALE}`, got none"),
    "missing, ComfyUI": ({W: CODES, V: CODES, "layers.1.up_proj.scale_weight": ("F32", ()), "scaled_fp8":
                         ("F8_E4M3", (0,))}, None, "expected `layers.0.up_proj.scale_weight`, got none"),
    "missing, ComfyUI, the only one": ({W: CODES, "scaled_fp8": ("F8_E4M3", (0,))}, None,
                                       "expected `layers.0.up_proj.scale_weight`, got none"),
    "missing, of experts": ({"experts.down_proj": ("F8_E4M3", (2, 128, 128)), **_OTHER}, FP8,
                            "expected `experts.down_proj_scale_inv`, got none"),
    "of a wrong shape": ({W: CODES, SCALE: ("F32", (3, 2))}, FP8,
                         f"`{SCALE}` (F32 [3, 2]) does not fit the codes `{W}` (F8_E4M3 [256, 384]) whose scale it is: "
                         "expected [2, 3] for blocks of 128 x 128, which config.json names, got [3, 2]"),
    "one for all, where blocks are named": ({W: CODES, SCALE: ("F32", (1,))}, FP8, "expected [2, 3]"),
    "of a wrong shape, nothing said": ({W: CODES, SCALE: ("F32", (5,))}, None,
                                       "expected [] or [1] for all, [256] or [256, 1] for each row, [2, 3] for blocks"),
    "of a wrong dtype": ({W: CODES, SCALE: ("F64", (2, 3))}, FP8,
                         f"`{SCALE}` (F64 [2, 3]) must be F32 or F16 or BF16 or F8_E8M0 or U8"),
    "integers": ({W: CODES, SCALE: ("I32", (2, 3))}, FP8, f"`{SCALE}` (I32 [2, 3]) must be F32"),
    "two": ({W: CODES, SCALE: ("F32", (2, 3)), f"{W}_scale": ("F32", ())}, FP8, "has several scales"),
    "left over": ({W: ("BF16", (256, 384)), SCALE: ("F32", (2, 3)), **_OTHER}, FP8,
                  f"`{SCALE}` (F32 [2, 3]) is a scale without codes: `{W}` (BF16 [256, 384]) holds no codes"),
    "left over, all": ({W: ("BF16", (256, 384)), SCALE: ("F32", (2, 3))}, FP8, "is a scale without codes"),
    "left over, codes missing": ({SCALE: ("F32", (2, 3)), **_OTHER}, FP8, f"without codes: `{W}` is not there"),
    "left over, ComfyUI": ({V: CODES, "layers.1.up_proj.scale_weight": ("F32", ()), "scaled_fp8": ("F8_E4M3", (0,)),
                            "layers.0.up_proj.scale_weight": ("F32", ())}, None, "is a scale without codes"),
    "int8, missing": ({W: ("I8", (8, 8))}, said("compressed-tensors"), f"expected `{W}_scale`, got none"),
    "int8, of a wrong shape": ({W: ("I8", (8, 6)), f"{W}_scale": ("F32", (6,))}, None, "[8] or [8, 1] for each row"),
    "mxfp4, missing": ({"a_blocks": ("U8", (2, 4, 1, 16))}, said("mxfp4"), "expected `a_scales`, got none"),
    "mxfp4, of a wrong shape": ({"a_blocks": ("U8", (2, 4, 1, 16)), "a_scales": ("U8", (2, 4, 2))}, said("mxfp4"),
                                "`a_scales` (U8 [2, 4, 2]) does not fit the codes `a_blocks` (U8 [2, 4, 1, 16])"),
    "mxfp4, codes missing": ({"a_scales": ("U8", (2, 4, 2)), "b_blocks": ("U8", (2, 4, 1, 16)),
                              "b_scales": ("U8", (2, 4, 1))}, said("mxfp4"), "`a_blocks` is not there"),
    "mxfp4 packed, of a wrong shape": ({"a.weight_packed": ("U8", (4, 32)), "a.weight_scale": ("U8", (4, 1))}, None,
                                       "expected [4, 2], one for 16 bytes of a row"),
    "nvfp4, scale missing": ({"a.weight": ("U8", (4, 32)), "a.weight_scale_2": ("F32", ())}, None,
                             "expected `a.weight_scale`, got none"),
    "nvfp4, second scale missing": ({"a.weight": ("U8", (4, 32)), "a.weight_scale": ("F8_E4M3", (4, 4))}, None,
                                    "expected `a.weight_scale_2`, got none"),
    "nvfp4, of a wrong shape": ({"a.weight": ("U8", (4, 32)), "a.weight_scale": ("F8_E4M3", (4, 2)),
                                 "a.weight_scale_2": ("F32", ())}, None, "expected [4, 4], one for 8 bytes of a row"),
    "nvfp4, second of a wrong dtype": ({"a.weight": ("U8", (4, 32)), "a.weight_scale": ("F8_E4M3", (4, 4)),
                                        "a.weight_scale_2": ("BF16", ())}, None, "must be F32"),
    "nvfp4, compressed-tensors": ({"a.weight_packed": ("U8", (4, 32)), "a.weight_scale": ("F8_E4M3", (4, 4))}, None,
                                  "expected `a.weight_global_scale`, got none"),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "config", "message"), ERRORS.values(), ids=ERRORS)
def test_companions_that_are_wrong(tmp_path: Path, layout: Layout, config: Any, message: str):
    """Every command says it, with the file, and exits with 3; nothing is written, and inputs stay as they are."""
    (tmp_path / "a").mkdir()
    path = saved(tmp_path / "a", layout, config)
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError) as caught:
        open_model(path)
    assert message in str(caught.value) and str(tmp_path / "a" / "model.safetensors") in str(caught.value)
    recipe = {"merge_method": "passthrough", "models": [{"model": path}]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    for args in (["merge", "r.yml", "out"], ["check", "r.yml"], ["explain", "r.yml"], ["diff", "a", "a"]):
        result = CliRunner().invoke(commands, [str(tmp_path / x) if x in ("r.yml", "out", "a") else x for x in args])
        assert result.exit_code == 3, (args, result.output)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_description_that_is_damaged(tmp_path: Path):
    layout: Layout = {W: CODES, f"{W}_scale": ("F32", ())}
    path = saved(tmp_path, layout, None, layers__0__up_proj__comfy_quant=integers(np.frombuffer(b"[1", np.uint8), "U8"))
    with pytest.raises(CheckpointError, match=r"`layers\.0\.up_proj\.comfy_quant` must be a JSON object"):
        open_model(path)


# --- what is not read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "format"),
    [
        ({W: ("I8", (8, 8)), f"{W}_scale": ("F32", (8, 1)), f"{W}_zero_point": ("I8", (8, 1))},
         "int8 with scales and zero points"),
        ({W: ("F8_E4M3", (8, 8)), f"{W}_scale": ("F32", (8, 1)), f"{W}_zero_point": ("F8_E4M3", (8, 1))},
         "fp8 with scales and zero points"),
        ({W: ("U8", (8, 32)), f"{W}_scale": ("F8_E4M3", (8, 4)), f"{W}_scale_2": ("F32", ()),
          "layers.0.up_proj.pre_quant_scale": ("BF16", (64,))}, "NVFP4 with scaled activations"),
        ({W: ("I8", (8, 32)), f"{W}_scale": ("F32", (8, 1)), f"{W}_g_idx": ("I32", (64,))},
         "int8 with scales, columns in another order"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read(tmp_path: Path, layout: Layout, format: str):
    """Refused by name: another formula than code times scale."""
    tensors = open_model(saved(tmp_path, layout)).tensors
    assert {t.quantised for t in tensors.values()} == {format}


@pytest.mark.parametrize("description", [
    {"format": "convrot_w4a4"}, {"format": "int8_tensorwise", "convrot": True}, {"format": "awq_w4a16"},
    {"format": "int8_tensorwise", "params": {"convrot": True}},
])  # fmt: skip
def test_layers_that_comfyui_rotates(tmp_path: Path, description: dict[str, Any]):
    text = np.frombuffer(json.dumps(description).encode(), np.uint8)
    layout: Layout = {W: ("I8", (8, 32)), f"{W}_scale": ("F32", (8, 1))}
    tensors = open_model(saved(tmp_path, layout, None, layers__0__up_proj__comfy_quant=integers(text, "U8"))).tensors
    assert {t.quantised for t in tensors.values()} == {f"ComfyUI's {description['format']}"}


def test_zero_points_of_symmetric_codes(tmp_path: Path):
    """All are 0, so that they change nothing."""
    zeros = Tensor(DTYPES["I8"], (8, 1), np.zeros(8, np.uint8))
    layout: Layout = {W: ("I8", (8, 8)), f"{W}_scale": ("F32", (8, 1))}
    path = saved(tmp_path, layout, None, layers__0__up_proj__weight_zero_point=zeros)
    assert sorted(open_model(path).tensors) == [W]


def test_fp8_numbers_beside_scaled_layers_of_comfyui(tmp_path: Path):
    """ComfyUI takes a layer without a scale for numbers, so they are numbers, where no neighbour has one."""
    layout: Layout = {
        V: CODES, "layers.1.up_proj.scale_weight": ("F32", ()), "scaled_fp8": ("F8_E4M3", (2,)),
        "shared.weight": ("F8_E4M3", (16, 8)), "norm.weight": ("BF16", (4,)),
    }  # fmt: skip
    opened = open_model(saved(tmp_path, layout))
    assert opened.tensors["shared.weight"].dtype == F8_E4M3 and not opened.tensors["shared.weight"].decoded
    assert sorted(opened.tensors) == sorted([V, "shared.weight", "norm.weight"])
    assert any("shared.weight" in remark and "without a scale" in remark for remark in opened.remarks)
    assert opened.tensors["norm.weight"].dtype == BF16
