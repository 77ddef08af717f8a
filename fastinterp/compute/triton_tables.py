"""The tables that Triton kernels which write read: see kernels/triton/table.py."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastinterp.compute.triton_room import ALIGNED, NATURAL, SIZES, Room, alignment, signed, steps


@dataclass(slots=True)
class Part:
    """Outputs of one piece that have pivot and terms in common.

    addresses, codes  of pivot and terms, in the order of the sum
    rows              which outputs of the piece these are
    numbers           f64: see _triton/combine.py
    affine            of each output: whether its total is 1, so that the sum of its terms is the change it makes
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
    place: int = 0  # of its first answer, where it has no numbers
    extra: list[int] = field(default_factory=list)

    def at(self, begin: int, count: int, out_code: int) -> Part:
        """Some of its elements."""
        addresses = [a + begin * SIZES[c] for a, c in zip(self.addresses, self.codes, strict=True)]
        outs = [out + begin * SIZES[out_code] for out in self.outs]
        return replace(self, addresses=addresses, outs=outs, count=count, first=self.first + begin)

    def of(self, inputs: Sequence[int]) -> Part:
        """With some of its inputs."""
        return replace(self, addresses=[self.addresses[i] for i in inputs], codes=tuple(self.codes[i] for i in inputs))

    def alignment(self, out_code: int) -> int:
        return alignment([*self.addresses, *self.outs], [*self.codes, *[out_code] * len(self.outs)])


class Table:
    """Rows for kernels: see _triton/table.py."""

    def __init__(self, parts: Sequence[Part], tiles: Sequence[int]):
        """tiles: programs for each part."""
        width = 11 + len(parts[0].addresses)
        rows, pool, numbers = array("q"), array("q"), bytearray()
        first, end = 0, width * len(parts)
        for part, count in zip(parts, tiles, strict=True):
            rows.extend(
                (first, part.count, part.first, end + len(pool), len(part.outs), part.place + len(numbers) // 8)
            )
            extra = end + len(pool) + 3 * len(part.outs)
            rows.extend((part.flags, part.columns, part.group, part.groups, extra))
            rows.extend(part.addresses)
            pool.extend(part.outs)
            pool.extend(map(signed, part.keys))
            pool.extend(map(int, part.affine))
            pool.extend(part.extra)
            numbers += part.numbers
            first += count
        self.rows, self.tiles, self.numbers, self.steps = rows + pool, first, numbers, steps(len(parts))

    def on(self, room: Room) -> tuple[Any, Any]:
        return room.upload(self.rows, "int64"), room.upload(self.numbers, "float64")


def tiles_of(parts: Sequence[Part], block: int) -> list[int]:
    return [-(-part.count // block) for part in parts]


def aligned(parts: Sequence[Part], out: int) -> dict[int, list[Part]]:
    """Parts by what a kernel may count on. Where addresses are multiples of 16, whole 16s and the rest apart."""
    found: dict[int, list[Part]] = {}
    for part in parts:
        align = part.alignment(out)
        body = part.count // 16 * 16 if align == ALIGNED else part.count
        if body:
            found.setdefault(align, []).append(part.at(0, body, out))
        if body < part.count:
            found.setdefault(NATURAL, []).append(part.at(body, part.count - body, out))
    return found
