"""Checksums of the files of an output, as its receipt states them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from fastinterp._version import __version__
from fastinterp.backends.cpu import Xxh3, xxh3
from fastinterp.ops.combine import NUMERICS
from fastinterp.output.layout import OutFile
from fastinterp.output.receipt import InputFile, ReceiptFile, SmallFile, WeightsFile, encode_receipt, hexadecimal
from fastinterp.plan.plan import Plan

_MOST_BYTES = 32_000_000  # of a receipt


def finished_file(file: OutFile, regions: Sequence[int]) -> tuple[bytes, WeightsFile]:
    """The header of a file whose data is written, and what the receipt says of the file.

    regions  the checksums of its data section
    """
    checksum = sum(regions) % 2**64
    header = file.header_with(checksum)
    return header, WeightsFile(
        size=file.size,
        data_start=len(header),
        header_xxh3=hexadecimal(xxh3(header)),
        checksum=hexadecimal(checksum),
        regions=tuple(map(hexadecimal, regions)),
    )


def small_file(pieces: Iterable[bytes]) -> SmallFile:
    """What the receipt says of any other file. pieces: its content, in parts."""
    size, hashed = 0, Xxh3()
    for piece in pieces:
        size += len(piece)
        hashed.add(piece)
    return SmallFile(size, hexadecimal(hashed.end()))


def receipt_content(
    plan: Plan,
    k: int,
    weights: Mapping[str, WeightsFile],
    small: Mapping[str, SmallFile],
    inputs: Mapping[str, tuple[InputFile, ...]],
    coefficients: Mapping[str, Any],
) -> bytes:
    """The content of `fastinterp_receipt.json` of output k. Coefficients that take more than 32 MB are left out."""
    receipt = ReceiptFile(
        __version__,
        NUMERICS,
        json.loads(plan.receipts[k]),
        dict(sorted(weights.items())),
        dict(sorted(small.items())),
        dict(inputs),
        dict(coefficients),
    )
    content = encode_receipt(receipt)
    if len(content) > _MOST_BYTES and coefficients:
        content = encode_receipt(replace(receipt, coefficients={}))
    return content
