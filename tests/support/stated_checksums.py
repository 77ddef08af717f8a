"""What an output says of its own bytes, compared with the definition and the library xxhash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash
from gguf import GGUFReader

from fastinterp.checkpoint.checksum import KEY
from fastinterp.output.receipt import RECEIPT
from fastinterp.reference.checksum import file_checksum, region_checksums
from tests.support.checkpoints import read_header


def oracle(content: bytes, seed: int = 0) -> int:
    return xxhash.xxh3_64_intdigest(content, seed=seed)


def stated(path: Path) -> tuple[str, int]:
    """The checksum in the header of a file of weights, read by other code than the engine's; the section's begin."""
    if path.suffix == ".gguf":
        reader = GGUFReader(path)
        return str(reader.fields[KEY].contents()), int(reader.data_offset)
    table, start = read_header(path)
    return table["__metadata__"][KEY], start


def checked_weights(path: Path) -> dict[str, Any]:
    """What the receipt must say of a file of weights. Fails, if its header states another checksum."""
    text, start = stated(path)
    content = path.read_bytes()
    regions = region_checksums(content, start, oracle)
    checksum = f"{file_checksum(regions):016x}"
    assert text == f"xxh3-32k:{checksum}", path
    return {
        "size": len(content),
        "data_start": start,
        "header_xxh3": f"{oracle(content[:start]):016x}",
        "checksum": checksum,
        "regions": [f"{r:016x}" for r in regions],
    }


def checked(out: Path) -> dict[str, Any]:
    """The receipt of an output folder. Fails, if it or a header says anything that is not true of the files."""
    receipt: dict[str, Any] = json.loads((out / RECEIPT).read_bytes())
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()} - {RECEIPT}
    weights = {n for n in names if n.endswith((".safetensors", ".gguf"))}
    assert receipt["weights"] == {n: checked_weights(out / n) for n in weights} and weights
    assert receipt["files"] == {
        n: {"size": (out / n).stat().st_size, "xxh3": f"{oracle((out / n).read_bytes()):016x}"} for n in names - weights
    }
    return receipt
