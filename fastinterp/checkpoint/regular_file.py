"""Opening a file whose name may stand for anything: a pipe, a device, gigabytes. Changes of files; writes, fsync."""

from __future__ import annotations

import os
import stat

from fastinterp.errors import CheckpointError

Stamp = tuple[int, int, int, int]  # size in bytes, mtime in ns, ctime in ns, inode
CHANGED = "it changed while it was being read. Retry once nothing is writing to it"


def stamp_of(path: str | os.PathLike[str]) -> Stamp | None:
    """What tells a file from a changed or replaced one; None, if there is none."""
    try:
        return _stamp(os.stat(path))
    except OSError:
        return None


def _stamp(info: os.stat_result) -> Stamp:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


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

    Raises: CheckpointError, naming `file`, if it is larger, not a regular file, cannot be read, or changes meanwhile.
    """
    fd, size = open_regular(file)
    with open(fd, "rb") as stream:
        if size > limit:
            raise CheckpointError(f"the file has {size} bytes, more than the allowed {limit}", file=file)
        try:
            before = _stamp(os.fstat(fd))
            content = stream.read(size)
            after = _stamp(os.fstat(fd))
        except OSError as error:
            raise CheckpointError(f"the file cannot be read: {error.strerror}", file=file) from None
    if len(content) != size or before != after:
        raise CheckpointError(CHANGED, file=file)
    return content


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset` of a file, in as many writes as the system needs. Raises: OSError."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)


def fsync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
