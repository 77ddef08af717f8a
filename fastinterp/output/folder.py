"""The output folder, or the output file: what is written appears together at the end, or not at all.

Everything is written under temporary names, `.NAME.partial-...`, and renamed at the end, what makes a checkpoint
readable last. A process that is killed leaves only temporary files, which readers do not look at and the next run
removes.

An old checkpoint that is replaced is first renamed to `.NAME.old-...`, and removed when the new one is complete. If
anything fails before that, it gets its names back. If the process is killed in between, the `.old-` files stay, since
they may be the only copy: no run ever removes those of another, and the next run refuses and says how to put them back.
"""

from __future__ import annotations

import binascii
import errno
import os
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fastinterp.checkpoint.names import ASIDE, PUT_BACK, TEMPLATES, is_relative, listing, quote
from fastinterp.checkpoint.regular_file import fsync, pieces_of
from fastinterp.errors import OutputError
from fastinterp.output.names import hidden, place_of, rank, subfolders
from fastinterp.output.old_checkpoint import alive, identities, identity, old_checkpoint

_PARTIAL = re.compile(r"\..+\.partial-(?P<pid>\d+)-(?P<host>[0-9a-f]{8})-[0-9a-f]{12}", re.DOTALL)
SHARED = "ffffffff"  # in the place of a host: what several processes write together (shared_output_folder.py)
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW  # a planted link is never written through
_active: set[str] = set()  # endings of the temporary names that this process has in use


