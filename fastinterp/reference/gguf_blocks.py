"""Decoders of GGUF's blocks in numpy, rule 17 of docs/NUMERICS.md: f32[blocks, elements] of u8[blocks, bytes].

Every operation is float32, rounded once to nearest even.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Blocks = NDArray[np.uint8]
Numbers = NDArray[np.float32]

# What the 16 codes of IQ4_NL and IQ4_XS are.
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# Twice what the 16 codes of E2M1 are, as whole numbers: that of 8 is 0, not -0.
DOUBLED_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _f16(blocks: Blocks, at: int) -> Numbers:
    """f32[blocks, 1]: the F16 numbers at this byte."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _bits(raw: Blocks, width: int, group: int) -> NDArray[np.int32]:
    """Values of `width` bits: the lowest of each of `group` bytes, then the next of these, and so on."""
    shifts = np.arange(0, 8, width).reshape(1, 1, -1, 1)
    values = raw.reshape(len(raw), -1, 1, group).astype(np.int32) >> shifts
    return (values & ((1 << width) - 1)).reshape(len(raw), -1)


def _each(scales: NDArray[np.float32], count: int) -> Numbers:
    """A scale for each element, of scales of `count` neighbours."""
    return np.repeat(scales, count, axis=1)


def q8_0(blocks: Blocks) -> Numbers:
    numbers: Numbers = blocks[:, 2:].view(np.int8).astype(np.float32) * _f16(blocks, 0)
    return numbers


def q4_0(blocks: Blocks) -> Numbers:
    numbers: Numbers = _f16(blocks, 0) * (_bits(blocks[:, 2:], 4, 16) - 8).astype(np.float32)
    return numbers


def q4_1(blocks: Blocks) -> Numbers:
    numbers: Numbers = _f16(blocks, 0) * _bits(blocks[:, 4:], 4, 16).astype(np.float32) + _f16(blocks, 2)
    return numbers


def q5_0(blocks: Blocks) -> Numbers:
    codes = _bits(blocks[:, 6:], 4, 16) | _bits(blocks[:, 2:6], 1, 1) << 4
    numbers: Numbers = _f16(blocks, 0) * (codes - 16).astype(np.float32)
    return numbers


def q5_1(blocks: Blocks) -> Numbers:
    codes = _bits(blocks[:, 8:], 4, 16) | _bits(blocks[:, 4:8], 1, 1) << 4
    numbers: Numbers = _f16(blocks, 0) * codes.astype(np.float32) + _f16(blocks, 2)
    return numbers


def iq4_nl(blocks: Blocks) -> Numbers:
    numbers: Numbers = _f16(blocks, 0) * IQ4[_bits(blocks[:, 2:], 4, 16)]
    return numbers


def mxfp4(blocks: Blocks) -> Numbers:
    exponents = blocks[:, :1].astype(np.int32)
    numbers: Numbers = np.ldexp(np.float32(1), exponents - 128) * DOUBLED_E2M1[_bits(blocks[:, 1:], 4, 16)]
    return numbers


def q2_k(blocks: Blocks) -> Numbers:
    scales = _f16(blocks, 80) * (blocks[:, :16] & 15).astype(np.float32)
    least = _f16(blocks, 82) * (blocks[:, :16] >> 4).astype(np.float32)
    numbers: Numbers = _each(scales, 16) * _bits(blocks[:, 16:80], 2, 32).astype(np.float32) - _each(least, 16)
    return numbers


def q3_k(blocks: Blocks) -> Numbers:
    scales = (_bits(blocks[:, 96:104], 4, 8) | _bits(blocks[:, 104:108], 2, 4) << 4) - 32
    codes = (_bits(blocks[:, 32:96], 2, 32) | _bits(blocks[:, :32], 1, 32) << 2) - 4
    each = _each(_f16(blocks, 108) * scales.astype(np.float32), 16)
    numbers: Numbers = each * codes.astype(np.float32)
    return numbers


def _from_groups(blocks: Blocks, codes: NDArray[np.int32]) -> Numbers:
    """Eight groups of 32 codes, with scales and least values of six bits in bytes 4 to 16."""
    low, middle, high = (blocks[:, at : at + 4].astype(np.int32) for at in (4, 8, 12))
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6) << 4], axis=1)
    least = np.concatenate([middle & 63, high >> 4 | (middle >> 6) << 4], axis=1)
    d = _each(_f16(blocks, 0) * scales.astype(np.float32), 32)
    numbers: Numbers = d * codes.astype(np.float32) - _each(_f16(blocks, 2) * least.astype(np.float32), 32)
    return numbers


def q4_k(blocks: Blocks) -> Numbers:
    return _from_groups(blocks, _bits(blocks[:, 16:], 4, 32))


def q5_k(blocks: Blocks) -> Numbers:
    return _from_groups(blocks, _bits(blocks[:, 48:], 4, 32) | _bits(blocks[:, 16:48], 1, 32) << 4)


def q6_k(blocks: Blocks) -> Numbers:
    codes = (_bits(blocks[:, :128], 4, 64) | _bits(blocks[:, 128:192], 2, 32) << 4) - 32
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    numbers: Numbers = _each(_f16(blocks, 208) * scales, 16) * codes.astype(np.float32)
    return numbers


def iq4_xs(blocks: Blocks) -> Numbers:
    scales = (_bits(blocks[:, 4:8], 4, 1) | _bits(blocks[:, 2:4], 2, 1) << 4) - 32
    each = _each(_f16(blocks, 0) * scales.astype(np.float32), 32)
    numbers: Numbers = each * IQ4[_bits(blocks[:, 8:], 4, 16)]
    return numbers
