"""Files whose names may stand for anything: a pipe, a device, gigabytes. Reads, writes, fsync; changes of files.

Errors of system calls that have a path have it as their `filename`; those of calls on descriptors get it here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from fastinterp.errors import CheckpointError, StorageError, UnreadableError
from fastinterp.presence import info_of

Stamp = tuple[int, int, int, int]  # size in bytes, mtime in ns, ctime in ns, inode
_PIECE = 4 << 20  # bytes that are read at a time of files that are copied
CHANGED = "it changed while it was being read. Retry once nothing is writing to it"


def stamp_of(path: str | os.PathLike[str]) -> Stamp | None:
    """What tells a file from a changed or replaced one; None, if there is none. Raises: UnreadableError."""
    info = info_of(path)
    return None if info is None else _stamp(info)


def _stamp(info: os.stat_result) -> Stamp:
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def open_regular(file: str) -> tuple[int, int]:
    """A descriptor for reading `file`, which the caller closes, and the size in bytes.

    Raises: CheckpointError, naming `file`, if it is missing or not a regular file; UnreadableError, if it cannot be
    opened.
    """
    try:
        # O_NONBLOCK: a named pipe must not hang the opening; it is refused below.
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise CheckpointError("the file does not exist", file=file) from None
    except ValueError as error:  # a NUL, or no valid Unicode
        raise CheckpointError(f"the file cannot be opened: {error}", file=file) from None
    except OSError as error:
        raise UnreadableError(f"the file cannot be opened: {error.strerror}", file=file) from None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise CheckpointError("this is not a regular file", file=file)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise _unreadable(error, file) from None
        raise
    return fd, info.st_size


@contextmanager
def _regular(file: str) -> Iterator[tuple[int, int]]:
    """A context manager: a descriptor for reading `file` in the block, and the size in bytes.

    Raises: what open_regular does; UnreadableError, too, if an OSError is raised in the block.
    """
    fd, size = open_regular(file)
    try:
        try:
            yield fd, size
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(error, file) from None


def _unreadable(error: OSError, file: str) -> UnreadableError:
    return UnreadableError(f"the file cannot be read: {error.strerror}", file=file)


def close(fd: int, path: str | os.PathLike[str]) -> None:
    """Close a descriptor of the file at `path`. Raises: StorageError."""
    try:
        os.close(fd)
    except OSError as error:
        raise StorageError(f"{os.fspath(path)}: it cannot be closed: {error.strerror}") from None


def read_at(fd: int, path: str | os.PathLike[str], offset: int, count: int) -> bytes:
    """The `count` bytes at `offset` of a file, in as many reads as the system needs.

    Raises: StorageError, if they cannot be read; CheckpointError, if the file ends before. Both name `path`.
    """
    parts: list[bytes] = []
    done = 0
    while done < count:
        try:
            part = os.pread(fd, count - done, offset + done)
        except OSError as error:
            at = f"reading {count - done} bytes at {offset + done}"
            raise StorageError(f"{os.fspath(path)}: {error.strerror}, {at}") from None
        if not part:
            raise UnreadableError(
                f"only {done} of {count} bytes are left at byte {offset}: it was truncated or replaced. Retry once "
                "nothing is writing to it",
                file=os.fspath(path),
            )
        parts.append(part)
        done += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_regular(file: str, limit: int = 2**63) -> bytes:
    """The content of `file`, which may have at most `limit` bytes.

    Raises: CheckpointError, naming `file`, if it is larger, not a regular file, cannot be read, or changes meanwhile.
    """
    with _regular(file) as (fd, size):
        if size > limit:
            raise CheckpointError(f"the file has {size} bytes, more than the allowed {limit}", file=file)
        before = _stamp(os.fstat(fd))
        content = bytearray()
        while len(content) < size and (part := os.read(fd, size - len(content))):
            content += part
        after = _stamp(os.fstat(fd))
    if len(content) != size or before != after:
        raise UnreadableError(CHANGED, file=file)
    return bytes(content)


def pieces_of(file: str) -> Iterator[bytes]:
    """The content of `file`, however large, a piece at a time. Raises: what read_regular does."""
    with _regular(file) as (fd, size):
        before = _stamp(os.fstat(fd))
        for at in range(0, size, _PIECE):
            yield read_at(fd, file, at, min(_PIECE, size - at))
        if _stamp(os.fstat(fd)) != before:
            raise UnreadableError(CHANGED, file=file)


def write_all(fd: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset` of a file, in as many writes as the system needs. Raises: OSError."""
    done = 0
    while done < len(data):
        put = os.pwrite(fd, memoryview(data)[done:], offset + done)
        if put == 0:  # as some file systems say that they are full
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += put


def fsync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Raises: OSError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
