"""Matrices stored as codes with scales, in every form that is read, and the numbers that they stand for, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.dtypes import BF16, DTYPES, F8_E4M3, F16, F32, DType
from tests.support.checkpoints import Tensor, floats, integers, tensor

Numbers = NDArray[np.float32]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
ROWS, COLUMNS = 200, 320  # whole groups of 32 columns; partial blocks of 128, and partial tiles
_ROW = (1, 1 << 20)  # columns of a block: all
LARGEST = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0, "I8": 127.0}


@dataclass(frozen=True)
class Stored:
    """Tensors of one matrix, by the ends of their names, and its numbers."""

    tensors: Mapping[str, Tensor]
    numbers: Numbers


@dataclass(frozen=True)
class Encoding:
    """A form of codes. encode: matrix f64[rows, columns] -> what is stored; config: what config.json says."""

    encode: Callable[[NDArray[Any]], Stored]
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)


def spread(scales: NDArray[Any], shape: tuple[int, ...], blocks: tuple[int, int]) -> NDArray[Any]:
    """A scale for each element: of blocks in the last two dimensions."""
    every = scales.repeat(blocks[0], -2)[..., : shape[-2], :]
    return every.repeat(blocks[1], -1)[..., : shape[-1]]


def largest(x: NDArray[Any], blocks: tuple[int, int]) -> NDArray[Any]:
    """The largest magnitude of every block of the last two dimensions; those at the edges are partial."""
    (m, n), (r, c) = x.shape[-2:], blocks
    padding = [(0, 0)] * (x.ndim - 2) + [(0, -m % r), (0, -n % c)]
    whole = np.pad(np.abs(x), padding).reshape(*x.shape[:-2], -(-m // r), r, -(-n // c), c)
    return np.maximum(whole.max((-3, -1)), 1e-12)


def codes_of(x: NDArray[Any], kind: str) -> tuple[Tensor, Numbers]:
    """Codes of 8 bits, and their values."""
    if kind == "I8":
        whole = np.clip(np.rint(x), -127, 127).astype(np.int8)
        return integers(whole, "I8"), whole.astype(np.float32)
    stored = tensor(np.clip(x, -LARGEST[kind], LARGEST[kind]), DTYPES[kind])
    return stored, floats(stored).astype(np.float32).reshape(x.shape)


def exponents(x: NDArray[Any], dtype: str) -> tuple[Tensor, NDArray[Any]]:
    """Powers of two at or above x as E8M0, and their values."""
    codes = (np.ceil(np.log2(x)) + 127).astype(np.uint8)
    return Tensor(DTYPES[dtype], codes.shape, codes.reshape(-1)), np.exp2(codes.astype(np.float64) - 127)


def scaled(
    kind: str = "F8_E4M3",
    blocks: tuple[int, int] | None = None,
    scale: DType | str = F32,
    end: str = "weight_scale",
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda shape: shape,
) -> Callable[[NDArray[Any]], Stored]:
    """Codes with a scale for each block; for each matrix, if none are named. shape: in which the scales are stored."""

    def encode(x: NDArray[Any]) -> Stored:
        size = (min(blocks[0], x.shape[-2]), min(blocks[1], x.shape[-1])) if blocks else x.shape[-2:]
        wanted = largest(x, size) / LARGEST[kind]
        if isinstance(scale, str):
            scales, values = exponents(wanted, scale)
        else:
            scales = tensor(wanted, scale)
            values = floats(scales).reshape(wanted.shape)
        each = spread(values, x.shape, size)
        codes, numbers = codes_of(x / each, kind)
        stored = Tensor(scales.dtype, shape(wanted.shape), scales.raw)
        return Stored({"weight": codes, end: stored}, numbers * each.astype(np.float32))

    return encode


def packed(x: NDArray[Any]) -> tuple[NDArray[np.uint8], Numbers]:
    """The nearest E2M1 codes, a byte each, and their values."""
    codes = np.abs(x[..., None] - E2M1).argmin(-1).astype(np.uint8)
    return codes, E2M1[codes]


def bytes_of(codes: NDArray[np.uint8], high_first: bool = False) -> NDArray[np.uint8]:
    """Two codes of four bits in a byte."""
    first, second = codes[..., ::2], codes[..., 1::2]
    return (first << 4 | second) if high_first else (second << 4 | first)


def in_tiles(scales: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Scales [rows, columns] as ComfyUI stores them: in tiles of 128 x 4, padded."""
    rows, columns = scales.shape
    whole = np.pad(scales, [(0, -rows % 128), (0, -columns % 4)])
    tiles = whole.reshape(whole.shape[0] // 128, 4, 32, whole.shape[1] // 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(whole.shape)


def mxfp4(x: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Numbers]:
    """Bytes [..., columns/2], exponents [..., columns/32], and the numbers."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    scales, values = exponents(np.maximum(np.abs(groups).max(-1), 1e-12) / 6, "U8")
    codes, numbers = packed(groups / values[..., None])
    numbers = numbers * values[..., None].astype(np.float32)
    return bytes_of(codes.reshape(x.shape)), scales.raw.reshape(scales.shape), numbers.reshape(x.shape)


def _mxfp4_packed(x: NDArray[Any]) -> Stored:
    codes, scales, numbers = mxfp4(x)
    return Stored({"weight_packed": integers(codes, "U8"), "weight_scale": integers(scales, "U8")}, numbers)


def _mxfp4_bytes(x: NDArray[Any]) -> Stored:
    codes, scales, numbers = mxfp4(x)
    stored = Tensor(DTYPES["F8_E8M0"], scales.shape, scales.reshape(-1))
    return Stored({"weight": integers(codes.view(np.int8), "I8"), "scale": stored}, numbers)


def nvfp4(form: str) -> Callable[[NDArray[Any]], Stored]:
    """form: `ModelOpt`, `compressed-tensors` or `ComfyUI`"""

    def encode(x: NDArray[Any]) -> Stored:
        groups = x.reshape(*x.shape[:-1], -1, 16)
        second = np.float32(np.abs(x).max() / (6 * 448))
        divides = form == "compressed-tensors"
        stored_second = np.float32(1 / second) if divides else second
        scales = tensor(np.maximum(np.abs(groups).max(-1) / 6 / second, 2.0**-9), F8_E4M3)
        first = floats(scales).astype(np.float32).reshape(scales.shape)
        each = first / stored_second if divides else first * stored_second
        codes, numbers = packed(groups / each[..., None])
        numbers = (numbers * each[..., None]).reshape(x.shape)
        raw = bytes_of(codes.reshape(x.shape), form == "ComfyUI")
        if form == "ComfyUI":
            tiled = in_tiles(scales.raw.reshape(scales.shape))
            scales = Tensor(F8_E4M3, tiled.shape, tiled.reshape(-1))
        names = ("weight_packed", "weight_global_scale") if divides else ("weight", "weight_scale_2")
        shape = (1,) if divides else ()
        stored = {names[0]: integers(raw, "U8"), "weight_scale": scales, names[1]: tensor(stored_second, F32, shape)}
        return Stored({**stored, **(described("nvfp4") if form == "ComfyUI" else {})}, numbers)

    return encode


def described(form: str, **more: Any) -> dict[str, Tensor]:
    """ComfyUI's description of a layer."""
    import json

    text = json.dumps({"format": form, **more}).encode()
    return {"comfy_quant": integers(np.frombuffer(text, np.uint8), "U8")}


def _comfy(encode: Callable[[NDArray[Any]], Stored], form: str, **more: Any) -> Callable[[NDArray[Any]], Stored]:
    def described_too(x: NDArray[Any]) -> Stored:
        stored = encode(x)
        return Stored({**stored.tensors, **described(form, **more)}, stored.numbers)

    return described_too


def _mxfp8_in_tiles(x: NDArray[Any]) -> Stored:
    stored = scaled(blocks=(1, 32), scale="U8")(x)
    scales = stored.tensors["weight_scale"]
    tiled = in_tiles(scales.raw.reshape(scales.shape))
    of_tiles = Tensor(scales.dtype, tiled.shape, tiled.reshape(-1))
    return Stored({**stored.tensors, "weight_scale": of_tiles, **described("mxfp8")}, stored.numbers)


def _marked(x: NDArray[Any]) -> Stored:
    stored = scaled(end="scale_weight", shape=lambda _: ())(x)
    return Stored({**stored.tensors, "scale_input": tensor(1.0, F32, ())}, stored.numbers)


def said(method: str, **more: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **more}}


