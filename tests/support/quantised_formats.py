"""Small modules of every format of quantised weights, with the names, dtypes and shapes that its programs write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.ops.dtypes import DTYPES
from tests.support.checkpoints import Tensor, write_file

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape


@dataclass(frozen=True)
class Format:
    """A layout, the format that it is recognised as, and what config.json says.

    plain     names that belong to no codes, and merge
    metadata  of the file's header
    read      names of the tensors that its codes are decoded to; empty: its codes are not read
    """

    name: str
    layout: Layout
    config: Mapping[str, Any] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    read: tuple[str, ...] = ()


P = "model.layers.0.mlp.up_proj"


def _module(**tensors: tuple[str, tuple[int, ...]]) -> Layout:
    """Tensors of one module, with its bias and a norm beside."""
    return {f"{P}.{name}": of for name, of in tensors.items()} | {"model.norm.weight": ("BF16", (64,))}


def _quantised(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **more}}


_W = ("F8_E4M3", (64, 64))
_NORM = ("model.norm.weight",)

_FORMATS: dict[str, Format] = {
    "fp8 per tensor": Format(
        "fp8 with scales", _module(weight=_W, weight_scale=("F32", ()), input_scale=("F32", ()), bias=("BF16", (64,))),
        _quantised("modelopt"), (*_NORM, f"{P}.bias"),
    ),
    "fp8 per tensor, ComfyUI": Format(
        "fp8 with scales",
        {"scaled_fp8": ("F8_E4M3", (0,)),
         **_module(weight=_W, scale_weight=("F32", ()), scale_input=("F32", ()), bias=("F16", (64,)))},
        {}, (*_NORM, f"{P}.bias"),
    ),
    "fp8 per row": Format(
        "fp8 with scales", _module(weight=_W, weight_scale=("BF16", (64, 1))), _quantised("compressed-tensors"), _NORM
    ),
    "fp8 E5M2": Format("fp8 with scales", _module(weight=("F8_E5M2", (64, 64)), weight_scale=("F32", (1,))), {}, _NORM),
    "fp8, TensorRT-LLM": Format(
        "fp8 with scales",
        _module(weight=_W, weights_scaling_factor=("F32", (1,)), bias=("BF16", (64,))), {}, (*_NORM, f"{P}.bias"),
    ),
    "fp8, ModelOpt's quantizer": Format(
        "fp8 with scales", _module(weight=_W, **{"weight_quantizer._amax": ("F32", ())}), {}, _NORM
    ),
    "int8 per channel, TensorRT-LLM": Format(
        "int8 with scales", _module(weight=("I8", (64, 64)), per_channel_scale=("F16", (64,))), {}, _NORM
    ),
    "fp8 blocks": Format(
        "fp8 with scales of blocks", _module(weight=("F8_E4M3", (64, 32)), weight_scale_inv=("F32", (2, 2))),
        _quantised("fp8", weight_block_size=[32, 16]), _NORM,
    ),
    "fp8 blocks, DeepSeek's own": Format(
        "fp8 with scales of blocks", _module(weight=("F8_E4M3", (64, 32)), scale=("F32", (2, 2))), {}, _NORM
    ),
    "fp8, Mistral's own": Format(
        "fp8 with scales", _module(weight=_W, qscale_weight=("F32", ()), qscale_act=("F32", ())), {}, _NORM
    ),
    "fp8 experts": Format(
        "fp8 with scales of blocks",
        {"mlp.experts.gate_up_proj": ("F8_E4M3", (2, 32, 16)), "mlp.experts.gate_up_proj_scale_inv": ("F32", (2, 2, 2)),
         "model.norm.weight": ("BF16", (64,))}, {}, _NORM,
    ),
    "mxfp8": Format("MXFP8", _module(weight=_W, weight_scale=("U8", (64, 2))), {}, _NORM),
    "mxfp8, exponents": Format("MXFP8", _module(weight=_W, scale=("F8_E8M0", (64, 2))), {}, _NORM),
    "described by metadata": Format(
        "fp8 with scales", _module(weight=_W, weight_scale=("F32", ())), {}, _NORM,
        {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {P: {"format": "float8_e4m3fn"}}})},
    ),
    "mxfp4, gpt-oss": Format(
        "MXFP4",
        {"mlp.experts.down_proj_blocks": ("U8", (2, 8, 2, 16)), "mlp.experts.down_proj_scales": ("U8", (2, 8, 2)),
         "mlp.experts.down_proj_bias": ("BF16", (2, 8))},
        _quantised("mxfp4"), ("mlp.experts.down_proj_bias",),
    ),
    "nvfp4": Format(
        "NVFP4",
        _module(weight=("U8", (64, 32)), weight_scale=("F8_E4M3", (64, 4)), weight_scale_2=("F32", ()),
                input_scale=("F32", ())),
        _quantised("modelopt"), _NORM,
    ),
    "nvfp4, compressed-tensors": Format(
        "compressed-tensors",
        _module(weight_packed=("U8", (64, 32)), weight_scale=("F8_E4M3", (64, 4)), weight_global_scale=("F32", (1,)),
                input_global_scale=("F32", (1,))),
        _quantised("compressed-tensors"), _NORM,
    ),
    "int4, compressed-tensors": Format(
        "compressed-tensors",
        _module(weight_packed=("I32", (64, 8)), weight_scale=("BF16", (64, 2)), weight_shape=("I64", (2,)),
                weight_zero_point=("I32", (8, 2)), weight_g_idx=("I32", (64,))),
        _quantised("compressed-tensors"), _NORM,
    ),
    "2:4 sparse": Format(
        "sparse compressed-tensors",
        {f"{P}.weight.compressed": ("BF16", (64, 32)), f"{P}.weight.bitmask": ("U8", (64, 8)),
         "model.norm.weight": ("BF16", (64,))}, {}, _NORM,
    ),
    "int8": Format("int8 with scales", _module(weight=("I8", (64, 64)), weight_scale=("F32", (64, 1))), {}, _NORM),
    "GPTQ": Format(
        "GPTQ",
        _module(qweight=("I32", (8, 64)), qzeros=("I32", (2, 8)), scales=("F16", (2, 64)), g_idx=("I32", (64,))),
        _quantised("gptq", bits=4, group_size=32), _NORM,
    ),
    "AWQ": Format(
        "AWQ", _module(qweight=("I32", (64, 8)), qzeros=("I32", (2, 8)), scales=("F16", (2, 64))),
        _quantised("awq", bits=4, group_size=32), _NORM,
    ),
    "SVDQuant": Format(
        "SVDQuant", _module(qweight=("I8", (64, 32)), wscales=("BF16", (1, 64)), smooth_factor=("BF16", (64,))), {},
        _NORM,
    ),
    "Marlin": Format("Marlin", _module(B=("I32", (4, 128)), s=("F16", (2, 64)), workspace=("I32", (8,))), {}, _NORM),
    "bitsandbytes nf4": Format(
        "bitsandbytes nf4",
        {f"{P}.weight": ("U8", (2048, 1)), f"{P}.weight.absmax": ("U8", (64,)), f"{P}.weight.quant_map": ("F32", (16,)),
         f"{P}.weight.nested_absmax": ("F32", (1,)), f"{P}.weight.nested_quant_map": ("F32", (256,)),
         f"{P}.weight.quant_state.bitsandbytes__nf4": ("U8", (90,)), f"{P}.bias": ("BF16", (64,))},
        _quantised("bitsandbytes", load_in_4bit=True), (f"{P}.bias",),
    ),
    "bitsandbytes fp4, stored as bfloat16": Format(
        "bitsandbytes fp4",
        {f"{P}.weight": ("BF16", (1024, 1)), f"{P}.weight.absmax": ("F32", (64,)),
         f"{P}.weight.quant_map": ("F32", (16,)), f"{P}.weight.quant_state.bitsandbytes__fp4": ("U8", (90,)),
         "model.norm.weight": ("BF16", (64,))}, {}, _NORM,
    ),
    "bitsandbytes int8": Format(
        "bitsandbytes int8", _module(weight=("I8", (64, 64)), SCB=("F32", (64,)), weight_format=("U8", ())),
        _quantised("bitsandbytes", load_in_8bit=True), _NORM,
    ),
    "HQQ": Format(
        "HQQ",
        _module(W_q=("U8", (32, 64)), scale=("F16", (64, 1)), zero=("F16", (64, 1)), nbits=("I32", ()),
                group_size=("I32", ()), shape=("I64", (2,)), axis=("I32", ()), bias=("F16", (64,))),
        _quantised("hqq"), (*_NORM, f"{P}.bias"),
    ),
    "EXL2": Format(
        "EXL2",
        _module(q_weight=("I32", (8, 64)), q_scale=("I32", (2, 8)), q_scale_max=("F16", (2,)), q_groups=("I16", (4,)),
                q_invperm=("I32", (64,))),
        _quantised("exl2"), _NORM,
    ),
    "EXL3": Format(
        "EXL3", _module(trellis=("I16", (4, 4, 48)), suh=("F16", (64,)), svh=("F16", (64,))), _quantised("exl3"), _NORM
    ),
    "EETQ": Format(
        "EETQ", _module(weight=("I8", (64, 64)), weight_scales=("F16", (64,))), _quantised("eetq"), _NORM
    ),
    "AQLM": Format(
        "AQLM",
        _module(codes=("I8", (64, 8, 1)), codebooks=("F16", (1, 256, 1, 8)), scales=("F16", (64, 1, 1, 1))),
        _quantised("aqlm"), _NORM,
    ),
    "VPTQ": Format(
        "VPTQ",
        {f"{P}.indices": ("I32", (1, 8, 12)), f"{P}.centroids.weight": ("F16", (1, 256)),
         f"{P}.res_centroids.weight": ("F16", (1, 256)), f"{P}.weight_scale": ("F16", (64,)),
         f"{P}.weight_bias": ("F16", (64,)), f"{P}.perm": ("I16", (64,)), "model.norm.weight": ("BF16", (64,))},
        _quantised("vptq"), _NORM,
    ),
    "SpQR": Format(
        "SpQR",
        _module(dense_weights=("I64", (4, 4, 8)), row_offsets=("I32", (65,)), col_vals=("I32", (12,)),
                in_perm=("I16", (64,))),
        _quantised("spqr"), _NORM,
    ),
    "QuIP#": Format(
        "QuIP#", _module(Qidxs=("I16", (64, 8)), SU=("F16", (64,)), SV=("F16", (64,)), Wscale=("F32", ())), {}, _NORM
    ),
    "HIGGS": Format(
        "HIGGS", _module(weight=("I16", (64, 16)), scales=("F16", (64, 1)), tables=("F16", (16,))),
        _quantised("higgs"), _NORM,
    ),
    "quanto int8": Format(
        "quanto",
        {f"{P}.weight._data": ("I8", (64, 64)), f"{P}.weight._scale": ("BF16", (64, 1)),
         f"{P}.input_scale": ("F32", ()),
         "model.norm.weight": ("BF16", (64,))}, _quantised("quanto"), (*_NORM, f"{P}.input_scale"),
    ),
    "quanto int4": Format(
        "quanto",
        {f"{P}.weight._data._data": ("U8", (16, 128)), f"{P}.weight._scale": ("BF16", (32, 1)),
         f"{P}.weight._shift": ("BF16", (32, 1)), "model.norm.weight": ("BF16", (64,))}, _quantised("quanto"), _NORM,
    ),
    "torchao": Format(
        "torchao", _module(_weight_qdata=("I8", (64, 64)), _weight_scale=("BF16", (64, 1))), _quantised("torchao"),
        _NORM,
        {f"{P}.weight": json.dumps({"_type": "IntxUnpackedTensor"}), "tensor_names": json.dumps([f"{P}.weight"])},
    ),
    "MLX": Format(
        "MLX",
        _module(weight=("U32", (64, 8)), scales=("BF16", (64, 1)), biases=("BF16", (64, 1))),
        {"quantization": {"bits": 4, "group_size": 64}}, _NORM,
    ),
    "Metal": Format(
        "MLX", _module(weight=("U32", (64, 8)), scales=("BF16", (64, 1)), qbiases=("BF16", (64, 1))),
        _quantised("metal", bits=4, group_size=64), _NORM,
    ),
    "BitNet": Format(
        "BitNet", _module(weight=("U8", (16, 64)), weight_scale=("BF16", (1,))), _quantised("bitnet"), _NORM
    ),
    "codes of 4 bits": Format("NVFP4", _module(weight=("F4", (64, 64)), weight_scale=("F8_E4M3", (64, 4))), {}, _NORM),
    "codes of 6 bits": Format("F6_E2M3 with scales", _module(weight=("F6_E2M3", (64, 64)),
                                                             weight_scale=("F8_E8M0", (64, 2))), {}, _NORM),
}  # fmt: skip

_READ = {
    **dict.fromkeys((
        "fp8 per tensor", "fp8 per tensor, ComfyUI", "fp8 per row", "fp8 E5M2", "fp8, TensorRT-LLM", "fp8 blocks",
        "fp8 blocks, DeepSeek's own", "fp8, Mistral's own", "mxfp8", "mxfp8, exponents", "described by metadata",
        "nvfp4", "nvfp4, compressed-tensors", "int8",
    ), (f"{P}.weight",)),
    "fp8 experts": ("mlp.experts.gate_up_proj",), "mxfp4, gpt-oss": ("mlp.experts.down_proj",),
}  # fmt: skip
# Those whose codes are not read, and those that are decoded.
FORMATS = {name: form for name, form in _FORMATS.items() if name not in _READ}
READ_FORMATS = {name: replace(_FORMATS[name], read=read) for name, read in _READ.items()}

# Models that have scales, integers or 8-bit floats, and are not quantised.
NOT_QUANTISED: dict[str, Layout] = {
    "fp8 as a number format": {
        "double_blocks.0.img_attn.qkv.weight": ("F8_E4M3", (96, 32)),
        "double_blocks.0.img_attn.qkv.bias": ("F8_E4M3", (96,)),
        "double_blocks.0.img_attn.norm.query_norm.scale": ("F8_E4M3", (16,)), "final.scale": ("F8_E4M3", (32,)),
    },
    "Flux, norms in float32": {
        "double_blocks.0.img_attn.qkv.weight": ("F8_E4M3", (96, 32)),
        "single_blocks.0.norm.query_norm.scale": ("F32", (16,)),
        "single_blocks.0.linear1.weight": ("BF16", (96, 32)),
    },
    "scales of attention": {
        f"{P}.weight": ("BF16", (64, 64)), "model.layers.0.self_attn.k_scale": ("F32", ()),
        "model.layers.0.self_attn.v_scale": ("F32", ()), "model.layers.0.self_attn.q_scale": ("F32", ()),
        "model.layers.0.self_attn.k_proj.k_scale": ("F32", ()),
        "model.layers.0.self_attn.k_proj.weight": ("BF16", (8, 8)),
    },
    "scales of activations, beside fp8 as a number format": {
        f"{P}.weight": ("F8_E4M3", (64, 64)), f"{P}.k_scale": ("F32", ()), f"{P}.logit_scale": ("F32", ()),
        f"{P}.norm.scale": ("F32", (64,)),
    },
    "attention that calls its queries W_q": {"attn.W_q": ("F32", (8, 8)), "attn.scale": ("F32", (1,))},
    "layer scales": {
        "logit_scale": ("F32", ()), "vision.layers.0.gamma": ("F32", (64,)),
        "vision.layers.0.layer_scale": ("F32", (64,)),
        "vision.layers.0.layer_scale1.lambda1": ("F32", (64,)), "vision.layers.0.norm.weight": ("F32", (64,)),
        "vision.layers.0.norm.scale": ("F32", (64,)), "vision.layers.0.norm.scales": ("F32", (64,)),
    },
    "a convolution with scales": {
        "conv.weight": ("F32", (8, 4, 3, 3)), "conv.scales": ("F32", (8,)), "conv.scale": ("F32", (8, 1, 1, 1)),
        "conv.biases": ("F32", (8,)), "conv.weight_scale": ("F32", (8,)),
    },
    "integers": {
        "embeddings.position_ids": ("I64", (1, 77)), "bn.num_batches_tracked": ("I64", ()),
        "dictionary.hashes": ("I32", (4, 8)),
        "mask": ("BOOL", (8, 8)), "lookup.indices": ("I32", (4, 8)), "codes": ("U8", (4, 8)), "B": ("I32", (4, 4)),
        "vocab.weight": ("F32", (8, 4)), "subwords.offsets": ("U8", (12,)),
    },
    "int8 numbers without scales": {"table.weight": ("I8", (16, 4)), "norm.weight": ("BF16", (4,))},
}  # fmt: skip


def model(layout: Layout, seed: int) -> dict[str, Tensor]:
    """A model of this layout, of random bytes; floats are finite."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (dtype, shape) in layout.items():
        nbytes = DTYPES[dtype].nbytes(int(np.prod(shape))) or 0
        raw = rng.integers(0, 256, nbytes, np.uint8)
        if DTYPES[dtype].merges:
            raw &= 0x3B  # exponents and signs from 0 up to below those of Inf
        tensors[name] = Tensor(DTYPES[dtype], shape, raw)
    return tensors


def save_format(folder: Path, form: Format, seed: int, tensors: Mapping[str, Tensor] | None = None) -> str:
    """Write a model of this format, with a config.json, into a new folder. tensors: in place of random ones."""
    folder.mkdir(parents=True)
    write_file(folder / "model.safetensors", tensors or model(form.layout, seed), metadata=form.metadata)
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16", **form.config}))
    return str(folder)
