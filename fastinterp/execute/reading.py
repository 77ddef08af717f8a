"""How the CPU reads input files: by `pread` into its scratch memory, or in place, through mappings."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from fastinterp.backends.cpu import MappedFile
from fastinterp.errors import StorageError, UsageError

READS = ("auto", "pread", "mapped")


def is_mapped(read: str) -> bool:
    """Whether a merge maps its input files. `auto` does not: docs/performance.md, "Mapped reading", has why."""
    return read == "mapped"


def reading_device(read: str, device: str, streamed: Iterable[str] = ()) -> str:
    """The device of a merge that reads so: mappings are for the CPU's kernels.

    streamed  names of models that are read from where they are
    Raises: UsageError, if `read` is unknown, or cannot go with the device, or with these models.
    """
    if read not in READS:
        raise UsageError(f"read must be one of {', '.join(READS)}, got {read!r}")
    if not is_mapped(read):
        return device
    if device not in ("auto", "cpu"):
        raise UsageError(
            f"--read mapped is for the CPU, and cannot go with --device {device} (in Python read='mapped', "
            f"device={device!r}). Leave one of the two out"
        )
    for name in streamed:
        raise UsageError(
            f"{name} is read from where it is, and only files here can be mapped. Leave --read mapped out (in Python "
            "read='mapped'), or download it first"
        )
    return "cpu"


def mapped(fd: int, path: Path) -> MappedFile:
    """An open file as a source that is mapped. Raises: StorageError."""
    try:
        return MappedFile(fd)
    except OSError as error:
        raise StorageError(
            f"{path}: it cannot be mapped: {os.strerror(error.errno or 0)}. Use --read pread (in Python read='pread')"
        ) from None
