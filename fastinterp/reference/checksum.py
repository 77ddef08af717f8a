"""The definition of the checksum of a file of weights: that of its data section, everything behind its header.

The file is cut at multiples of CELL_BYTES. A cell's bytes are those of the section that lie in it, and its hash is
XXH3-64 of them with the cell's index in the file as seed. The checksum of a region, REGION_BYTES of the file, is the
sum of the hashes of its cells, modulo 2^64; that of the file is the sum of all of them.

So it depends on the bytes and on where they are in the file, and not on the order in which they are written.
"""

from __future__ import annotations

from collections.abc import Callable

CELL_BYTES = 32 << 10
REGION_BYTES = 64 << 20

Xxh3 = Callable[[bytes, int], int]  # XXH3-64 of bytes, with a seed


def region_checksums(content: bytes, start: int, xxh3: Xxh3) -> list[int]:
    """The checksums of the regions of a file from that of its section's first byte on; none of an empty section.

    content  of the whole file
    start    of the section, byte in the file
    """
    cells: dict[int, int] = {}
    for cell in range(start // CELL_BYTES, -(-len(content) // CELL_BYTES)):
        first, end = max(start, cell * CELL_BYTES), min(len(content), (cell + 1) * CELL_BYTES)
        if first < end:
            region = cell * CELL_BYTES // REGION_BYTES
            cells[region] = (cells.get(region, 0) + xxh3(content[first:end], cell)) % 2**64
    return list(cells.values())


def file_checksum(regions: list[int]) -> int:
    """The checksum of a file, from those of its regions."""
    return sum(regions) % 2**64
