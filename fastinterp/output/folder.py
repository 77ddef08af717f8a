"""The output folder, or the output file: what is written appears together at the end, or not at all.

Everything is written under temporary names, `.NAME.partial-RUN`. When all of it is complete, the journal says so, and
the files get their names, what makes a checkpoint readable last; an old checkpoint that is replaced is moved aside
before, and removed after. A process that is killed leaves a journal. The next run into the folder ends the finish that
the journal says was begun; else it goes on with what is there, if it is the same merge, or removes it. Nothing needs to
be put in order by hand.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from fastinterp.checkpoint.journal_file import PARTIAL, SUBFOLDER, Finishing, Subfolder, temporary
from fastinterp.checkpoint.names import is_relative, quote
from fastinterp.checkpoint.regular_file import pieces_of
from fastinterp.checkpoint.unfinished import what_ends
from fastinterp.errors import OutputError, UnreadableError
from fastinterp.output import refusals
from fastinterp.output.earlier import Earlier
from fastinterp.output.finish import begin_finish, complete, end_finish, place, refuse_odd, take_back
from fastinterp.output.journal import Busy, Journal, begin, boot, take_over
from fastinterp.output.leftovers import complete_files, remove, reserved
from fastinterp.output.names import rank, subfolders
from fastinterp.output.old_checkpoint import not_of_receipt
from fastinterp.output.place import Place
from fastinterp.presence import is_real_folder, is_there

MENDED = "a run that had died had completed it: it is in place now"
_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW  # a planted link is never written through


class OutFolder(Place):
    """A context manager around writing one checkpoint into the folder `path`.

    path     ending in `.safetensors` or `.gguf`: the output is this one file. All that else is in its folder is left
             alone
    inputs   files and folders that must not be touched (Checkpoint.inputs of every input)
    force    replace the checkpoint, or the regular file, that is there
    durable  the output is on the disk before it appears, so that it outlives a crash of the machine; so is one that
             replaces an older one, in any case
    needed   bytes that will be written; less free space than that is refused
    names    of the files that will be written, as far as they are known
    merge    what tells merges apart: the same text, the same output. Empty: unknown, and nothing is resumed
    differs  called with the journal of an unfinished output of another merge: says how that one differs
    earlier  how far the outputs of an earlier run of this merge are together, if there are several

    Names are relative to the folder: `config.json`, `unet/config.json`.

    journal   held while the output is written
    ended     the journal of the earlier run, of which there are only the records
    resumed   an unfinished output of this merge is there, and this run goes on with its temporary files
    finished  the output of this merge was complete, and has got its names. It may be left at that, or, with `anew`,
              be written again
    mended    what was done about an earlier run, in a line for people; empty: nothing
    removed   after the finish: the files of an old checkpoint that were removed and not replaced
    replaced  and the files that were replaced, of a checkpoint or not; without those that the receipt there lists

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
        merge: str = "",
        differs: Callable[[Journal], str] | None = None,
        earlier: Earlier = Earlier.NONE,
    ):
        super().__init__(path, inputs, names)
        self.journal: Journal | None = None
        self.ended: Journal | None = None
        self.resumed = self.finished = False
        self.mended = ""
        self.removed: tuple[str, ...] = ()
        self.replaced: tuple[str, ...] = ()
        self._force, self._durable, self._needed = force, durable, needed
        self._merge, self._differs, self._earlier = merge, differs, earlier
        self._run: str | None = None  # the number of the run; None: drawn at random
        self._temps: dict[str, Path] = {}  # final name -> temporary
        self._subfolders: set[str] = set()
        self._done = False

    # ---- before anything is written ---------------------------------------------------------------------------------

    def __enter__(self) -> OutFolder:
        try:
            self._refuse(refusals.about_inputs(self.path, self.file, self._inputs))
            self._refuse(refusals.about_place(self.name, self.path, self.file))
            found = self._left_over()
            if not self.finished:
                self._begin(found)
        except (OSError, UnreadableError) as error:
            raise self._error(f"the folder cannot be read: {_reason(error)}") from error
        return self

    def anew(self) -> None:
        """Write an output that is finished once more."""
        self.finished, self._force = False, True
        self._begin(None)

    def _left_over(self) -> Journal | None:
        """The journal of a run that died, locked, unless it is done with: a finish that the run began is ended."""
        try:
            found = take_over(self._journal_path, force=self._force)
        except Busy as error:
            raise self._error(str(error)) from None
        if found is None:
            self.finished = self._earlier is Earlier.PLACING and not self._is_new()
            return None
        try:
            refuse_odd(self.path, found)
            together = self._same(found) and self._earlier is Earlier.WRITING  # and so this one is not in place either
            if found.finishing is not None and not together and complete(self.path, found):
                self._end_finish_of(found)
                return None
            if found.finishing is not None:
                take_back(self.path, found)
            self._refuse(self._about_unfinished(found))
        except BaseException:
            found.close()
            raise
        return found

    def _end_finish_of(self, found: Journal) -> None:
        try:
            place(self.path, found)
            end_finish(self.path, self.file, found)
        except (OSError, OutputError) as error:
            raise self._error(
                f"a run that died had completed the output, but it cannot be put in place: {_reason(error)}"
            ) from error
        self.ended = found
        self.finished = self._same(found)
        self.mended = MENDED

    def _same(self, found: Journal | None) -> bool:
        """Whether a journal is of this merge."""
        return found is not None and bool(self._merge) and found.begun.merge == self._merge

    def _about_unfinished(self, found: Journal) -> str:
        """Why the rest of a run that died is not thrown away, if another run can go on with it."""
        if self._force or self._same(found) or not self._kept(found):
            return ""
        how = self._differs(found) if self._differs else ""
        return (
            f"another merge is not finished here{f' ({how})' if how else ''}. To throw it away, add --force (in Python "
            f"force=True); to finish it, {what_ends(found.begun)}"
        )

    def _kept(self, found: Journal) -> bool:
        """Whether a run that died left anything that its merge can be resumed from."""
        return found.notes or complete_files(self.path, self.file, self._names, found.run) > 0

    def _begin(self, found: Journal | None) -> None:
        """From here on the output belongs to this run. found: the journal that is there"""
        self.resumed, self.journal = self._same(found), found
        try:
            if found is not None and not self.resumed:
                remove(self.path, self.file, self._names, found)
            self._refuse(self._about_contents(force=self._force))
            held = reserved(self.path, self.file, self._names, found.run) if found is not None and self.resumed else 0
            self._refuse(refusals.about_space(self.path, max(0, self._needed - held)))
            self._make_folders()
            self._refuse_name()
            self._hold()
            self._refuse(self._about_contents(force=self._force))  # another run may have ended since
            remove(self.path, self.file, self._names, self._held, keep=self._held.run, folders=False)
        except BaseException:
            if self.resumed:
                self._close()
            else:
                self._undo()
            raise

    def _hold(self) -> None:
        try:
            if self.journal is None:
                self.journal = begin(self._journal_path, self._merge, self._run)
            elif self.resumed:
                self.journal.go_on()
            else:
                self.journal.begin(self._merge, self._run)
        except Busy as error:
            raise self._error(str(error)) from None
        except OSError as error:
            raise self._error(f"the folder cannot be written to: {error.strerror}") from error

    def _refuse(self, reason: str) -> None:
        if reason:
            raise self._error(f"{self.mended}. Now {reason}" if self.mended else reason)

    @property
    def _held(self) -> Journal:
        assert self.journal is not None  # it is entered
        return self.journal

    # ---- while it is written ----------------------------------------------------------------------------------------

    def temp(self, name: str) -> Path:
        """The temporary file that becomes `name` at the finish. It exists: open it without O_CREAT or O_EXCL.

        It is empty, unless the output is resumed. If the output is one file, it becomes that.
        """
        name = self.file or name
        if not is_relative(name):
            raise self._error(f"{quote(name)} is not the name of a file in the folder")
        if name not in self._temps:
            if is_real_folder(self.path / name):
                raise self._error(f"{quote(name)} is a folder there, but a file of that name must be written")
            self._names.add(name)
            self._make_subfolder(os.path.dirname(name))
            path = temporary(self.path, name, PARTIAL, self._held.run)
            self._create(path)
            self._temps[name] = path
        return self._temps[name]

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

    def _create(self, path: Path) -> None:
        if self.resumed and is_there(path):
            return
        try:
            fd = os.open(path, _FLAGS, 0o666)
            try:
                os.close(fd)
            except OSError:
                os.unlink(path)
                raise
        except OSError as error:
            raise self._error(f"the folder cannot be written to: {error.strerror}") from error

    def _make_subfolder(self, name: str) -> None:
        """Links are not followed: they may lead out of the folder."""
        for folder in subfolders([f"{name}/"]) if name else ():
            path = self.path / folder
            try:
                missing = not is_real_folder(path)
                if folder not in self._subfolders:
                    self._subfolders.add(folder)
                    self._held.append(SUBFOLDER, Subfolder(folder, missing))
                if missing:
                    os.mkdir(path)
                    self._created.append(path)
            except OSError as error:
                raise self._error(f"the folder {quote(folder)} in it cannot be created: {error.strerror}") from error

    # ---- the finish -------------------------------------------------------------------------------------------------

    def commit(self) -> None:
        """Finish: move an old checkpoint aside, give every file its name, then remove the old one."""
        self.begin_finish()
        self.place()
        self.end_finish()

    def begin_finish(self) -> None:
        """The commit point: from here on every run that comes by ends the finish. Before it, nothing is changed."""
        names = tuple(sorted(self._temps, key=rank))
        try:
            aside = self._replaced(self._temps) if self._force else ()
            replaced = not_of_receipt(self.path, [n for n in aside if n in self._temps])
            inode = os.lstat(self.path / self.file).st_ino if self.file and not self._is_new() else 0
            sync = self._durable or bool(aside) or bool(inode)
            made = [self.path, *self.path.parents[:-1]] if self.resumed else self._created
            begin_finish(self.path, self._held, Finishing(names, aside, sync, boot(), inode), made)
        except (OSError, OutputError, UnreadableError) as error:
            raise self._error(f"the output cannot be finished: {_reason(error)}") from error
        self.removed = tuple(n for n in aside if n not in self._temps)
        self.replaced = replaced

    def withdraw(self) -> None:
        """Take back `begin_finish`."""
        if self.journal is not None and self.journal.finishing is not None:
            with suppress(OSError, OutputError):  # it is ended then
                take_back(self.path, self.journal)

    def place(self) -> None:
        """Put the output in place. What fails is taken back, so that the old checkpoint is there again."""
        try:
            place(self.path, self._held)
        except (OSError, OutputError) as error:
            self.withdraw()
            raise self._error(f"the output cannot be finished: {_reason(error)}{self._left()}") from error

    def end_finish(self) -> None:
        """Remove what the output replaced, and the journal."""
        try:
            end_finish(self.path, self.file, self._held)
        except OSError as error:
            self._undo()
            reason = f"the output is complete, but its finish failed: {error.strerror}{self._left()}"
            raise self._error(reason) from error
        self._close()

    def _left(self) -> str:
        """What a finish that failed left, and what to do, as the end of a message."""
        if self._held.finishing is None or self._held.removed:
            return ""
        return ". It is complete, and the next run into it puts it in place: run this again"

    def leave(self) -> None:
        """Leave the output as it is, to be resumed, unless its finish has begun."""
        if self.journal is not None and self.journal.finishing is None:
            self._close()

    # ---- the end ----------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done and not self.finished:
            self._undo()

    def _undo(self) -> None:
        """Take everything back, or, after the commit point, finish. What an interrupt stops here, the next run does."""
        try:
            if self.journal is not None and self.journal.finishing is not None:
                with suppress(OSError, OutputError):
                    place(self.path, self.journal)
                    end_finish(self.path, self.file, self.journal)
            else:
                self._take_back()
        finally:
            self._close()

    def _take_back(self) -> None:
        if self.journal is not None:
            with suppress(OSError):
                self.journal.settle(sync=self._durable or self._force)  # before any file that it speaks of is gone
        for path in self._temps.values():
            with suppress(OSError):
                os.unlink(path)
        if self.journal is not None:
            remove(self.path, self.file, self._names, self.journal)
            with suppress(OSError):
                self.journal.remove()
        for folder in reversed(self._created):
            with suppress(OSError):  # not empty: somebody else put something there
                os.rmdir(folder)

    def _close(self) -> None:
        self._done = True
        if self.journal is not None:
            self.journal.close()


def _reason(error: OSError | OutputError | UnreadableError) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) else str(error)
