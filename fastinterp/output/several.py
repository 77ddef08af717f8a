"""The outputs of one run, finished together."""

from __future__ import annotations

from collections.abc import Sequence

from fastinterp.errors import OutputError
from fastinterp.output.folder import OutFolder


def commit_all(folders: Sequence[OutFolder]) -> None:
    """Finish several outputs of one run.

    No output gets its name before all are complete and say so, so that a run which is killed leaves all or none of
    them to the next one.
    Raises: OutputError, which names the outputs that are in place.
    """
    begun: list[OutFolder] = []
    placed: list[OutFolder] = []
    folders = [folder for folder in folders if not folder.finished]
    try:
        for folder in folders:
            begun.append(folder)
            folder.begin_finish()
    except BaseException:
        for folder in begun:
            folder.withdraw()
        raise
    try:
        for folder in folders:
            folder.place()
            placed.append(folder)
        for folder in folders:
            folder.end_finish()
    except OutputError as error:
        for folder in folders[len(placed) :]:
            folder.withdraw()
        finished = ", ".join(f.name for f in placed if f.name not in str(error))
        raise OutputError(f"{error}; finished before that: {finished}" if finished else str(error)) from error
