"""An output folder that several processes fill, perhaps on several machines, and that outlives them.

The first process opens it and finishes it, as any other output folder; the others write into its temporary files, whose
names all of them know. A file that is complete, and on the disk, has a journal beside it; when a run ends before its
time, what has a journal is kept, and the next run of the same merge goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.regular_file import fsync, read_regular
from fastinterp.errors import OutputError
from fastinterp.output.folder import SHARED, OutFolder
from fastinterp.output.names import hidden, place_of


class SharedFolder(OutFolder):
    """The folder as the first process has it.

    key  12 hexadecimal digits: of the merge, its inputs included. What is left of another merge is refused

    Other arguments and errors are those of OutFolder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inputs: Sequence[str | os.PathLike[str]],
        key: str,
        *,
        force: bool = False,
        durable: bool = False,
        needed: int = 0,
        names: Iterable[str] = (),
    ):
        super().__init__(path, inputs, force=force, durable=durable, needed=needed, names=names)
        self._ending = _ending(key)
        self._key = key

    def _create(self, path: Path) -> None:
        if not os.path.lexists(path):  # else an earlier run has made it
            super()._create(path)

    def _undo(self) -> None:
        if self._complete() or not any(name.endswith(f".done{self._ending}") for name in self._entries_or_none()):
            super()._undo()
        else:
            self._deactivate()

    def _clean_up(self) -> None:
        for name in self._entries_or_none():  # journals, and those that somebody died over
            if name.endswith(self._ending):
                os.unlink(self.path / name)
        super()._clean_up()

    def _entries_or_none(self) -> list[str]:
        return self._entries() if self.path.is_dir() else []


def shared_file(out: str | os.PathLike[str], name: str, key: str) -> Path:
    """Where `name` is written until the folder is finished."""
    folder, file = place_of(out)
    return hidden(Path(os.path.realpath(folder)), file or name, _ending(key))


def write_journal(out: str | os.PathLike[str], name: str, key: str, content: bytes) -> None:
    """Note that `name` is complete; it is made to last first.

    Raises: OutputError.
    """
    path = _journal(out, name, key)
    draft = path.with_name(f"{path.name.removesuffix(_ending(key))}.{os.getpid()}-{os.urandom(4).hex()}{_ending(key)}")
    try:
        fsync(shared_file(out, name, key))
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
        fsync(path.parent)
    except OSError as error:
        raise OutputError(
            f"{os.fspath(out)}: the journal of {quote(name)} cannot be written: {error.strerror}"
        ) from None


def read_journal(out: str | os.PathLike[str], name: str, key: str) -> bytes | None:
    """What was noted of `name`; None if it is not complete."""
    path = _journal(out, name, key)
    return read_regular(str(path)) if os.path.lexists(path) else None


def _journal(out: str | os.PathLike[str], name: str, key: str) -> Path:
    path = shared_file(out, name, key)
    return path.with_name(f"{path.name.removesuffix(_ending(key))}.done{_ending(key)}")


def stands(out: str | os.PathLike[str], name: str, key: str, size: int) -> bool:
    """Whether `name`, before the folder is finished, is there and has so many bytes."""
    try:
        return os.stat(shared_file(out, name, key), follow_symlinks=False).st_size == size
    except OSError:
        return False


def reserved(out: str | os.PathLike[str], key: str) -> int:
    """Bytes of the disk that an earlier run of the same merge has taken, and this one takes over."""
    total = 0
    for path in _below(out):
        if path.name.endswith(_ending(key)):
            with suppress(OSError):
                total += path.lstat().st_blocks * 512
    return total


def journals(out: str | os.PathLike[str]) -> int:
    """How many files are complete in a folder that is not finished."""
    _, file = place_of(out)
    names = (path.name for path in _below(out))
    return sum(f".done.partial-0-{SHARED}-" in n and (file is None or n.startswith(f".{file}.")) for n in names)


def _below(out: str | os.PathLike[str]) -> Iterator[Path]:
    """The files in the folder of an output, and in the folders in it."""
    folder, file = place_of(out)
    for path, folders, names in os.walk(folder):
        yield from (Path(path, name) for name in names)
        if file is not None:
            folders.clear()


def _ending(key: str) -> str:
    return f".partial-0-{SHARED}-{key}"
