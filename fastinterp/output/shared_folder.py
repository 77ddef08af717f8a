"""An output folder that several processes fill, perhaps on several machines, and that outlives them.

The first process opens it and finishes it, as any other output folder; the others write into its temporary files, whose
names all of them know. A file that is complete, and on the disk, has a note of that beside it; when a run ends before
its time, what has one is kept, and the next run of the same merge goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from fastinterp.checkpoint.journal_file import PARTIAL, shortened, temporary, temporary_of
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.regular_file import fsync, read_regular
from fastinterp.errors import OutputError, StorageError
from fastinterp.output.folder import OutFolder
from fastinterp.output.leftovers import DONE, ROUNDS
from fastinterp.output.names import place_of
from fastinterp.presence import is_there, look, walk


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
        super().__init__(path, inputs, force=force, durable=durable, needed=needed, names=names, merge=key)
        self._run = key

    def _create(self, path: Path) -> None:
        if not is_there(path):  # else an earlier run has made it
            super()._create(path)

    def _undo(self) -> None:
        if self.journal is not None and self.journal.finishing is None and self._kept(self.journal):
            self._close()
        else:
            super()._undo()


def shared_file(out: str | os.PathLike[str], name: str, key: str) -> Path:
    """Where `name` is written until the folder is finished."""
    folder, file = place_of(out)
    return temporary(Path(os.path.realpath(folder)), file or name, PARTIAL, key)


def write_note(out: str | os.PathLike[str], name: str, key: str, content: bytes) -> None:
    """Note that `name` is complete; it is made to last first.

    Raises: OutputError.
    """
    path = _note(out, name, key)
    draft = _beside(out, name, key, f"{os.getpid()}-{os.urandom(4).hex()}")
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
            f"{os.fspath(out)}: the note that {quote(name)} is complete cannot be written: {error.strerror}"
        ) from None


def read_note(out: str | os.PathLike[str], name: str, key: str) -> bytes | None:
    """What was noted of `name`; None if it is not complete."""
    path = _note(out, name, key)
    return read_regular(str(path)) if is_there(path) else None


def journal_of_file(out: str | os.PathLike[str], name: str, key: str) -> Path:
    """The journal of what is finished of `name`."""
    return _beside(out, name, key, ROUNDS)


def _note(out: str | os.PathLike[str], name: str, key: str) -> Path:
    return _beside(out, name, key, DONE)


def _beside(out: str | os.PathLike[str], name: str, key: str, what: str) -> Path:
    """`.NAME.WHAT.partial-KEY`; `.NAME.partial-KEY` is the file itself."""
    path = shared_file(out, name, key)
    _, dot, ending = path.name.rpartition(f".{PARTIAL}-")
    return path.with_name(f"{path.name.removesuffix(dot + ending)}.{what}{dot}{ending}")


def stands(out: str | os.PathLike[str], name: str, key: str, size: int) -> bool:
    """Whether `name`, before the folder is finished, is there and has so many bytes."""
    path = shared_file(out, name, key)
    try:
        info = look(path, links=False)
    except OSError as error:
        raise StorageError(f"{path}: it cannot be looked at: {error.strerror}") from None
    return info is not None and info.st_size == size


def reserved(out: str | os.PathLike[str], key: str) -> int:
    """Bytes of the disk that an earlier run of the same merge has taken, and this one takes over."""
    total = 0
    for path in _below(out):
        match = temporary_of(path.name)
        if match is not None and match[2] == key:
            with suppress(OSError):
                total += path.lstat().st_blocks * 512
    return total


def complete_files(out: str | os.PathLike[str]) -> int:
    """How many files are complete in a folder that is not finished."""
    _, file = place_of(out)
    found = filter(None, (temporary_of(path.name) for path in _below(out)))
    of = [of.removesuffix(f".{DONE}") for of, what, _ in found if what == PARTIAL and of.endswith(f".{DONE}")]
    return sum(file is None or name == shortened(file) for name in of)


def _below(out: str | os.PathLike[str]) -> Iterator[Path]:
    """The files in the folder of an output, and in the folders in it."""
    folder, file = place_of(out)
    for path, folders, names in walk(folder):
        yield from (Path(path, name) for name in names)
        if file is not None:
            folders.clear()
