"""The tables of work that Triton kernels read: see kernels/triton/table.py."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastinterp.backends.triton.launch import ALIGNED, NATURAL, LaunchContext, alignment, signed
from fastinterp.ops.dtypes import CODE_BYTES


@dataclass(slots=True)
class Part:
    """Outputs of one piece with the same pivot and terms: a row of a table.

    addresses, codes  addresses and dtype codes of pivot and terms, in the order of the sum
    rows              indices of these outputs in the piece
    numbers           f64: see _triton/combine.py
    affine            for each output, whether its total is 1, so that the sum of its terms is the change it makes
    """

    piece: int
    addresses: list[int]
    codes: tuple[int, ...]
    outs: list[int]
    keys: list[int]
    rows: list[int]
    numbers: bytearray
    affine: list[bool]
    kind: int
    count: int
    first: int
    columns: int = 1
    group: int = 0
    groups: int = 1
    flags: int = 0
    answer: int = 0  # index of its first answer, where it has no numbers
    extra: list[int] = field(default_factory=list)

    def at(self, begin: int, count: int, out_code: int) -> Part:
        """The part of its elements [begin, begin + count)."""
        if not begin and count == self.count:
            return self
        addresses = [a + begin * CODE_BYTES[c] for a, c in zip(self.addresses, self.codes, strict=True)]
        outs = [out + begin * CODE_BYTES[out_code] for out in self.outs]
        return replace(self, addresses=addresses, outs=outs, count=count, first=self.first + begin)

    def of(self, inputs: Sequence[int]) -> Part:
        """The part with some of its inputs."""
        return replace(self, addresses=[self.addresses[i] for i in inputs], codes=tuple(self.codes[i] for i in inputs))

    def alignment(self, out_code: int) -> int:
        return alignment([*self.addresses, *self.outs], [*self.codes, *[out_code] * len(self.outs)])


class Table:
    """A table with a row per part: see _triton/table.py."""

    def __init__(self, parts: Sequence[Part], tiles: Sequence[int]):
        """tiles: number of programs for each part."""
        width = 11 + len(parts[0].addresses)
        rows: list[int] = []
        pool: list[int] = []
        numbers = bytearray()
        first, end = 0, width * len(parts)
        for part, count in zip(parts, tiles, strict=True):
            outs = end + len(pool)
            pool += part.outs
            pool += [signed(key) for key in part.keys]
            pool += part.affine
            rows += (
                first, part.count, part.first, outs, len(part.outs), part.answer + len(numbers) // 8,
                part.flags, part.columns, part.group, part.groups, end + len(pool), *part.addresses,
            )  # fmt: skip
            pool += part.extra
            numbers += part.numbers
            first += count
        # An even number of words, so that the numbers after them begin at a multiple of 16 bytes, too: for other
        # addresses kernels would be compiled once more.
        self._words = array("q", rows + pool + [0] * (len(rows) + len(pool) & 1))
        self._numbers_at, self.tiles = len(self._words), first
        self._words.frombytes(numbers or bytes(8))

    def on(self, context: LaunchContext) -> tuple[Any, Any]:
        """The rows, i64, and the numbers, f64: in one copy to the device."""
        import torch

        words = context.upload(self._words, "int64")
        return words[: self._numbers_at], words[self._numbers_at :].view(torch.float64)


def tiles_of(parts: Sequence[Part], block: int) -> list[int]:
    return [-(-part.count // block) for part in parts]


def aligned(parts: Sequence[Part], out: int) -> dict[int, list[Part]]:
    """Parts by alignment (launch.py). Aligned parts are cut into whole 16s of elements and the rest."""
    parts_of: dict[int, list[Part]] = {}
    for part in parts:
        align = part.alignment(out)
        body = part.count // 16 * 16 if align == ALIGNED else part.count
        if body:
            parts_of.setdefault(align, []).append(part.at(0, body, out))
        if body < part.count:
            parts_of.setdefault(NATURAL, []).append(part.at(body, part.count - body, out))
    return parts_of
