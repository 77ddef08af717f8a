"""Opening a file whose name may stand for anything: a pipe, a device, gigabytes. And fsync by name."""

from __future__ import annotations

import os
import stat

from fastinterp.errors import CheckpointError


def open_regular(file: str) -> tuple[int, int]:
    """A descriptor for reading `file`, which the caller closes, and the size in bytes.

    Raises: CheckpointError, naming `file`, if it cannot be opened or is not a regular file.
    """
    try:
        # O_NONBLOCK: a named pipe must not hang the opening; it is refused below.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError("the file does not exist", file=file) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the file cannot be opened: {getattr(error, 'strerror', error)}", file=file) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError("this is not a regular file", file=file)
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def read_regular(file: str, limit: int = 2**63) -> bytes:
    """The content of `file`, which may have at most `limit` bytes.

    Raises: CheckpointError, naming `file`, if it is larger, not a regular file, or cannot be read.
    """
    fd, size = open_regular(file)
    with open(fd, "rb") as stream:
        if size > limit:
            raise CheckpointError(f"the file has {size} bytes, more than the allowed {limit}", file=file)
        try:
            return stream.read(size)
        except OSError as error:
            raise CheckpointError(f"the file cannot be read: {error.strerror}", file=file) from None


def fsync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
