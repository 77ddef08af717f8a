"""Encoded tensors of every decoder of the engine, with the numbers that they are: made here without the reference.

Codes are widened by ml_dtypes, scales are spread out by indices, and a product is that of float64, which is exact,
rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Raw = NDArray[np.uint8]
Numbers = NDArray[np.float32]

# By the first parameter of the decoders of scaled codes.
SCALE_DTYPES: tuple[Any, ...] = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu)
CODES = {"scaled_f8_e4m3": ml_dtypes.float8_e4m3fn, "scaled_f8_e5m2": ml_dtypes.float8_e5m2, "scaled_i8": np.int8}
SPECIALS = [0.0, -0.0, 1.0, -3.0, np.inf, -np.inf, np.nan, 2.0**-149, -(2.0**-130), 2.0**-126, 2.0**119, 3.3e38, 1e-30]


@dataclass(frozen=True, eq=False)
class Codes:
    """One encoded tensor.

    companions  stored bytes of each
    want        float32, as bits: every NaN is 7FC00000
    """

    name: str
    shape: tuple[int, ...]
    raw: Raw
    companions: list[Raw]
    parameters: tuple[float, ...]
    want: NDArray[np.uint32] = field(default_factory=lambda: np.empty(0, np.uint32), repr=False)

    def __str__(self) -> str:
        return f"{self.name}-{'x'.join(map(str, self.shape))}-{self.parameters}".replace(" ", "")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        return self.shape[-1] if len(self.shape) > 1 else self.numel

    @property
    def bytes(self) -> int:
        return self.raw.size + sum(c.size for c in self.companions)


def times(a: Any, b: Any) -> Numbers:
    with np.errstate(all="ignore"):
        product: Numbers = (np.asarray(a, np.float64) * np.asarray(b, np.float64)).astype(np.float32)
    return product


def bits(numbers: Any) -> NDArray[np.uint32]:
    flat = np.ascontiguousarray(numbers, np.float32).reshape(-1)
    return np.where(np.isnan(flat), np.uint32(0x7FC00000), flat.view(np.uint32))


def table(count: int) -> Raw:
    """All codes of a byte, again and again, in another order each time."""
    rounds = np.random.default_rng(count).permuted(
        np.tile(np.arange(256, dtype=np.uint8), (-(-count // 256), 1)), axis=1
    )
    return np.ascontiguousarray(rounds.reshape(-1)[:count])


def floats(count: int, dtype: Any, rng: np.random.Generator) -> Any:
    """Scales, special ones among them: of one byte, all that there are."""
    if np.dtype(dtype).itemsize == 1:
        return table(count).view(dtype)
    numbers = rng.lognormal(-6, 3, count)
    numbers[:: 3 if count > 40 else 2] = rng.choice(SPECIALS, numbers[:: 3 if count > 40 else 2].size)
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32).astype(dtype)


def raw(values: Any) -> Raw:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def in_tiles(scales: Raw) -> Raw:
    """Scales [rows, columns] of one byte as cuBLAS reads them: tiles of 128 rows and 4 columns, element by element."""
    rows, columns = scales.shape
    tiled = np.full((-(-rows // 128), -(-columns // 4), 32, 4, 4), 0x7F, np.uint8)
    for r in range(rows):
        for c in range(columns):
            tiled[r // 128, c // 4, r % 32, r % 128 // 32, c % 4] = scales[r, c]
    return tiled.reshape(-1)


# --- the decoders ----------------------------------------------------------------------------------------------------


def scaled(
    name: str, shape: tuple[int, ...], kind: int, block: tuple[int, int], rows: int, *, tiled: bool = False
) -> Codes:
    columns, all_rows = (shape[-1], math.prod(shape[:-1])) if len(shape) > 1 else (shape[0], 1)
    rng = np.random.default_rng([all_rows, columns, kind, *block])
    codes = table(all_rows * columns)
    grid = (all_rows // rows, -(-rows // block[0]), -(-columns // block[1]))
    scales = floats(math.prod(grid), SCALE_DTYPES[kind], rng).reshape(grid)
    numbers = np.empty((all_rows // rows, rows, columns), np.float32)
    values = codes.view(CODES[name]).astype(np.float32).reshape(numbers.shape)
    for m in range(grid[0]):
        each = np.repeat(np.repeat(scales[m].astype(np.float32), block[0], 0)[:rows], block[1], 1)[:, :columns]
        numbers[m] = times(values[m], each)
    stored = in_tiles(raw(scales).reshape(rows, -1)) if tiled else raw(scales)
    parameters = (kind, *block, rows, *([1] if tiled else []))
    return Codes(name, shape, codes, [stored], parameters, bits(numbers))


def _e2m1(packed: Raw, high_first: bool = False) -> Numbers:
    pair = [packed & 15, packed >> 4]
    return np.stack(pair[::-1] if high_first else pair, -1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def mxfp4(shape: tuple[int, ...]) -> Codes:
    numel = math.prod(shape)
    packed, scales = table(numel // 2), table(numel // 32)
    numbers = times(_e2m1(packed).reshape(-1, 32), scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)[:, None])
    return Codes("mxfp4", shape, packed, [scales], (), bits(numbers))


def mxfp4_transposed(shape: tuple[int, int, int]) -> Codes:
    """shape: of the numbers, [matrices, rows, columns]."""
    matrices, rows, columns = shape
    stored = mxfp4((matrices, columns, rows))
    numbers = stored.want.reshape(matrices, columns, rows).transpose(0, 2, 1)
    want = np.ascontiguousarray(numbers).reshape(-1)
    return Codes("mxfp4_transposed", shape, stored.raw, stored.companions, (rows,), want)


def nvfp4(shape: tuple[int, ...], divides: bool, matrices: int = 1, *layout: bool) -> Codes:
    numel, columns = math.prod(shape), shape[-1]
    high_first, tiled = layout or (False, False)
    packed, scales = table(numel // 2), table(numel // 16)
    of_matrix = floats(matrices, np.float32, np.random.default_rng(numel))
    with np.errstate(all="ignore"):
        blocks = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32).reshape(matrices, -1)
        exact = blocks / of_matrix.astype(np.float64)[:, None] if divides else times(blocks, of_matrix[:, None])
    if divides:
        exact = divided(blocks, of_matrix[:, None])
    numbers = times(_e2m1(packed, high_first).reshape(-1, 16), exact.reshape(-1, 1))
    stored = in_tiles(scales.reshape(-1, columns // 16)) if tiled else scales
    parameters = (float(divides), matrices, *map(float, layout))
    return Codes("nvfp4", shape, packed, [stored, raw(of_matrix)], parameters, bits(numbers))


def divided(a: Numbers, b: Numbers) -> Numbers:
    """Rounded once, as IEEE says: a quotient of float64 of two float32 is never so near to a tie that it matters."""
    with np.errstate(all="ignore"):
        quotient: Numbers = (a.astype(np.float64) / b.astype(np.float64)).astype(np.float32)
    return quotient


def q8_0(shape: tuple[int, ...]) -> Codes:
    blocks = math.prod(shape) // 32
    scales, codes = floats(blocks, np.float16, np.random.default_rng(blocks)), table(32 * blocks).reshape(-1, 32)
    numbers = times(codes.view(np.int8), scales.astype(np.float32)[:, None])
    return Codes("q8_0", shape, raw(np.hstack([raw(scales).reshape(-1, 2), codes])), [], (), bits(numbers))


def every() -> Iterator[Codes]:
    """Each decoder with whole and partial blocks, one and several matrices, scales of each dtype."""
    for name in CODES:
        for kind in range(4):
            yield scaled(name, (300, 257), kind, (128, 128), 300)  # partial blocks at both edges
            yield scaled(name, (6, 50, 33), kind, (16, 7), 50)  # several matrices
            yield scaled(name, (70, 33), kind, (1, 33), 70)  # by row
            yield scaled(name, (2, 40, 96), kind, (40, 96), 40)  # by matrix
        yield scaled(name, (2, 40, 96), 0, (80, 96), 80)  # one of all
        yield scaled(name, (4099,), 0, (1, 4099), 1)  # of one dimension
        yield scaled(name, (1, 1), 0, (1, 1), 1)
        yield scaled(name, (50, 1), 0, (4, 1), 50)
        yield scaled(name, (19, 7), 0, (19, 1), 19)  # by column
        yield scaled(name, (300, 300), 0, (1, 1), 300)  # more than is held of scales
        yield scaled(name, (300, 300), 0, (2, 1), 300)
    yield scaled("scaled_f8_e4m3", (300, 96), 3, (1, 32), 300)
    yield scaled("scaled_f8_e4m3", (130, 100), 3, (1, 32), 130, tiled=True)
    for shape in ((1, 32), (300, 96), (3, 7, 160)):
        yield mxfp4(shape)
        yield q8_0(shape)
    for matrices in ((1, 32, 1), (3, 32, 5), (2, 96, 130), (5, 64, 64), (2, 160, 33)):
        yield mxfp4_transposed(matrices)
    for divides in (False, True):
        yield nvfp4((1, 16), divides)
        yield nvfp4((300, 96), divides)
        yield nvfp4((5, 13, 48), divides, 5)
        yield nvfp4((130, 80), divides, 1, True, True)
        yield nvfp4((140, 208), divides, 1, False, True)
    yield nvfp4((30, 48), False, 1, True, False)


def stored_operands(tensors: Sequence[Codes], place: Callable[[Raw], tuple[int, int]]) -> list[Any]:
    """The operands of these. place: puts bytes somewhere and says (source, offset)."""
    from fastinterp.ops.dtypes import F32
    from fastinterp.ops.operands import Decoder, Stored

    operands = []
    for tensor in tensors:
        companions = tuple((*place(c), c.size) for c in tensor.companions)
        decoder = Decoder(tensor.name, tensor.columns, companions, tensor.parameters)
        operands.append(Stored(*place(tensor.raw), F32.code or 0, decoder))
    return operands
