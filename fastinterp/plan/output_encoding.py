"""How an output tensor is stored as codes and scales."""

from __future__ import annotations

from math import prod

import msgspec

from fastinterp.ops.dtypes import DType
from fastinterp.ops.operands import Encoder

# Elements of a matrix with one scale that a thread measures and encodes at once; larger ones are measured before.
_AT_ONCE = 2 << 20

Entry = tuple[str, DType, tuple[int, ...]]  # a tensor of a file: name, dtype, shape


class OutputEncoding(msgspec.Struct, frozen=True, eq=False):
    """How an output tensor is stored as codes.

    format     for people: `fp8 with scales of blocks of 128 x 128`
    codes      the tensor of its codes
    scales     the tensors of its scales: one of what is encoded, perhaps several of what is copied; none, if they are
               among the codes
    encoder    how sums become codes; None: of this format there are only copies
    alike      of each input whether it is stored in this way, so that a copy is one of its codes and scales
    """

    format: str
    codes: Entry
    scales: tuple[Entry, ...]
    encoder: Encoder | None
    alike: tuple[bool, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The tensors of the file."""
        return (self.codes, *self.scales)

    @property
    def nbytes(self) -> int:
        return sum(dtype.nbytes(prod(shape)) or 0 for _, dtype, shape in self.entries)

    @property
    def measures(self) -> bool:
        """Whether the largest magnitudes are measured in a read of their own."""
        return self.encoder is not None and self.encoder.matrix > _AT_ONCE
