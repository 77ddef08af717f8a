"""Readers and outputs that are not finished: what a folder is then, and what ends it. Nothing is written here."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastinterp.checkpoint.journal_file import FINISHING, Begin, begun_of, journal_path, state_of
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.regular_file import stamp_of
from fastinterp.errors import CheckpointError

T = TypeVar("T")
_TIMES = 3  # that a folder is read which changes meanwhile


def read_steady(name: str, root: Path, read: Callable[[], T], unchanged: Callable[[T], bool]) -> T:
    """What `read` reads in the folder `root`: not partly before and partly after a new output got its place there.

    name       of the checkpoint, for messages
    unchanged  whether the files are still those that were read
    Raises: CheckpointError, if an output is being put in place there; what `read` raises.
    """
    for attempt in range(_TIMES):
        before = _state(name, root)
        try:
            found = read()
        except CheckpointError:
            if _state(name, root) == before:
                raise
            continue
        if (_state(name, root) == before and unchanged(found)) or attempt + 1 == _TIMES:
            return found
    raise CheckpointError(f"it changed each of {_TIMES} times that it was read. Run this again", file=name)


def _state(name: str, root: Path) -> int | None:
    """What tells one output that is written here from another one; None, if there is none."""
    path = journal_path(root)
    if state_of(path) == FINISHING:
        raise CheckpointError(
            "an output is put in place here just now, or was when its process died: the folder is neither the old nor "
            f"the new checkpoint. Wait a moment; if it stays like this, {what_ends(begun_of(path))}",
            file=name,
        )
    stamp = stamp_of(path)
    return stamp and stamp[-1]


def about_unfinished(root: Path, file: str | None = None) -> str:
    """About an output that is not there yet, the folder `root` or the file in it; empty, if none is being written."""
    path = journal_path(root, file)
    if state_of(path) is None:
        return ""
    return f"a merge into it is not finished: if it is not running, {what_ends(begun_of(path))}"


def what_ends(begun: Begin | None) -> str:
    """Which command ends what a run that died began."""
    if begun is None or not begun.command:
        return "run what wrote it once more, and that ends it"
    where = f" in {shlex.quote(begun.cwd)}" if begun.cwd else ""
    return f"run this{where}, and that ends it: {quote(shlex.join(begun.command), 1 << 16)}"