def _groups(**weights: Any) -> dict[str, Any]:
    return said("compressed-tensors", config_groups={"group_0": {"targets": ["Linear"], "weights": weights}})


_FP8 = said("fp8", weight_block_size=[128, 128])
ENCODINGS: dict[str, Encoding] = {
    "fp8, one scale": Encoding(scaled(shape=lambda _: ()), said("modelopt")),
    "fp8, one scale [1]": Encoding(scaled(shape=lambda _: (1,))),
    "fp8, one scale [1, 1]": Encoding(scaled()),
    "fp8, ComfyUI": Encoding(_marked),
    "fp8, ComfyUI, described": Encoding(_comfy(scaled(shape=lambda _: ()), "float8_e4m3fn")),
    "fp8 E5M2, ComfyUI, described": Encoding(_comfy(scaled("F8_E5M2", shape=lambda _: ()), "float8_e5m2")),
    "fp8, Mistral": Encoding(scaled(end="qscale_weight", shape=lambda _: ())),
    "fp8 rows": Encoding(scaled(blocks=_ROW), _groups(strategy="channel")),
    "fp8 rows, BF16": Encoding(scaled(blocks=_ROW, scale=BF16)),
    "fp8 rows, a vector of F16": Encoding(scaled(blocks=_ROW, scale=F16, shape=lambda s: s[:1])),
    "fp8 columns": Encoding(scaled(blocks=(ROWS, 1))),
    "fp8 blocks": Encoding(scaled(blocks=(128, 128), end="weight_scale_inv"), _FP8),
    "fp8 blocks, nothing said": Encoding(scaled(blocks=(128, 128), end="weight_scale_inv")),
    "fp8 blocks of 48 x 80": Encoding(
        scaled(blocks=(48, 80), end="weight_scale_inv"), said("fp8", weight_block_size=[48, 80])
    ),
    "fp8 blocks, exponents": Encoding(scaled(blocks=(128, 128), scale="F8_E8M0", end="scale"), _FP8),
    "fp8 blocks, exponents as bytes": Encoding(scaled(blocks=(128, 128), scale="U8", end="weight_scale_inv"), _FP8),
    "fp8 blocks, BF16": Encoding(scaled(blocks=(128, 128), scale=BF16), _groups(block_structure=[128, 128])),
    "fp8 blocks, ModelOpt": Encoding(
        scaled(blocks=(128, 128), shape=lambda s: (s[0], 1, s[1], 1)), said("modelopt", quant_algo="FP8_PB_WO")
    ),
    "fp8 E5M2 blocks": Encoding(scaled("F8_E5M2", (128, 128), end="weight_scale_inv"), _FP8),
    "mxfp8": Encoding(scaled(blocks=(1, 32), scale="U8")),
    "mxfp8, E8M0": Encoding(scaled(blocks=(1, 32), scale="F8_E8M0")),
    "mxfp8, ComfyUI": Encoding(_mxfp8_in_tiles),
    "int8, one scale": Encoding(scaled("I8", shape=lambda _: (1,)), _groups(strategy="tensor")),
    "int8 rows": Encoding(scaled("I8", _ROW), _groups(strategy="channel")),
    "int8 rows, BF16": Encoding(scaled("I8", _ROW, BF16)),
    "int8 groups": Encoding(scaled("I8", (1, 32)), _groups(strategy="group", group_size=32)),
    "int8, ComfyUI": Encoding(_comfy(scaled("I8", _ROW), "int8_tensorwise")),
    "mxfp4, compressed-tensors": Encoding(_mxfp4_packed, _groups(strategy="group", group_size=32)),
    "mxfp4, DeepSeek": Encoding(_mxfp4_bytes, said("fp8", weight_block_size=[128, 128], expert_dtype="fp4")),
    "nvfp4, ModelOpt": Encoding(nvfp4("ModelOpt"), said("modelopt", quant_algo="NVFP4")),
    "nvfp4, compressed-tensors": Encoding(nvfp4("compressed-tensors"), _groups(strategy="tensor_group", group_size=16)),
    "nvfp4, ComfyUI": Encoding(nvfp4("ComfyUI")),
}
