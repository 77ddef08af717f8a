"""The files in the folder of an output: what belongs to the user, and what a run that died left there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fastinterp.checkpoint.journal_file import PARTIAL, SUBFOLDER, Subfolder, journal_of, shortened, temporary_of
from fastinterp.checkpoint.names import TEMPLATES
from fastinterp.output.journal import Journal
from fastinterp.output.names import subfolders
from fastinterp.presence import is_link, is_real_folder

# `.NAME.done.partial-RUN` notes that a file is complete, `.NAME.rounds.partial-RUN` what is finished of it:
# shared_folder.py
DONE, ROUNDS = "done", "rounds"


def entries(root: Path, names: Iterable[str]) -> list[str]:
    """Names in the folder, and in those folders in it that the files `names` are in. Raises: OSError."""
    found: list[str] = []
    folders = subfolders((*names, f"{TEMPLATES}/"))
    for folder in ("", *folders):
        path = root / folder
        if not folder or is_real_folder(path):
            inside = (f"{folder}/{n}" if folder else n for n in os.listdir(path))
            found += (n for n in inside if n not in folders or is_link(root / n))
    return sorted(found)


def left_by_runs(root: Path, file: str | None, names: Iterable[str]) -> list[str]:
    """Of `names`, in the folder `root`, the temporary files and the journal of the output itself: not those of other
    outputs, which are files in the same folder.

    file  the output, if it is one file
    """
    every = list(names)
    journals = {of for of in map(journal_of, every) if of}
    own = shortened(file) if file else None
    found = []
    for name in every:
        if "/" not in name and journal_of(name) == (own or ""):
            found.append(name)
        match = temporary_of(name)
        if match is None or match[1] != PARTIAL:
            continue
        of = match[0]
        others = (j for j in journals if j != own and (of == j or of.startswith(f"{j}.")))
        if of == own or ((own is None or of.startswith(f"{own}.")) and not any(others)):
            found.append(name)
    return found


def remove(
    root: Path, file: str | None, names: Iterable[str], journal: Journal, *, keep: str = "", folders: bool = True
) -> None:
    """Remove the temporary files of runs that died, and the folders that they made. The journal stays.

    names    of the files that will be written
    journal  locked: so nobody writes here
    keep     the number of a run whose files stay
    folders  the folders that its run made go, too, if they are empty
    """
    noted = journal.read(SUBFOLDER, Subfolder)
    with suppress(OSError):  # each is of no use to anybody, and harms nobody
        for name in left_by_runs(root, file, entries(root, [*names, *(f"{s.name}/" for s in noted)])):
            match = temporary_of(name)
            if match is not None and match[2] != keep:
                with suppress(OSError):
                    os.unlink(root / name)
    if folders:
        for folder in reversed([s.name for s in noted if s.made]):
            with suppress(OSError):  # not empty: somebody put something there
                os.rmdir(root / folder)


def complete_files(root: Path, file: str | None, names: Iterable[str], run: str) -> int:
    """How many files several processes have noted as complete, or finished in part, in a run that is not finished.

    Raises: OSError.
    """
    found = map(temporary_of, left_by_runs(root, file, entries(root, names)))
    return sum(
        match is not None and match[2] == run and match[0].endswith((f".{DONE}", f".{ROUNDS}")) for match in found
    )


def reserved(root: Path, file: str | None, names: Iterable[str], run: str) -> int:
    """Bytes of the disk that the temporary files of a run have taken. Raises: OSError."""
    total = 0
    for name in left_by_runs(root, file, entries(root, names)):
        match = temporary_of(name)
        if match is not None and match[2] == run:
            with suppress(OSError):
                total += os.lstat(root / name).st_blocks * 512
    return total
