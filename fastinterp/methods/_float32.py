"""Thresholds as float32 bits: the bounds of masks and scores."""

from __future__ import annotations

import math
import struct

from fastinterp.ops.requests import ALL_BITS

_INFINITE = 0x7F800000


def bits_from(threshold: float) -> int:
    """Of the smallest float32 that is not below a threshold >= 0. NaN: more than any bits, nothing passes."""
    return ALL_BITS + 1 if math.isnan(threshold) else _bits(threshold, strict=False)


def bits_above(threshold: float) -> int:
    """Of the smallest float32 that is above a threshold >= 0."""
    return _bits(threshold, strict=True)


def _bits(threshold: float, strict: bool) -> int:
    try:
        bits: int = struct.unpack("<I", struct.pack("<f", threshold))[0]  # the nearest float32
    except OverflowError:
        return _INFINITE
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    return bits + 1 if value < threshold or (strict and value == threshold) else bits
