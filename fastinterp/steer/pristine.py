"""The end points of a path: state dicts in memory, or checkpoints mapped into it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from typing import Any

from fastinterp.errors import CheckpointError, StorageError, UsageError
from fastinterp.files.checkpoint import Checkpoint, changed_since, open_checkpoint

_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "C64": "complex64",
}  # fmt: skip


class End:
    """One end point, never written to.

    A checkpoint's tensors are mapped: they are read when they are first used, and stay in memory as long as there is
    room for them.
    """

    def __init__(self, given: str | os.PathLike[str] | Mapping[str, Any], what: str):
        self._checkpoint: Checkpoint | None = None
        if isinstance(given, Mapping):
            self.name = what
            self.tensors: Mapping[str, Any] = given
        elif isinstance(given, (str, os.PathLike)):
            self.name = os.fspath(given)
            self._checkpoint = open_checkpoint(self.name)
            self.tensors = _mapped(self._checkpoint)
        else:
            raise UsageError(f"`{what}` must be a checkpoint's path or a state dict, got {type(given).__name__}")

    def refuse_changed(self) -> None:
        """Raises: StorageError, if a file is no longer what it was when it was opened."""
        changed = changed_since(self._checkpoint) if self._checkpoint else []
        if changed:
            raise StorageError(f"{changed[0]} was changed while the path was walked. Evaluate it again")


def _mapped(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise UsageError(
            "a path between checkpoints needs torch: pip install torch. Without it, give state dicts of numpy arrays"
        ) from None
    views: dict[int, mmap.mmap] = {}
    for number, path in enumerate(checkpoint.files):
        try:
            with open(path, "rb") as file:
                # Copy on write: torch wants memory that it might write to, the file stays as it is all the same.
                views[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise StorageError(f"{path} cannot be read: {error.strerror}") from None
    found = {}
    for name, entry in checkpoint.tensors.items():
        dtype = getattr(torch, _NAMES.get(entry.dtype.name, ""), None)
        if dtype is None:
            where = str(checkpoint.files[entry.file])
            raise CheckpointError(f"{name} is of dtype {entry.dtype}, which torch has not", file=where, tensor=name)
        if entry.nbytes:
            flat = torch.frombuffer(views[entry.file], dtype=dtype, count=entry.numel, offset=entry.start)
            found[name] = flat.view(entry.shape)
        else:
            found[name] = torch.empty(entry.shape, dtype=dtype)
    return found
