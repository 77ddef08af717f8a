"""The input files of a merge as receipts have them: what tells them from others, at the cost of a few pages."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from msgspec import structs

from fastinterp.backends.cpu import xxh3
from fastinterp.checkpoint import remote
from fastinterp.checkpoint.checksum import stated_checksum
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.remote import open_readable, read_up_to
from fastinterp.execute.sources import storage
from fastinterp.output.receipt import InputFile, hexadecimal
from fastinterp.plan.plan import Plan

SAMPLES, SAMPLE_BYTES = 16, 4096  # pieces of a file's data, at equal distances, the first and the last bytes among them
_MOST_HEADER = 100_000_000  # bytes


def input_files(plan: Plan) -> dict[str, tuple[InputFile, ...]]:
    """Model or side-car, as the receipt names it -> its files; those of adapters follow those of their base.

    None of private recipes: sizes and hashes can tell which model it was.
    Raises: StorageError, if a file cannot be read.
    """
    if plan.recipes[0].private:
        return {}
    found: dict[str, tuple[InputFile, ...]] = {}
    for i, model in enumerate(plan.checkpoints):
        if model.checkpoint is not None:
            name = plan.models[i] if i < len(plan.models) else model.name
            found[plan.shown.model(name)] = files_of(model.checkpoint)
    return found


def files_of(checkpoint: Checkpoint) -> tuple[InputFile, ...]:
    """The files of a checkpoint, then those of its adapters. Raises: StorageError, if one cannot be read."""
    starts: dict[int, int] = {}
    for entry in checkpoint.tensors.values():
        starts[entry.file] = min(entry.start, starts.get(entry.file, entry.start))
    own = [
        _file(path, os.path.relpath(path, checkpoint.root), starts.get(i, 0)) for i, path in enumerate(checkpoint.files)
    ]
    if len(own) == 1 and (stated := stated_checksum(checkpoint.metadata)) is not None:
        own = [structs.replace(own[0], checksum=hexadecimal(stated))]
    return (*own, *(file for adapter in checkpoint.adapters for file in files_of(adapter)))


def _file(path: Path, name: str, start: int) -> InputFile:
    """start: of its data, as far as that is known: the bytes before it are the header"""
    with storage(path), closing(open_readable(str(path))) as file:
        size = file.size
        header = read_up_to(file, path, 0, min(start, _MOST_HEADER))
        file.expect([(at, SAMPLE_BYTES) for at in _places(start, size)])
        sample = b"".join(read_up_to(file, path, at, SAMPLE_BYTES) for at in _places(start, size))
    found = remote.find(path)
    version = "" if found is None else found.version
    return InputFile(name, size, hexadecimal(xxh3(header)), hexadecimal(xxh3(sample)), version=version)


def _places(start: int, size: int) -> Sequence[int]:
    span = max(0, size - start - SAMPLE_BYTES)
    return sorted({start + span * k // (SAMPLES - 1) for k in range(SAMPLES)})
