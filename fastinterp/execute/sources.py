"""The input files while they are read: opened once each, and what can go wrong with them put into words."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from fastinterp.backends.cpu import cached_fraction
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint, changed_since
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.ops.steps import Gathered, Operand, Stored
from fastinterp.tokenizer.embedding_rows import MappedEntry

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
        moved = {_moved_key(i, e): (i, e) for i, e in every if isinstance(e, MappedEntry)}
        needed = [checkpoints[i].files[f] for i, f in sorted({(i, e.file) for i, e in every})]
        needed += [place[0] for _, e in moved.values() for m in e.models if (place := e.sources[m])]
        needed = list(dict.fromkeys(needed))
        _allow_files(len(needed) + len(moved) + outputs)
        self.paths: list[Path] = []
        self.fds: list[int] = []
        self._checkpoints = checkpoints
        self._number: dict[Path, int] = {}
        for path in needed:
            with storage(path):
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            self._number[path] = self.add(fd, path)
        self._moved = {
            key: self._gathered(e, checkpoints[i].files[e.file], scratch, stack) for key, (i, e) in moved.items()
        }

    def add(self, fd: int, path: Path) -> int:
        """One more, which is open already."""
        self.fds.append(fd)
        self.paths.append(path)
        return len(self.fds) - 1

    def _gathered(self, entry: MappedEntry, path: Path, scratch: Path | None, stack: ExitStack) -> Operand:
        from fastinterp.execute.gather_rows import gather

        with storage(scratch or Path("a temporary file")):
            found = gather(entry, scratch, stack)
        made = None if found.made is None else self.add(found.made, path)
        code = entry.dtype.code or 0
        if found.rows is None:
            return Stored(made or 0, 0, code)
        parts = [(self._number[path], start, rows) for path, start, rows in found.parts]
        if made is not None:
            parts.append((made, 0, found.made_rows))
        return Gathered(tuple(parts), code, found.rows)

    def operand(self, checkpoint: int, entry: Entry) -> Operand:
        """A tensor as the pump takes it."""
        if isinstance(entry, MappedEntry):
            return self._moved[_moved_key(checkpoint, entry)]
        return self.stored(checkpoint, entry)

    def stored(self, checkpoint: int, entry: Entry) -> Stored:
        """The same for one whose rows are not moved."""
        number = self._number[self._checkpoints[checkpoint].files[entry.file]]
        return Stored(number, entry.start, entry.dtype.code or 0)

    def cached(self) -> bool:
        """Whether all files are known to be in the page cache, so that nothing need be read ahead."""
        return all(cached_fraction(fd, os.fstat(fd).st_size) > 0.95 for fd in self.fds)

    def refuse_changed(self, told: str = "it changed while it was being read. Try again when it rests") -> None:
        """Raises: CheckpointError, if a file of a checkpoint is not what it was when its header was read."""
        for checkpoint in self._checkpoints:
            for path in changed_since(checkpoint):
                raise CheckpointError(told, file=str(path))

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


def _moved_key(checkpoint: int, entry: MappedEntry) -> tuple[object, ...]:
    """Tensors that are one in the file, as tied ones are, are moved once into the same vocabulary; but beside models
    that are not tied, the rows that they lack come from different tensors.
    """
    sources = tuple(None if place is None else (place[0], place[1].start) for place in entry.sources)
    return checkpoint, entry.file, entry.start, id(entry.rows), sources


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
