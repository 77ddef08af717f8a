"""The finish of an output: its files get their names, the files that they replace go.

The record `finishing` of the journal says all of it. Every step looks at what is there and does what is missing, so the
finish may be begun by one process and ended by another; in each state between, one of these holds of every file:

    its temporary file is there        it has not got its name yet
    the temporary file is not there    the file of that name is the new one
    the old file's `.NAME.old-RUN`     the old file is there; before the first new name, all old files are

When all new files have their names, the journal says that, too, before the first old file is removed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fastinterp.checkpoint.journal_file import ASIDE, FINISHING, PARTIAL, PLACED, RUN, Finishing, temporary
from fastinterp.checkpoint.names import is_relative
from fastinterp.checkpoint.regular_file import fsync
from fastinterp.errors import OutputError
from fastinterp.output.journal import Journal, boot
from fastinterp.output.leftovers import remove
from fastinterp.output.names import subfolders
from fastinterp.presence import is_link, is_there, look


def begin_finish(root: Path, journal: Journal, record: Finishing, made: Iterable[Path]) -> None:
    """The commit point. If the record is `synced`, the contents of all files, and their temporary names, are put on the
    disk before it.

    made  folders that this run made
    Raises: OSError, OutputError; the finish has not begun then.
    """
    if record.synced:
        for name in record.names:
            fsync(temporary(root, name, PARTIAL, journal.run))
        sync_folders(root, record.names)
        for folder in made:
            with suppress(PermissionError):  # a folder that may be entered, but not read
                fsync(folder.parent)
    journal.append(FINISHING, record, sync=record.synced)


def refuse_odd(root: Path, journal: Journal) -> None:
    """Raises: OutputError, if the journal names files outside of the folder: nothing of ours wrote it."""
    record = journal.finishing or Finishing(())
    names = (*record.names, *record.aside)
    # Surrogates stand for bytes of a name that are no text, but for these, which no name has.
    odd = any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for name in names for c in name)
    linked = any(is_link(root / folder) for folder in subfolders(names))
    if odd or linked or not all(map(is_relative, names)) or not RUN.fullmatch(journal.run or "0" * 12):
        raise OutputError(
            f"{journal.path}: the journal was not written by this program. Remove it, then run this again"
        )


def complete(root: Path, journal: Journal) -> bool:
    """Whether the finish that an earlier process began may be ended: all files are there, and their contents, too, are
    what they were when it began.
    """
    record = journal.finishing
    assert record is not None
    sure = record.synced or record.boot == boot()
    return sure and all(
        is_there(temporary(root, name, PARTIAL, journal.run)) or _is_new(root, name, journal, record)
        for name in record.names
    )


def _is_new(root: Path, name: str, journal: Journal, record: Finishing) -> bool:
    """Whether a file without a temporary one has its name."""
    info = look(root / name, links=False)
    if info is None:
        return False
    if record.replaces:
        return info.st_ino != record.replaces
    return journal.placed or name not in record.aside or is_there(temporary(root, name, ASIDE, journal.run))


def place(root: Path, journal: Journal) -> None:
    """Move the old files aside, give the new ones their names. Raises: OSError, OutputError."""
    record = journal.finishing
    assert record is not None
    if journal.placed:
        return
    new = set(record.names)
    for name in record.aside:
        aside = temporary(root, name, ASIDE, journal.run)
        waits = name not in new or is_there(temporary(root, name, PARTIAL, journal.run))
        if waits and not is_there(aside) and is_there(root / name):
            os.replace(root / name, aside)
    for name in record.names:
        temp = temporary(root, name, PARTIAL, journal.run)
        if is_there(temp):
            os.replace(temp, root / name)
    if record.synced:
        sync_folders(root, record.names)
    if record.aside:
        journal.append(PLACED, None, sync=record.synced)


def end_finish(root: Path, file: str | None, journal: Journal) -> None:
    """After `place`: remove the old files, and whatever temporary files there are, then the journal. Raises: OSError.

    file  the output, if it is one file
    """
    record = journal.finishing
    assert record is not None
    remove(root, file, record.names, journal, folders=False)
    for name in record.aside:
        with suppress(FileNotFoundError):
            os.unlink(temporary(root, name, ASIDE, journal.run))
    if record.synced and record.aside:
        sync_folders(root, record.aside)
    journal.remove()
    if record.synced:
        fsync(root)


def take_back(root: Path, journal: Journal) -> None:
    """Undo `place` step by step, from wherever it is: new files have temporary names again, old ones theirs.

    No file is removed. If all files have their names, nothing is done.
    Raises: OSError, OutputError, if something stays undone: the finish can be ended then.
    """
    record = journal.finishing
    assert record is not None
    if journal.placed:
        return
    for name in reversed(record.names):
        temp = temporary(root, name, PARTIAL, journal.run)
        if not is_there(temp) and _is_new(root, name, journal, record):
            os.replace(root / name, temp)
    for name in reversed(record.aside):
        aside = temporary(root, name, ASIDE, journal.run)
        if is_there(aside):
            os.replace(aside, root / name)
    if record.synced:
        sync_folders(root, record.names)
    journal.withdraw(sync=record.synced)


def sync_folders(root: Path, names: Iterable[str]) -> None:
    """Wait until the names in the folder, and in those in it that `names` are in, are on the disk. Raises: OSError."""
    for folder in (*reversed(subfolders(names)), ""):
        if look(root / folder) is not None:
            fsync(root / folder)
