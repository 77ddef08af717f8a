"""Files that are read by position, wherever they are: on the disk, or elsewhere and known by a path here all the same.

A model on the Hub has a folder on the disk, with its small files. Its weights are registered under the names that they
have there once they are downloaded: until then headers, and small tensors, are read from where they are, by ranges.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from fastinterp.checkpoint.regular_file import open_regular, read_at
from fastinterp.errors import UnreadableError
from fastinterp.presence import exists as exists_here

_AHEAD = 64 << 10  # bytes that are fetched at least, since a header is read in several small pieces
_KEPT, _LARGEST_KEPT = 16, 1 << 20  # pieces of a file that are kept, and bytes of each
_AT_ONCE = 16  # small pieces that are fetched at the same time


class RemoteFile(Protocol):
    """A file that is elsewhere.

    name     for messages
    size     in bytes
    version  what tells it from what it becomes, as its store says it; empty: nothing, or that is in its path here
    """

    @property
    def name(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def version(self) -> str: ...
    def changed(self) -> bool:
        """Whether its store says that it is another file by now. Raises: as read_into."""
        ...

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on. From several threads at once.

        Raises: StorageError, if they cannot be had; CheckpointError, if the file changed.
        """
        ...


class Fetcher(Protocol):
    """Brings files of one repository here."""

    def fetch(self, paths: Sequence[Path]) -> None: ...


_files: dict[Path, RemoteFile] = {}
_fetchers: dict[Path, Fetcher | None] = {}
_progress: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]] = nullcontext
_streaming: ContextVar[bool] = ContextVar("streaming", default=False)
_headers_only: ContextVar[bool] = ContextVar("headers_only", default=False)


def register(path: Path, file: RemoteFile, fetcher: Fetcher | None) -> None:
    """Let `path`, which is not there, stand for a file elsewhere, until it is fetched. fetcher: None: it never is"""
    _fetchers[path] = fetcher
    _files[path] = file  # last: other threads look here


def forget(folder: Path) -> None:
    """Have the files in a folder, and in those in it, stand for none elsewhere any more."""
    for path in [p for p in list(_files) if folder in p.parents]:
        del _files[path], _fetchers[path]


def find(path: str | os.PathLike[str]) -> RemoteFile | None:
    """The file elsewhere that a path stands for; None, if the path is one of the disk."""
    file = _files.get(Path(path)) if _files else None
    return None if file is None or exists_here(path) else file


def names_in(folder: Path) -> list[str]:
    """The names of the files elsewhere that are registered in a folder, and not on the disk."""
    # A list first, which other threads cannot change meanwhile.
    return [path.name for path in list(_files) if path.parent == folder and not exists_here(path)]


def exists(path: Path) -> bool:
    """Whether a file is there, or elsewhere."""
    return exists_here(path) or find(path) is not None


def is_streamed(path: Path) -> bool:
    """Whether a file is elsewhere, and is read from there when its data is: with `streaming`, or since it has no place
    here.
    """
    return find(path) is not None and (_streaming.get() or _fetchers[path] is None)


def fetch(paths: Iterable[Path]) -> None:
    """Bring those of these files that are elsewhere, and have a place here, onto the disk, where their paths say.

    Raises: StorageError, if there is no room, or they cannot be had.
    """
    by_fetcher: dict[int, tuple[Fetcher, list[Path]]] = {}
    for path in dict.fromkeys(paths):
        if find(path) is not None and (fetcher := _fetchers[path]) is not None:
            by_fetcher.setdefault(id(fetcher), (fetcher, []))[1].append(path)
    for fetcher, some in by_fetcher.values():
        fetcher.fetch(some)


def show_progress(of: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]]) -> None:
    """Have downloads shown. For programs, at their start.

    of  makes context managers, each of which shows one download: called with bytes done and to do
    """
    global _progress  # noqa: PLW0603 - one per process
    _progress = of


@contextmanager
def progress() -> Iterator[Callable[[int, int], None]]:
    """Context manager: what to call with bytes done, and bytes to do, while something is downloaded."""
    with _progress() as shown:
        yield shown or (lambda done, total: None)


