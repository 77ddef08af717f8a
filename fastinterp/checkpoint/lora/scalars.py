"""Reads the numbers of an adapter that are stored as tensors of one element: by what its products are scaled."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from contextlib import ExitStack

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.remote import Readable, opened, read_from
from fastinterp.errors import CheckpointError

_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b", "U8": "<B"}


def read_scalars(checkpoint: Checkpoint, entries: Sequence[Entry]) -> dict[str, float]:
    """The number of each of these tensors, by its name.

    Raises: CheckpointError, if one has not one element, or is no finite number.
    """
    found: dict[str, float] = {}
    open_files: dict[int, Readable] = {}
    with ExitStack() as stack:
        for entry in entries:
            file = str(checkpoint.files[entry.file])
            if entry.file not in open_files:
                open_files[entry.file] = stack.enter_context(opened(file))
            if entry.numel != 1 or not (entry.dtype.name in _FORMATS or entry.dtype.name == "BF16"):
                raise _not_a_number(file, entry, f"{entry.dtype} {list(entry.shape)}")
            raw = read_from(open_files[entry.file], file, entry.start, entry.nbytes)
            if entry.dtype.name == "BF16":
                value = struct.unpack("<f", b"\0\0" + raw)[0]
            else:
                value = float(struct.unpack(_FORMATS[entry.dtype.name], raw)[0])
            if not math.isfinite(value):
                raise _not_a_number(file, entry, str(value))
            found[entry.name] = value
    return found


def _not_a_number(file: str, entry: Entry, got: str) -> CheckpointError:
    return CheckpointError(
        f"{quote(entry.name)} scales a product, so it must be one finite number, got {got}",
        file=file,
        tensor=entry.name,
    )
