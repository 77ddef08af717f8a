"""Encoders in numpy: the definition of what csrc/encoder.cpp's do, rule 17 of docs/NUMERICS.md.

Every operation is float32 and rounded once to nearest even. What is encoded is a float32 tensor: the sums as they are
stored in F32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, DType
from fastinterp.reference.combine import narrow, widen

Array = NDArray[Any]

# What the largest number of a block becomes.
LARGEST = {"scaled_f8_e4m3": 448.0, "scaled_f8_e5m2": 57344.0, "scaled_i8": 127.0}
_FLOATS = {"scaled_f8_e4m3": F8_E4M3, "scaled_f8_e5m2": F8_E5M2}
_SCALES: dict[int, DType] = {0: F32, 1: F16, 2: BF16}  # kind -> dtype; kind 3 is E8M0
_E8M0 = 3


def encode(name: str, x: Array, columns: int, parameters: Sequence[int] = ()) -> tuple[Array, Array]:
    """The stored bytes of a tensor.

    x           f32[numel]
    columns     length of a row
    parameters  as in Encoder of ops/operands.py
    Returns u8[bytes] of codes and u8[bytes] of scales, which are among the codes in q8_0.
    """
    x = np.ascontiguousarray(x, np.float32).reshape(-1)
    if name == "q8_0":
        return _q8_0(x), np.zeros(0, np.uint8)
    kind, block_rows, block_columns, rows, *more = parameters
    power_of_two = kind == _E8M0 or bool(more and more[0])
    matrices = x.reshape(-1, rows, columns)
    down, across = -(-rows // block_rows), -(-columns // block_columns)
    padding = ((0, 0), (0, down * block_rows - rows), (0, across * block_columns - columns))
    blocks = np.pad(matrices, padding).reshape(-1, down, block_rows, across, block_columns)
    magnitudes = np.abs(blocks)
    if name in _FLOATS:  # codes of NaN and Inf are these, whatever the scale
        magnitudes = np.where(np.isfinite(blocks), magnitudes, np.float32(0))
    stored, scales = _scales(magnitudes.max(axis=(2, 4)), LARGEST[name], kind, power_of_two)
    with np.errstate(all="ignore"):
        quotients = (blocks / scales[:, :, None, :, None]).reshape(-1, down * block_rows, across * block_columns)
    divided: Array = quotients[:, :rows, :columns].reshape(-1)
    if name in _FLOATS:
        return narrow(divided, _FLOATS[name]).view(np.uint8), stored
    limited = np.clip(np.where(np.isnan(divided), 0, divided), -127, 127)
    return np.rint(limited).astype(np.int8).view(np.uint8), stored


def _scales(largest: Array, codes: float, kind: int, power_of_two: bool) -> tuple[Array, Array]:
    """Scales of blocks, from their largest magnitudes: as they are stored, u8[bytes]; and f32, as codes are divided."""
    with np.errstate(all="ignore"):
        scales = np.where(largest == 0, np.float32(1), largest / np.float32(codes)).astype(np.float32)
    finite = np.isfinite(largest)
    if power_of_two:
        # scale = fraction * 2^exponent, 0.5 <= fraction < 1; what was rounded to 0 is not 0
        fractions, exponents = np.frexp(np.where(finite, np.maximum(scales, np.float32(2.0**-149)), 1))
        exponents = np.maximum(exponents - (fractions == 0.5), -127)
        scales = np.where(finite, np.ldexp(np.float32(1), exponents), np.float32(np.nan)).astype(np.float32)
        if kind == _E8M0:
            return np.where(finite, exponents + 127, 255).astype(np.uint8).reshape(-1), scales
    dtype = _SCALES[kind]
    assert dtype.layout is not None
    codes_of_scales = narrow(np.where(finite, scales, np.float32(np.nan)).reshape(-1), dtype)
    limited = np.clip(codes_of_scales, 1, dtype.layout.largest)
    bits = np.where(finite.reshape(-1), limited, codes_of_scales).astype(codes_of_scales.dtype).view(np.uint8)
    return bits, widen(bits, dtype).reshape(scales.shape)


def _q8_0(x: Array) -> Array:
    """Blocks of 32: the scale as F16, then int8 codes."""
    blocks = x.reshape(-1, 32)
    with np.errstate(all="ignore"):
        scales = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        reciprocals = np.where(scales == 0, np.float32(0), np.float32(1) / scales).astype(np.float32)
        products = blocks * reciprocals
    products = np.where(np.isfinite(products), products, 0)
    whole = np.floor(np.abs(products))
    codes = np.sign(products) * (whole + (np.abs(products) - whole >= 0.5))
    stored = narrow(scales.reshape(-1), F16).view(np.uint8).reshape(-1, 2)
    return np.concatenate([stored, codes.astype(np.int8).view(np.uint8)], axis=1).reshape(-1)
