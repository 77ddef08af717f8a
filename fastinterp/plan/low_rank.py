"""What adapters change in a stored tensor: products of factors that are added, and rows that are replaced."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from fastinterp.ops.dtypes import DType


class StoredTensor(Protocol):
    """A tensor in one file, its elements one after the other: a StoredInput."""

    @property
    def key(self) -> Hashable: ...
    @property
    def path(self) -> Path: ...
    @property
    def start(self) -> int: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def nbytes(self) -> int: ...


class FactorInput(msgspec.Struct, frozen=True, eq=False):
    """A view of a stored tensor: element (matrix, i, k) is its number
    first + matrix * by_matrix + i * by_index + k * by_rank.

    tensor  None: all elements are 1
    """

    tensor: StoredTensor | None
    first: int = 0
    by_matrix: int = 0
    by_index: int = 0
    by_rank: int = 0

    @property
    def key(self) -> Hashable:
        tensor = None if self.tensor is None else self.tensor.key
        return tensor, self.first, self.by_matrix, self.by_index, self.by_rank


class ProductInput(msgspec.Struct, frozen=True, eq=False):
    """scale * left[row, k] * right[k, column], summed over `rank` k: it is added to each matrix of the tensor.

    magnitude  the length to which each row (per_row) or column is brought then; None: none is
    adapter    whose it is, for people
    """

    left: FactorInput
    right: FactorInput
    rank: int
    scale: float
    magnitude: StoredTensor | None
    per_row: bool
    adapter: str

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        yield from (t for t in (self.left.tensor, self.right.tensor, self.magnitude) if t is not None)

    @property
    def key(self) -> Hashable:
        magnitude = None if self.magnitude is None else self.magnitude.key
        return self.left.key, self.right.key, self.rank, self.scale, magnitude, self.per_row


class RowsInput(msgspec.Struct, frozen=True, eq=False):
    """Rows that are replaced by those of a stored tensor, in its order.

    rows  the number of each
    """

    tensor: StoredTensor
    rows: tuple[int, ...]
    adapter: str

    @property
    def tensors(self) -> Iterator[StoredTensor]:
        yield self.tensor

    @property
    def key(self) -> Hashable:
        return self.tensor.key, self.rows


class LowRankInput(msgspec.Struct, frozen=True, eq=False):
    """What adapters make of a stored tensor, which is float32 then.

    stored   the dtype of its elements, or of its codes' numbers
    shape    matrices, rows, columns
    changes  in order
    """

    stored: DType
    shape: tuple[int, int, int]
    changes: tuple[ProductInput | RowsInput, ...]

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The adapters' tensors, each once."""
        return tuple({t.key: t for change in self.changes for t in change.tensors}.values())

    @property
    def key(self) -> Hashable:
        return self.shape, tuple(change.key for change in self.changes)

    def formula(self) -> str:
        """`W + 2*B*A (lora)`, for people."""
        text = "W"
        for change in self.changes:
            if isinstance(change, RowsInput):
                text = f"{text} with {len(change.rows)} rows of {change.adapter}"
                continue
            product = "b" if change.left.tensor is None else f"B*A[r={change.rank}]"
            text = f"{text} + {change.scale:.6g}*{product} ({change.adapter})"
            if change.magnitude is not None:
                text = f"m * ({text}) / ||{'row' if change.per_row else 'column'}||"
        return text
