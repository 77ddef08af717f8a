"""Weighted sums that are run with many rows, one after the other, for backends that prepare nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace

if TYPE_CHECKING:
    from fastinterp.backends.device import Piece, Queue
    from fastinterp.ops.combine import Row


class PreparedPieces:
    """PreparedSums of device.py: the pieces anew for every row.

    pieces  of Combine steps with one output each
    """

    def __init__(self, pieces: Sequence[Piece]):
        self._pieces = list(pieces)

    def run(self, queue: Queue, row: Row) -> None:
        queue.run([replace(piece, step=replace(piece.step, rows=(row,))) for piece in self._pieces])