class OutFolder:
    """A context manager around writing one checkpoint into the folder `path`.

    path     ending in `.safetensors`: the output is this one file. All that else is in its folder is left alone
    inputs   files and folders that must not be touched (Checkpoint.inputs of every input)
    force    replace the checkpoint, or the regular file, that is there
    durable  fsync files and folder before the finish, so that the output outlives a crash of the machine
    needed   bytes that will be written; less free space than that is refused
    names    of the files that will be written, as far as they are known

    Names are relative to the folder: `config.json`, `unet/config.json`.
    After `commit`, `removed` names the files of an old checkpoint that were removed and not replaced.
    Raises: OutputError, from every method; CheckpointError, from `write`, if the file to copy cannot be read.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        inputs: Sequence[str | os.PathLike[str]],
        *,
        force: bool = False,
        durable: bool = False,
        needed: int = 0,
        names: Iterable[str] = (),
    ):
        self.name = os.fspath(path)
        if not self.name:
            raise OutputError("the name of the output folder is empty. Give the name of a new folder")
        folder, self.file = place_of(path)
        try:
            self.path = Path(os.path.realpath(folder))
            with suppress(FileNotFoundError, NotADirectoryError):  # it is made later, or refused with more detail
                os.lstat(self.path)
        except (OSError, ValueError) as error:  # ValueError: a NUL, or no valid Unicode
            why = getattr(error, "strerror", None) or error
            raise OutputError(f"{quote(self.name)}: this path cannot be used: {why}") from None
        self.removed: tuple[str, ...] = ()
        self._names = {self.file} if self.file else set(names)
        self._inputs, self._force, self._durable, self._needed = inputs, force, durable, needed
        self._host = f"{binascii.crc32(os.uname().nodename.encode()):08x}"
        run = f"{os.getpid()}-{self._host}-{os.urandom(6).hex()}"
        self._ending, self._old_ending = f".partial-{run}", f".old-{run}"
        self._created: list[Path] = []  # folders, outermost first
        self._temps: dict[str, Path] = {}  # final name -> temporary
        self._tried: list[str] = []  # final names whose rename was begun
        self._aside: dict[str, Path] = {}  # name of an old file -> where it is until the new checkpoint is complete
        self._done = False

    def __enter__(self) -> OutFolder:
        self._refuse_inputs()
        self._refuse_contents()
        self._refuse_full_disk()
        _active.add(self._ending)
        try:
            self._make_folders()
            # Shows that the folder can be written, and to a run that starts at the same moment that it is taken.
            self._create(self._marker)
            self._remove_leftovers(refuse_only=True)
        except BaseException:
            self._undo()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self._undo()

    def temp(self, name: str) -> Path:
        """The temporary file that becomes `name` at `commit`. It exists, empty: open it without O_CREAT or O_EXCL.

        If the output is one file, it becomes that.
        """
        name = self.file or name
        if not is_relative(name):
            raise self._error(f"{quote(name)} is not the name of a file in the folder")
        if name not in self._temps:
            if os.path.isdir(self.path / name) and not os.path.islink(self.path / name):
                raise self._error(f"{quote(name)} is a folder there, but a file of that name must be written")
            self._names.add(name)
            self._make_subfolder(os.path.dirname(name))
            path = self._hidden(name, self._ending)
            self._create(path)
            self._temps[name] = path
        return self._temps[name]

    def _hidden(self, name: str, ending: str) -> Path:
        return hidden(self.path, name, ending)

    def _make_subfolder(self, name: str) -> None:
        """Links are not followed: they may lead out of the folder."""
        folder = self.path
        for part in name.split("/") if name else ():
            folder = folder / part
            try:
                if os.path.islink(folder) or not os.path.isdir(folder):
                    os.mkdir(folder)
                    self._created.append(folder)
            except OSError as error:
                raise self._error(f"the folder {quote(name)} in it cannot be created: {error.strerror}") from error

    def write(self, name: str, content: bytes | Path) -> None:
        """Put a small file into the output: bytes, or a copy of the file at a path."""
        path = self.temp(name)
        pieces = pieces_of(str(content)) if isinstance(content, Path) else (content,)
        try:
            with open(os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW), "wb") as stream:
                for piece in pieces:
                    stream.write(piece)
        except OSError as error:
            raise self._error(f"{quote(name)} cannot be written: {error.strerror}") from error

    def commit(self) -> None:
        """Finish: move an old checkpoint aside, give every file its name, then remove the old one.

        What fails before the last name is taken back, so that the old checkpoint is there again.
        """
        try:
            self._rename_files()
            self._clean_up()
        except OSError as error:
            if self._complete():
                self._deactivate()
                what = "the output is complete, but its finish failed"
            else:
                self._undo()
                what = "the output cannot be finished"
            backups = [p.name for p in self._aside.values() if os.path.lexists(p)]
            more = f". What it replaces is kept: {listing(backups)}. {PUT_BACK}" if backups else ""
            raise self._error(f"{what}: {error.strerror}{more}") from error

    def _rename_files(self) -> None:
        if self._durable:
            for path in self._temps.values():
                fsync(path)
        if self._force:
            self._move_aside()
            if self._durable and self._aside:
                self._fsync_folders()  # a new name must not reach the disk beside an old index
        order = sorted(self._temps, key=rank)
        for name in order:
            if self._durable and name == order[-1]:
                self._fsync_folders()  # the last name must not reach the disk before the others
            self._tried.append(name)
            os.replace(self._temps[name], self.path / name)

    def _move_aside(self) -> None:
        """Weights go first and their index after them: while one of its files is missing, readers refuse it."""
        entries = self._entries()
        old, _ = ([], []) if self.file else old_checkpoint(self.path, entries, self._names)
        self.removed = tuple(n for n in old if n not in self._temps)
        for name in (*old, *(n for n in entries if n in self._temps and n not in old)):
            aside = self._hidden(name, self._old_ending)
            self._aside[name] = aside
            os.replace(self.path / name, aside)

    def _placed(self, name: str) -> bool:
        """Asks the disk, because an interrupt may come between a rename and a note of it."""
        gone = name in self._tried and not os.path.lexists(self._temps[name])
        return gone and os.path.lexists(self.path / name)

    def _complete(self) -> bool:
        return bool(self._temps) and all(self._placed(n) for n in self._temps)

    def _clean_up(self) -> None:
        """The output is complete: make it last, then remove what it replaced."""
        if self._durable and self._aside:
            self._fsync_folders()
        for path in (*self._aside.values(), self._marker):
            with suppress(FileNotFoundError):
                os.unlink(path)
        if self._durable:
            self._fsync_folders()
            for folder in reversed(self._created):
                fsync(folder.parent)
        self._deactivate()

    def _fsync_folders(self) -> None:
        for folder in (*subfolders(self._temps), ""):
            fsync(self.path / folder)

    def _deactivate(self) -> None:
        self._done = True
        _active.discard(self._ending)

    @property
    def _marker(self) -> Path:
        return self._hidden(f"{self.file}.fastinterp" if self.file else "fastinterp", self._ending)

    def _error(self, message: str) -> OutputError:
        return OutputError(f"{self.name}: {message}")

    def _create(self, path: Path) -> None:
        try:
            fd = os.open(path, _FLAGS, 0o666)
            try:
                os.close(fd)
            except OSError:
                os.unlink(path)
                raise
        except OSError as error:
            raise self._error(f"the folder cannot be written to: {error.strerror}") from error

    def _make_folders(self) -> None:
        missing = []
        folder = self.path
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._created.append(folder)
        except OSError as error:
            raise self._error(f"the folder cannot be created: {error.strerror}") from error

    def _undo(self) -> None:
        """Take everything back, or, after the last name, finish. An interrupt in here may call it once more."""
        if self._complete():
            with suppress(OSError):
                self._clean_up()
        else:
            self._take_back()
        self._deactivate()

    def _take_back(self) -> None:
        for name in reversed(self._tried):
            if self._placed(name):
                with suppress(OSError):
                    os.unlink(self.path / name)
        self._tried.clear()  # from here on those names are the old files'
        for name, aside in reversed(self._aside.items()):
            with suppress(OSError):  # also those that were not moved yet
                os.replace(aside, self.path / name)
        for path in (self._marker, *self._temps.values()):
            with suppress(OSError):
                os.unlink(path)
        for folder in reversed(self._created):
            with suppress(OSError):  # not empty: somebody else put something there
                os.rmdir(folder)

    def _refuse_inputs(self) -> None:
        """Folders are compared by device and inode all the way up, so links and bind mounts do not hide anything."""
        own, out = identity(self.path), identities(self.path)
        place = identity(self.path / self.file) if self.file else None
        for name in self._inputs:
            path = Path(name)
            if path.is_dir():
                if identity(path) in out:
                    inside = "is" if identity(path) == own and not self.file else "lies inside"
                    raise self._error(f"the output {inside} the input folder {quote(path)}. {_ELSEWHERE}")
                folders = [path]
            elif self.file:  # other files in its folder are left alone
                if place is not None and identity(path) == place:
                    raise self._error(f"the output is the input {quote(path)}. {_ELSEWHERE}")
                continue
            else:
                folders = [path.parent, Path(os.path.realpath(path)).parent]
            if own and not self.file and any(own in identities(f) for f in folders):
                raise self._error(f"the output folder holds the input {quote(path)}. {_ELSEWHERE}")

    def _refuse_contents(self) -> None:
        """Refuse a folder whose contents must not be replaced; else remove the temporary files of dead runs."""
        if not self.path.is_dir():
            if os.path.lexists(self.path) or (os.path.islink(self.name) and not self.file):
                what = "it is in no folder: its parent is something else" if self.file else "this is not a folder"
                raise self._error(f"{what}, and it will not be replaced. Give the name of a new folder")
            return
        inputs = {identity(Path(p)): p for p in self._inputs}
        inputs.pop(None, None)
        entries = self._entries()
        for name in entries:
            same = inputs.get(identity(self.path / name))
            if same is not None:
                raise self._error(f"{quote(name)} there is the same file as the input {quote(same)}. {_ELSEWHERE}")
        aside = [n for n in entries if ASIDE.fullmatch(os.path.basename(n))]
        if aside:
            self._remove_leftovers(refuse_only=True)  # the run that moved them may be alive
            raise self._error(f"a merge died here while it replaced a checkpoint: {listing(aside)}. {PUT_BACK}")
        present = [n for n in entries if not _PARTIAL.fullmatch(os.path.basename(n))]
        if self.file:
            self._refuse_existing_file()
        elif present and not self._force:
            raise self._error(f"the folder is not empty: {listing(present)}. {_FORCE}")
        _, strangers = ([], []) if self.file else old_checkpoint(self.path, present, self._names)
        if strangers:
            raise self._error(
                f"the folder holds weights that no index there names: {listing(strangers)}. They would be mixed with "
                "the output, and --force does not remove them: move them away, or choose another folder"
            )
        if not os.access(self.path, os.W_OK | os.X_OK):
            read_only = os.statvfs(self.path).f_flag & os.ST_RDONLY
            why = os.strerror(errno.EROFS if read_only else errno.EACCES)
            raise self._error(f"the folder cannot be written to: {why}")
        self._remove_leftovers()

    def _refuse_existing_file(self) -> None:
        path = self.path / (self.file or "")
        if not os.path.lexists(path):
            return
        if os.path.isdir(path):
            raise self._error("this is a folder, but the name ends as that of a file. Give another name")
        if os.path.islink(path) or not os.path.isfile(path):
            raise self._error("this is no regular file, and it will not be replaced. Give another name")
        if not self._force:
            raise self._error("this file exists already. Add --force (in Python force=True) to replace it")

    def _remove_leftovers(self, refuse_only: bool = False) -> None:
        """Remove temporary files of runs that are dead; refuse if one may be alive."""
        for name in self._entries():
            match = _PARTIAL.fullmatch(os.path.basename(name))
            if not match or name.endswith(self._ending):
                continue
            pid = int(match["pid"])
            if match["host"] == SHARED and not self._force:
                raise self._error(
                    f"a merge that several processes began is not finished: {quote(name)}. Start the same one again "
                    "with torchrun or srun, inputs and options unchanged, and it goes on; or replace it: --force"
                )
            if match["host"] not in (self._host, SHARED) and not self._force:
                raise self._error(
                    f"another machine is writing here, or died doing so: {quote(name)}. If it died: --force"
                )
            if match["host"] == self._host and alive(pid, name, _active):
                raise self._error(
                    f"process {pid} is writing here: {quote(name)}. Wait for it; if that process is something else, "
                    "remove the file"
                )
            if not refuse_only:
                with suppress(OSError):
                    os.unlink(self.path / name)

    def _refuse_full_disk(self) -> None:
        folder = self.path
        while not folder.exists():
            folder = folder.parent
        info = os.statvfs(folder)
        free = info.f_bavail * info.f_frsize
        # Some network file systems report no sizes at all.
        if info.f_blocks and free < self._needed:
            large = self._needed >= 10**9
            factor, unit = (1e9, "GB") if large else (1e6, "MB") if self._needed >= 10**6 else (1e3, "KB")
            raise self._error(
                f"not enough space: the output takes {self._needed} bytes ({self._needed / factor:.2f} {unit}), "
                f"but {free} ({free / factor:.2f} {unit}) are free. Free some, or choose another folder"
            )

    def _entries(self) -> list[str]:
        """Names in the folder, and in those folders in it that are written to; of one file, what belongs to it."""
        entries: list[str] = []
        folders = subfolders((*self._names, f"{TEMPLATES}/"))
        try:
            for folder in ("", *folders):
                path = self.path / folder
                if not folder or (path.is_dir() and not path.is_symlink()):
                    names = (f"{folder}/{n}" if folder else n for n in os.listdir(path))
                    entries += (n for n in names if n not in folders or os.path.islink(self.path / n))
        except OSError as error:
            raise self._error(f"the folder cannot be read: {error.strerror}") from error
        if self.file:
            entries = [n for n in entries if n == self.file or n.startswith(f".{self.file}.")]
        return sorted(entries)


_FORCE = "Add --force (in Python force=True) to write into it all the same"
_ELSEWHERE = "Choose another output: inputs are never overwritten, whatever the options"
