"""Decoders in numpy: the definition of what those of csrc/decoders/ do, one per row of its table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.reference import gguf_blocks

# (codes u8[bytes], companions each u8[bytes], parameters, numel, columns) -> f32[numel]. Every operation is float32 and
# rounded once to nearest even, in the order that docs/NUMERICS.md states for the format; nothing is fused.
Decode = Callable[[NDArray[np.uint8], Sequence[NDArray[np.uint8]], Sequence[float], int, int], NDArray[np.float32]]

Numbers = NDArray[np.float32]
Codes = NDArray[np.uint8]

# --- codes of few bits -----------------------------------------------------------------------------------------------


def _small_floats(codes: Codes, mantissa: int, bias: int, infinite: int, nan: int) -> Numbers:
    """Floats of 8 bits, exactly. infinite, nan: magnitudes from which on a code is Inf, NaN."""
    magnitude = codes & 0x7F
    exponent, fraction = (
        (magnitude >> mantissa).astype(np.int32),
        (magnitude & ((1 << mantissa) - 1)).astype(np.float32),
    )
    normal = exponent > 0
    significand = np.where(normal, 1 + fraction / (1 << mantissa), fraction / (1 << mantissa)).astype(np.float32)
    number = np.ldexp(significand, np.where(normal, exponent, 1) - bias).astype(np.float32)
    number = np.where(magnitude >= infinite, np.float32(np.inf), number)
    number = np.where(magnitude >= nan, np.float32(np.nan), number)
    return np.where(codes & 0x80, -number, number).astype(np.float32)


def e4m3(codes: Codes) -> Numbers:
    """F8_E4M3: no Inf, and 7F and FF are NaN."""
    return _small_floats(codes, 3, 7, 0x7F, 0x7F)


def e5m2(codes: Codes) -> Numbers:
    return _small_floats(codes, 2, 15, 0x7C, 0x7D)


def i8(codes: Codes) -> Numbers:
    return codes.view(np.int8).astype(np.float32)


def e8m0(codes: Codes) -> Numbers:
    """2^(code - 127); 255 is NaN."""
    powers = np.ldexp(np.float32(1), codes.astype(np.int32) - 127).astype(np.float32)
    return np.where(codes == 255, np.float32(np.nan), powers).astype(np.float32)


# --- code * scale ----------------------------------------------------------------------------------------------------

# By the first parameter.
SCALES: tuple[Callable[[Codes], Numbers], ...] = (
    lambda raw: raw.view(np.float32),
    lambda raw: raw.view(np.float16).astype(np.float32),
    lambda raw: (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32),
    e8m0,
)


def _scaled(widen: Callable[[Codes], Numbers]) -> Decode:
    """Codes of one byte, with a scale for each block of a matrix.

    companions  scales [matrices, ceil(rows / block_rows), ceil(columns / block_columns)]
    parameters  dtype of the scales (an index of SCALES), block_rows, block_columns, rows of a matrix; and perhaps
                1 if scales of one byte lie in tiles, of blocks of one row in one matrix
    """

    def decode(
        codes: Codes, companions: Sequence[Codes], parameters: Sequence[float], numel: int, columns: int
    ) -> Numbers:
        kind, block_rows, block_columns, rows, tiled = (*(int(p) for p in parameters), 0)[:5]
        raw = companions[0]
        if tiled:
            raw = from_tiles(raw, rows, -(-columns // block_columns))
        scales = SCALES[kind](raw).reshape(-1, -(-rows // block_rows), -(-columns // block_columns))
        row, column = np.divmod(np.arange(numel), columns)
        each: Numbers = scales[row // rows, row % rows // block_rows, column // block_columns]
        numbers: Numbers = widen(codes[:numel]) * each
        return numbers

    return decode


def from_tiles(raw: Codes, rows: int, columns: int) -> Codes:
    """Scales of one byte, row after row, of those that lie in tiles of 128 rows and 4 columns, padded at both edges.

    In a tile, rows that are 32 apart lie beside each other: 16 bytes for rows i, i + 32, i + 64, i + 96.
    """
    tiles = raw.reshape(-(-rows // 128), -(-columns // 4), 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(-(-rows // 128) * 128, -1)[:rows, :columns].reshape(-1)


# --- blocks of few bits ----------------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)  # by code


def e2m1(packed: Codes, high_first: bool = False) -> Numbers:
    """Two codes in a byte, the low half first or the high half."""
    halves = (packed & 15, packed >> 4)
    return E2M1[np.stack(halves[::-1] if high_first else halves, -1).reshape(-1)]


def _mxfp4(codes: Codes, companions: Sequence[Codes], parameters: Sequence[float], numel: int, columns: int) -> Numbers:
    """Blocks of 32 E2M1 codes with an E8M0 scale: the companion."""
    numbers: Numbers = e2m1(codes).reshape(-1, 32) * e8m0(companions[0])[:, None]
    return numbers


def _mxfp4_transposed(
    codes: Codes, companions: Sequence[Codes], parameters: Sequence[float], numel: int, columns: int
) -> Numbers:
    """What is stored is the transpose of each matrix, as `mxfp4`. parameters: rows of a matrix."""
    rows = int(parameters[0])
    return _mxfp4(codes, companions, (), numel, rows).reshape(-1, columns, rows).transpose(0, 2, 1)


def _nvfp4(codes: Codes, companions: Sequence[Codes], parameters: Sequence[float], numel: int, columns: int) -> Numbers:
    """Blocks of 16 E2M1 codes, with an E4M3 scale each, and a scale for the matrix.

    companions  scales of blocks F8_E4M3, scales of matrices F32
    parameters  1 if the scale of a block is divided by that of the matrix (0: multiplied), number of matrices; and
                perhaps 1 if the high half of a byte comes first, 1 if scales of blocks lie in tiles
    """
    divides, matrices, high_first, tiled = (*(int(p) for p in parameters), 0, 0)[:4]
    raw, of_matrix = companions[0], companions[1].view(np.float32)[:, None]
    if tiled:
        raw = from_tiles(raw, numel // columns, columns // 16)
    scales = e4m3(raw).reshape(matrices, -1)
    scales = scales / of_matrix if divides else scales * of_matrix
    numbers: Numbers = e2m1(codes, bool(high_first)).reshape(-1, 16) * scales.reshape(-1, 1)
    return numbers


def _blocks(of_blocks: Callable[[Codes], Numbers], nbytes: int) -> Decode:
    """Blocks of GGUF files, of so many bytes."""

    def decode(
        codes: Codes, companions: Sequence[Codes], parameters: Sequence[float], numel: int, columns: int
    ) -> Numbers:
        return of_blocks(codes.reshape(-1, nbytes)).reshape(-1)

    return decode


# By the name of the decoder. A new format adds its row.
DECODERS: dict[str, Decode] = {
    "scaled_f8_e4m3": _scaled(e4m3),
    "scaled_f8_e5m2": _scaled(e5m2),
    "scaled_i8": _scaled(i8),
    "mxfp4": _mxfp4,
    "mxfp4_transposed": _mxfp4_transposed,
    "nvfp4": _nvfp4,
    "q8_0": _blocks(gguf_blocks.q8_0, 34),
    "q4_0": _blocks(gguf_blocks.q4_0, 18),
    "q4_1": _blocks(gguf_blocks.q4_1, 20),
    "q5_0": _blocks(gguf_blocks.q5_0, 22),
    "q5_1": _blocks(gguf_blocks.q5_1, 24),
    "iq4_nl": _blocks(gguf_blocks.iq4_nl, 18),
    "gguf_mxfp4": _blocks(gguf_blocks.mxfp4, 17),
    "q2_k": _blocks(gguf_blocks.q2_k, 84),
    "q3_k": _blocks(gguf_blocks.q3_k, 110),
    "q4_k": _blocks(gguf_blocks.q4_k, 144),
    "q5_k": _blocks(gguf_blocks.q5_k, 176),
    "q6_k": _blocks(gguf_blocks.q6_k, 210),
    "iq4_xs": _blocks(gguf_blocks.iq4_xs, 136),
}


def decode(
    name: str,
    codes: NDArray[Any],
    companions: Sequence[NDArray[Any]],
    parameters: Sequence[float],
    numel: int,
    columns: int,
) -> NDArray[np.float32]:
    """The float32 numbers of an encoded tensor; every NaN is 7FC00000.

    codes, companions  stored bytes
    columns            length of a row
    """
    raw = [c.reshape(-1).view(np.uint8) for c in companions]
    with np.errstate(all="ignore"):  # overflow gives Inf; Inf * 0 gives NaN
        numbers = DECODERS[name](codes.reshape(-1).view(np.uint8), raw, parameters, numel, columns)
    return np.where(np.isnan(numbers), np.float32(np.nan), numbers).astype(np.float32).reshape(numel)