@contextmanager
def headers_only() -> Iterator[None]:
    """Context manager: what is inside describes, and needs no exact answer about data elsewhere. Large tensors there
    count as equal if samples of them are.
    """
    token = _headers_only.set(True)
    try:
        yield
    finally:
        _headers_only.reset(token)


@contextmanager
def streaming(wanted: bool = True) -> Iterator[None]:
    """Context manager: what is elsewhere is read from there, never fetched as a whole. wanted: or as usual."""
    token = _streaming.set(wanted)
    try:
        yield
    finally:
        _streaming.reset(token)


def only_headers() -> bool:
    """Whether `headers_only` is in effect."""
    return _headers_only.get()


class Readable(Protocol):
    """A file that is open for reading, and its size in bytes."""

    size: int

    def pread(self, count: int, offset: int) -> bytes:
        """At most `count` bytes from `offset` on: fewer at the end, or as the system pleases. Raises: OSError."""
        ...

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """These, (offset, bytes), will be read next. A hint."""
        ...

    def close(self) -> None: ...


def open_readable(file: str) -> Readable:
    """Open a file by its path, wherever it is; the caller closes it.

    Raises: CheckpointError, naming `file`, if it cannot be opened or is not a regular file.
    """
    found = find(file)
    return _Local(file) if found is None else _Remote(found)


@contextmanager
def opened(file: str) -> Iterator[Readable]:
    """Context manager: a file by its path, wherever it is, open in the block.

    Raises: CheckpointError, naming `file`, if it cannot be opened, is not a regular file, or an OSError is raised in
    the block.
    """
    source = open_readable(file)
    try:
        try:
            yield source
        finally:
            source.close()
    except OSError as error:
        raise UnreadableError(f"the file cannot be read: {error.strerror}", file=file) from None


def read_from(source: Readable, path: str | os.PathLike[str], offset: int, count: int) -> bytes:
    """`count` bytes of an open file from `offset` on. Raises: what read_at of regular_file.py does."""
    return read_at(source.fd, path, offset, count) if isinstance(source, _Local) else source.pread(count, offset)


def read_up_to(source: Readable, path: str | os.PathLike[str], offset: int, count: int) -> bytes:
    """As many of these bytes as the file had when it was opened. Raises: what read_from does."""
    return read_from(source, path, offset, max(0, min(count, source.size - offset)))


class _Local:
    def __init__(self, file: str):
        self.fd, self.size = open_regular(file)

    def pread(self, count: int, offset: int) -> bytes:
        return os.pread(self.fd, count, offset)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None: ...

    def close(self) -> None:
        os.close(self.fd)


class _Remote:
    """Fetches somewhat more than is asked for, and keeps the last pieces."""

    def __init__(self, file: RemoteFile):
        self._file, self.size = file, file.size
        self._pieces: dict[int, bytes] = {}  # by offset

    def pread(self, count: int, offset: int) -> bytes:
        count = max(0, min(count, self.size - offset))
        for start, piece in self._pieces.items():
            if start <= offset and offset + count <= start + len(piece):
                return piece[offset - start : offset - start + count]
        wanted = max(count, min(_AHEAD, self.size - offset))
        if not count:
            return b""
        piece = self._fetched(offset, wanted)
        if len(piece) <= _LARGEST_KEPT:
            self._keep(offset, piece)
        return piece[:count]

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        from concurrent.futures import ThreadPoolExecutor

        merged: list[list[int]] = []  # first, end
        for offset, count in sorted(ranges):
            end = min(offset + count, self.size)
            if merged and offset <= merged[-1][1] + 1024:
                merged[-1][1] = max(merged[-1][1], end)
            elif offset < end:
                merged.append([offset, end])
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for (first, _), piece in zip(
                merged, pool.map(lambda span: self._fetched(span[0], span[1] - span[0]), merged), strict=True
            ):
                self._pieces[first] = piece

    def _fetched(self, offset: int, count: int) -> bytes:
        data = bytearray(count)
        self._file.read_into(memoryview(data), offset)
        return bytes(data)

    def _keep(self, offset: int, piece: bytes) -> None:
        if len(self._pieces) >= _KEPT:
            self._pieces.pop(next(iter(self._pieces)))
        self._pieces[offset] = piece

    def close(self) -> None:
        self._pieces.clear()
