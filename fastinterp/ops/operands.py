"""Operands of steps: where the elements of a tensor are, and what is done to them when they are read. And how sums are
encoded when they are written.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class Decoder(msgspec.Struct, frozen=True):
    """How the bytes of an encoded tensor become float32: a function of csrc/decoder.h, and what it needs to know.

    name        under which the function is registered
    columns     length of a row of the tensor
    companions  (source, byte offset, bytes) of scales and the like, which are read as a whole, once a tensor
    parameters  numbers that the function takes
    """

    name: str
    columns: int
    companions: tuple[tuple[int, int, int], ...] = ()
    parameters: tuple[float, ...] = ()


class Factor(msgspec.Struct, frozen=True):
    """A view of a stored tensor: element (matrix, i, k) is its number
    first + matrix * by_matrix + i * by_index + k * by_rank.

    source  number of the source; -1: all elements are 1
    offset  of the stored tensor in it, in bytes
    dtype   code of its dtype
    """

    source: int
    offset: int
    dtype: int
    first: int = 0
    by_matrix: int = 0
    by_index: int = 0
    by_rank: int = 0


class Product(msgspec.Struct, frozen=True):
    """A product that is added to each matrix of a tensor: scale * left[row, k] * right[k, column], summed over k.

    rank       number of k
    magnitude  length to which each row (per_row) or column is brought then; None: none is
    """

    replaces: ClassVar[bool] = False
    left: Factor
    right: Factor
    rank: int
    scale: float
    magnitude: Factor | None = None
    per_row: bool = True


class ReplacedRows(msgspec.Struct, frozen=True):
    """Rows of a tensor that are replaced: by those of a stored one, in its order.

    rows  number of each in the tensor
    """

    replaces: ClassVar[bool] = True
    source: int
    offset: int
    dtype: int
    rows: tuple[int, ...]


class LowRank(msgspec.Struct, frozen=True):
    """What adapters make of a stored tensor: rule 18 of docs/NUMERICS.md.

    stored   code of the dtype of the stored elements, where no decoder reads them
    shape    matrices, rows, columns
    changes  in order
    """

    stored: int
    shape: tuple[int, int, int]
    changes: tuple[Product | ReplacedRows, ...]


class Stored(msgspec.Struct, frozen=True, gc=False):
    """An operand whose elements lie one behind the other in one source.

    source    number of the source
    offset    in it, in bytes
    dtype     code of the dtype that kernels see; F32 of what is decoded
    decoder   None: the bytes are elements of `dtype`, or of low_rank.stored
    low_rank  None: nothing is added
    """

    gathered: ClassVar[bool] = False
    source: int
    offset: int
    dtype: int
    decoder: Decoder | None = None
    low_rank: LowRank | None = None

    @property
    def as_stored(self) -> bool:
        """Whether the bytes are the elements: nothing is decoded or added."""
        return self.decoder is None and self.low_rank is None

    @property
    def sources(self) -> set[int]:
        """All sources that it is read from."""
        found = {self.source, *_companions(self.decoder)}
        for change in () if self.low_rank is None else self.low_rank.changes:
            if isinstance(change, ReplacedRows):
                found.add(change.source)
            else:
                found |= {f.source for f in (change.left, change.right, change.magnitude) if f is not None}
        return found - {-1}


class Gathered(msgspec.Struct, frozen=True):
    """An operand whose rows come from several places.

    parts     (source, byte offset, rows), which count as lying one behind the other
    dtype     its code
    rows      i64[rows of the tensor], a buffer: which of the parts' rows, -1 for a row of zeros
    decoders  of each part: None, if its bytes are elements of `dtype`. Empty: of no part
    """

    gathered: ClassVar[bool] = True
    parts: tuple[tuple[int, int, int], ...]
    dtype: int
    rows: Any
    decoders: tuple[Decoder | None, ...] = ()

    @property
    def as_stored(self) -> bool:
        """Whether the bytes are the elements, as Stored has it."""
        return not any(self.decoders)

    @property
    def sources(self) -> set[int]:
        """All sources that it is read from."""
        return {source for source, _, _ in self.parts}.union(*map(_companions, self.decoders))


def _companions(decoder: Decoder | None) -> set[int]:
    return set() if decoder is None else {source for source, _, _ in decoder.companions}


Operand = Stored | Gathered


class Encoder(msgspec.Struct, frozen=True):
    """How float32 sums become codes and scales: csrc/encoder.h, rule 17 of docs/NUMERICS.md.

    name        of the format: that of the decoder that reads it
    columns     length of a row of the tensor
    parameters  of blocks: kind of the scales, rows and columns of a block, rows of a matrix, and 1 if scales are powers
                of two; none of a format whose scales are among the codes
    scales      (sink, byte offset) of the scales of each output; none, if they are among the codes
    magnitudes  the largest of each matrix of each output, if they are known: each matrix is one block then
    """

    name: str
    columns: int
    parameters: tuple[int, ...] = ()
    scales: tuple[tuple[int, int], ...] = ()
    magnitudes: tuple[float, ...] = ()

    @property
    def matrix(self) -> int:
        """Elements of a matrix that is one block; 0, if matrices have several."""
        if not self.parameters:
            return 0
        _, block_rows, block_columns, rows, *_ = self.parameters
        return rows * self.columns if block_rows >= rows and block_columns >= self.columns else 0
