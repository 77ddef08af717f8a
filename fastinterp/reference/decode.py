"""Decoders in numpy: the definition of what csrc/decoder.cpp's do, one per row of its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# (codes u8[bytes], companions each u8[bytes], parameters, numel, columns) -> f32[numel]. Every operation is float32 and
# rounded once to nearest even, in the order that docs/NUMERICS.md states for the format; nothing is fused.
Decode = Callable[[NDArray[np.uint8], Sequence[NDArray[np.uint8]], Sequence[float], int, int], NDArray[np.float32]]

# By the name of the decoder. A new format adds its row.
DECODERS: dict[str, Decode] = {}


def decode(
    name: str,
    codes: NDArray[Any],
    companions: Sequence[NDArray[Any]],
    parameters: Sequence[float],
    numel: int,
    columns: int,
) -> NDArray[np.float32]:
    """The float32 numbers of an encoded tensor.

    codes, companions  stored bytes
    columns            length of a row
    """
    numbers = DECODERS[name](
        codes.reshape(-1).view(np.uint8), [c.reshape(-1).view(np.uint8) for c in companions], parameters, numel, columns
    )
    return numbers.reshape(numel)
