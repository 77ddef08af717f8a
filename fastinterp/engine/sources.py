"""The input files while they are read: opened once each, and what can go wrong with them put into words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastinterp.compute.pump import cached_fraction
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.files.checkpoint import Checkpoint, changed_since
from fastinterp.files.embedding import MappedEntry
from fastinterp.files.header import Entry

_SPARE_FDS = 64  # for everything that is neither input nor output


class Sources:
    """The files that hold some entries of some checkpoints, open for reading until `stack` closes.

    reads    (checkpoint, entry) of every tensor that will be read
    outputs  files that will be open for writing at the same time
    scratch  folder for the rows of embeddings that are moved; None: the system's for temporary files
    Raises: StorageError, if a file cannot be opened.
    """

    def __init__(
        self,
        checkpoints: Sequence[Checkpoint],
        reads: Iterable[tuple[int, Entry]],
        stack: ExitStack,
        outputs: int = 0,
        scratch: Path | None = None,
    ):
        every = list(reads)
        needed = sorted({(i, e.file) for i, e in every if not isinstance(e, MappedEntry)})
        moved = {_mapped_key(i, e): (i, e) for i, e in every if isinstance(e, MappedEntry)}
        _allow_files(len(needed) + len(moved) + outputs)
        self.paths: list[Path] = []
        self.fds: list[int] = []
        self._checkpoints = checkpoints
        self._number: dict[tuple[int, int], int] = {}
        for checkpoint, file in needed:
            path = checkpoints[checkpoint].files[file]
            with storage(path):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            self._number[checkpoint, file] = len(self.fds)
            self.fds.append(fd)
            self.paths.append(path)
        self._moved: dict[tuple[int, int, int], int] = {}
        for key, (checkpoint, entry) in moved.items():
            self._add_moved(key, checkpoints[checkpoint].files[entry.file], entry, scratch, stack)

    def _add_moved(
        self, key: tuple[int, int, int], path: Path, entry: MappedEntry, scratch: Path | None, stack: ExitStack
    ) -> None:
        from fastinterp.engine.gather import gathered

        with storage(scratch or Path("a temporary file")):
            fd = gathered(entry, scratch, stack)
        self._moved[key] = len(self.fds)
        self.fds.append(fd)
        self.paths.append(path)

    def operand(self, checkpoint: int, entry: Entry) -> tuple[int, int, int]:
        """A tensor as the pump takes it: source, byte offset, dtype code."""
        if isinstance(entry, MappedEntry):
            return self._moved[_mapped_key(checkpoint, entry)], 0, entry.dtype.code or 0
        return self._number[checkpoint, entry.file], entry.start, entry.dtype.code or 0

    def cached(self) -> bool:
        """Whether all files are known to be in the page cache, so that nothing need be read ahead."""
        return all(cached_fraction(fd, os.fstat(fd).st_size) > 0.95 for fd in self.fds)

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if a file of a checkpoint is not what it was when its header was read."""
        for checkpoint in self._checkpoints:
            for path in changed_since(checkpoint):
                raise CheckpointError("it changed while it was being read. Try again when it rests", file=str(path))

    def explained(self, error: tuple[Any, ...]) -> Exception:
        """The pump's error in words: a read that failed, or what stopped the run altogether."""
        kind, *rest = error
        if kind == "other":
            return StorageError(f"the run stopped: {rest[0]}")
        source, code, offset, expected, done = rest
        if code:
            return StorageError(f"{self.paths[source]}: {os.strerror(code)}, reading {expected} bytes at {offset}")
        return CheckpointError(
            f"only {done} of {expected} bytes are left at byte {offset}: it was cut or replaced while it was being "
            "read. Try again when it rests",
            file=str(self.paths[source]),
        )


def _mapped_key(checkpoint: int, entry: MappedEntry) -> tuple[int, int, int]:
    """Tensors that are one in the file, as tied ones are, are moved once."""
    return checkpoint, entry.file, entry.start


@contextmanager
def storage(path: Path, kind: type[StorageError] = StorageError) -> Iterator[None]:
    """What the operating system refuses inside is raised as `kind`, with the path and what to do."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path}: {error.strerror}{remedy(error.errno)}") from None


def remedy(code: int | None) -> str:
    """What to do about an error of the operating system, where that is known."""
    if code == errno.EFBIG:
        return ". This file system or ulimit allows only smaller files: --max-shard-size 1GB, say"
    if code == errno.EMFILE:
        return ". Allow more open files (ulimit -n), or make fewer and larger shards"
    return ". Free some space, or choose another folder" if code in (errno.ENOSPC, errno.EDQUOT) else ""


def _allow_files(count: int) -> None:
    """Raise this process's soft limit on open files, up to the hard one, if `count` more do not fit."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _SPARE_FDS
    if soft != resource.RLIM_INFINITY and wanted > soft:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
