"""The receipt of an output folder: `fastinterp_receipt.json`, beside the weights.

It says what was merged, and has a checksum of every file, so that an output can be verified and made again. Nothing in
it depends on time, machine, output folder, threads or device: the same merge gives the same receipt. Checksums are
hexadecimal numbers of 16 digits.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.errors import CheckpointError

RECEIPT = "fastinterp_receipt.json"
MAX_RECEIPT = 100_000_000  # bytes


class WeightsFile(msgspec.Struct, frozen=True):
    """A file of weights.

    size         of the file, bytes
    data_start   where its data section begins, which reaches to the end: the bytes before it are the header
    header_xxh3  XXH3-64 of the header, as it is in the file
    checksum     of the data section, which is in the header, too: the sum of `regions`
    regions      the checksum of every region of the section (reference/checksum.py), 64 MiB of the file each
    """

    size: int
    data_start: int
    header_xxh3: str
    checksum: str
    regions: tuple[str, ...]


class SmallFile(msgspec.Struct, frozen=True):
    """Any other file that was written: its size in bytes, and XXH3-64 of its bytes."""

    size: int
    xxh3: str


class InputFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """A file of an input: its name in the input, size in bytes, XXH3-64 of its header, and of sixteen pieces of its
    data of 4 KiB, at equal distances; the checksum of its data, if its header states that; and what a store elsewhere,
    from which it was read, calls its version: `ETag 1f3a`.
    """

    name: str
    size: int
    header_xxh3: str
    sample_xxh3: str
    checksum: str | None = None
    version: str = ""


class ReceiptFile(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of `fastinterp_receipt.json`.

    fastinterp    version
    numerics      version of the numeric contract
    merge         the receipt in the headers of the weights (plan/outputs.py)
    weights       name in the folder -> file of weights
    files         name in the folder -> any other file
    inputs        model, as the merge names it -> its files
    coefficients  that came from the data: tensor -> coefficients
    """

    fastinterp: str
    numerics: int
    merge: dict[str, Any]
    weights: dict[str, WeightsFile]
    files: dict[str, SmallFile]
    inputs: dict[str, tuple[InputFile, ...]] = {}
    coefficients: dict[str, Any] = {}


def hexadecimal(checksum: int) -> str:
    return f"{checksum:016x}"


def encode_receipt(receipt: ReceiptFile) -> bytes:
    """The bytes of the file: JSON, with a line for each entry of its tables."""
    lines = []
    for key, value in msgspec.to_builtins(receipt).items():
        if isinstance(value, dict) and value:
            entries = [f"  {json.dumps(name)}: {json.dumps(one)}" for name, one in value.items()]
            lines.append(f" {json.dumps(key)}: {{\n" + ",\n".join(entries) + "\n }")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def read_receipt(path: str) -> ReceiptFile:
    """Read a receipt, which is not trusted. Raises: CheckpointError, if it cannot be read, or is none."""
    try:
        receipt = msgspec.json.decode(read_regular(path, MAX_RECEIPT), type=ReceiptFile)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"this is no receipt of a merge: {error}", file=path) from None
    for name, file in receipt.weights.items():
        if not 0 <= file.data_start <= file.size < 1 << 63:
            raise CheckpointError(f"of {quote(name)} it says sizes that no file has: it is damaged", file=path)
    return receipt
