"""How the CPU reads input files: by `pread` into its scratch memory, or in place, through mappings."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastinterp.backends.cpu import MappedFile
from fastinterp.errors import StorageError, UsageError

READS = ("auto", "pread", "mapped")


def maps_all(read: str) -> bool:
    """Whether every input file is mapped, whatever the method."""
    return read == "mapped"


def may_map(read: str, reads_again: bool) -> bool:
    """Whether files that are in the page cache are mapped: `auto` maps them for methods that read them again.
    docs/performance.md, "Mapped reading", has why.

    Not where the address space is limited: memory that is needed later might not be had beside the mappings.
    """
    import resource

    return read == "auto" and reads_again and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def all_mapped(files: Sequence[int]) -> list[MappedFile] | None:
    """Open files as sources that are mapped; None, if the system does not map all of them: they can be read as well."""
    try:
        return [MappedFile(fd) for fd in files]
    except OSError:
        return None


def reading_device(read: str, device: str, streamed: Iterable[str] = ()) -> str:
    """The device of a merge that reads so: mappings are for the CPU's kernels.

    streamed  names of models that are read from where they are
    Raises: UsageError, if `read` is unknown, or cannot go with the device, or with these models.
    """
    if read not in READS:
        raise UsageError(f"read must be one of {', '.join(READS)}, got {read!r}")
    if not maps_all(read):
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
