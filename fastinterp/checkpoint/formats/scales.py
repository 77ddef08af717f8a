"""Which scale belongs to which element, from the shapes of codes and scales."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import msgspec

from fastinterp.checkpoint.header import Header
from fastinterp.ops.dtypes import DType

_BLOCK = 128  # rows and columns of a block where nothing says otherwise: of DeepSeek, Qwen, GLM, transformers
# How decoders know the dtype of scales: their first parameter. U8 scales are exponents, as F8_E8M0 are.
KINDS = {"F32": 0, "F16": 1, "BF16": 2, "F8_E8M0": 3, "U8": 3}

TILES = ", padded to the tiles of 128 x 4 in which ComfyUI stores them"


def padded_to_tiles(shape: Sequence[int]) -> list[int]:
    """The shape of scales that lie in tiles: rows and columns padded."""
    *lead, rows, columns = shape
    return [*lead, -(-rows // 128) * 128, -(-columns // 4) * 4]


class Grid(msgspec.Struct, frozen=True):
    """Which scale an element has. A tensor is `matrices` of `rows` rows; scales are [matrices, ceil(rows/block_rows),
    ceil(columns/block_columns)].

    assumed  whether the size of blocks is not said, and follows from the shapes alone
    """

    block_rows: int
    block_columns: int
    rows: int
    assumed: bool = False

    def parameters(self, scale: DType) -> tuple[float, ...]:
        """Those of the decoders of scaled codes: (dtype of the scales, rows and columns of a block, rows)."""
        return KINDS[scale.name], self.block_rows, self.block_columns, self.rows

    def of(self, shape: Sequence[int]) -> str:
        """For people: `blocks of 128 x 128`."""
        columns = shape[-1] if len(shape) > 1 else prod(shape)
        if self.block_columns >= columns:
            if self.block_rows >= prod(shape) // max(1, columns):
                return "the tensor"
            return "each row" if self.block_rows == 1 else f"every {self.block_rows} rows"
        if self.block_rows == 1:
            return f"every {self.block_columns} columns of a row"
        return f"blocks of {self.block_rows} x {self.block_columns}"


def grid(shape: Sequence[int], scale: Sequence[int], blocks: Sequence[tuple[int, int]], strict: bool) -> Grid | None:
    """The grid of scales of shape `scale` over codes of shape `shape`; None, if they do not fit each other.

    blocks  sizes of blocks that the configuration names
    strict  scales are of such blocks, and of nothing else
    """
    numel = prod(shape)
    columns = shape[-1] if len(shape) > 1 else numel
    if not numel:
        return Grid(1, max(1, columns), 1)
    every = numel // columns
    if len(scale) == 4 and len(shape) == 2 and scale[1] == scale[3] == 1:  # as ModelOpt stores them
        scale = (scale[0], scale[2])
    counts = {(-(-shape[-2] // r), -(-shape[-1] // c)) for r, c in blocks} if strict and len(shape) > 1 else set()
    if prod(scale) == 1 and (not counts or (1, 1) in counts):
        return Grid(every, columns, every)
    if len(shape) < 2:
        return None
    if not counts:
        if tuple(scale) in (tuple(shape[:-1]), (*shape[:-1], 1)):
            return Grid(1, columns, every)
        if len(shape) > 2 and scale[0] == shape[0] == prod(scale):
            return Grid(every // shape[0], columns, every // shape[0])
    return _of_blocks(shape, scale, blocks)


def _of_blocks(shape: Sequence[int], scale: Sequence[int], blocks: Sequence[tuple[int, int]]) -> Grid | None:
    if len(scale) != len(shape) or tuple(scale[:-2]) != tuple(shape[:-2]) or 0 in (*shape, *scale):
        return None
    (m, n), counts = shape[-2:], tuple(scale[-2:])
    for r, c in blocks:
        if (-(-m // r), -(-n // c)) == counts:
            return Grid(min(r, m), min(c, n), m)
    if any(r > 1 for r, _ in blocks):
        return None
    rows, columns = _length(m, counts[0]), _length(n, counts[1])
    return Grid(rows, columns, m, assumed=True) if rows and columns else None


def _length(size: int, count: int) -> int:
    """The length of `count` blocks that cover `size` elements: 128 where that fits, else what divides it, or a power
    of two; 0, if that is not one length alone.
    """
    if count in (1, size):
        return size // count
    if -(-size // _BLOCK) == count:
        return _BLOCK
    fitting = {size // count} if size % count == 0 else set()
    fitting |= {1 << k for k in range(1, 31) if -(-size // (1 << k)) == count}
    return fitting.pop() if len(fitting) == 1 else 0


def expected(shape: Sequence[int], blocks: Sequence[tuple[int, int]], strict: bool) -> str:
    """The shapes that scales of codes of this shape may have, for people."""
    if len(shape) < 2:
        return "[] or [1]: one for all"
    lead = list(shape[:-2])
    of_blocks = [
        f"{[*lead, -(-shape[-2] // r), -(-shape[-1] // c)]} for blocks of {r} x {c}"
        for r, c in blocks or [(_BLOCK,) * 2]
    ]
    if strict:
        return " or ".join(of_blocks) + ", which config.json names"
    return f"[] or [1] for all, {list(shape[:-1])} or {[*shape[:-1], 1]} for each row, {', '.join(of_blocks)}"


def may_scale(scale: Header, codes: Header) -> bool:
    """Whether a tensor called `scale` fits codes: wider numbers or exponents, one for all, for a row or for a block."""
    if scale.dtype.name not in ("F64", "F32", "F16", "BF16", "F8_E8M0", "U8"):
        return False
    if scale.shape in ((), (1,)) or scale.shape[0] == codes.shape[0]:
        return True
    return len(scale.shape) == len(codes.shape) and all(a <= b for a, b in zip(scale.shape, codes.shape, strict=True))
