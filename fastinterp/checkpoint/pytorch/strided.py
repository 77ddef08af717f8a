"""Tensors whose elements do not lie one after the other: transposed, sliced, expanded. Converted a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from fastinterp.checkpoint.remote import Readable, opened, read_from

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 32 << 20  # bytes that are made at a time, and that are read at once
_PAGE = 4096  # bytes of a run that is worth a read of its own


def is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements with these strides lie one after the other, the last dimension fastest."""
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return not math.prod(shape)
        expected *= length
    return True


class Strided(msgspec.Struct, frozen=True):
    """A view of a storage (`checkpoint.header.Conversion`).

    start    byte offset in the file of the element whose indices are all 0
    size     bytes of an element
    shape    at least one dimension, no empty one
    strides  in bytes, from 0 up; 0: the same elements again
    """

    start: int
    size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def stored_as(self) -> str:
        return ""

    def pieces(self, path: str) -> Iterator[bytes]:
        """Memory: some times _PIECE, however large the tensor. Raises: what Conversion.pieces does."""
        with opened(path) as file:
            yield from self._pieces(_Source(file, path, self.size), self.start, self.shape, self.strides)

    def _pieces(self, source: _Source, start: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Iterator[bytes]:
        """The elements in order, of as many indices of the first dimension at a time as fit a piece."""
        row = math.prod(shape[1:]) * self.size
        if row > _PIECE and len(shape) > 1:
            for index in range(shape[0]):
                yield from self._pieces(source, start + index * strides[0], shape[1:], strides[1:])
            return
        step = max(1, _PIECE // row)
        for first in range(0, shape[0], step):
            count = min(step, shape[0] - first)
            yield source.read(start + first * strides[0], (count, *shape[1:]), strides).tobytes()


class _Source:
    """Reads views of a file. size: bytes of an element."""

    def __init__(self, file: Readable, path: str, size: int):
        self._file, self._path, self._size = file, path, size

    def read(self, start: int, shape: Sequence[int], strides: Sequence[int]) -> NDArray[Any]:
        """The elements of a view, u8[*shape, size], read in long runs.

        Dimensions are taken in the order in which they lie in the file: the one with the longest strides is cut.
        """
        import numpy as np

        order = sorted((i for i in range(len(shape)) if strides[i] and shape[i] > 1), key=lambda i: -strides[i])
        lengths, steps = [shape[i] for i in order], [strides[i] for i in order]
        packed = self._packed(start, lengths, steps)  # without expanded dimensions
        back = [order.index(i) if i in order else -1 for i in range(len(shape))]
        kept = packed.transpose([*(k for k in back if k >= 0), len(order)])
        index = tuple(slice(None) if k >= 0 else None for k in back)
        return np.broadcast_to(kept[index], (*shape, self._size))

    def _packed(self, start: int, lengths: list[int], steps: list[int]) -> NDArray[Any]:
        """u8[*lengths, size], of steps that descend."""
        import numpy as np

        span = self._span(lengths, steps)
        if not lengths or span <= _PIECE:
            raw = np.frombuffer(self._bytes(start, span), np.uint8)
            return np.lib.stride_tricks.as_strided(raw, (*lengths, self._size), (*steps, 1))
        inner = self._span(lengths[1:], steps[1:])
        # Long runs that are far from each other are read one by one; others with what lies between them.
        alone = inner > _PIECE // 2 or (inner >= _PAGE and steps[0] > 2 * inner)
        many = 1 if alone else (_PIECE - inner) // steps[0] + 1
        out = np.empty((*lengths, self._size), np.uint8)
        for first in range(0, lengths[0], many):
            count = min(many, lengths[0] - first)
            rest = ([count, *lengths[1:]], steps) if count > 1 else (lengths[1:], steps[1:])
            out[first : first + count] = self._packed(start + first * steps[0], *rest)
        return out

    def _span(self, lengths: Sequence[int], steps: Sequence[int]) -> int:
        """Bytes from the first to the last element."""
        return sum((n - 1) * s for n, s in zip(lengths, steps, strict=True)) + self._size

    def _bytes(self, offset: int, count: int) -> bytes:
        return read_from(self._file, self._path, offset, count)
