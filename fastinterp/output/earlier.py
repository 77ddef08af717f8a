"""How far an earlier run of the same merge came, which died."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

from fastinterp._version import __version__
from fastinterp.checkpoint.journal_file import BEGIN, begun_of, journal_path, state_of
from fastinterp.checkpoint.regular_file import stamp_of
from fastinterp.output.leftovers import reserved
from fastinterp.output.names import place_of
from fastinterp.presence import is_folder


class Earlier(Enum):
    """How far the outputs of an earlier run of the same merge are, together."""

    NONE = "there was none, or all of it is in place"
    WRITING = "one of them is not complete: none is in place"
    PLACING = "all are complete: those without a journal are in place"


def earlier(outs: Iterable[str | os.PathLike[str]], merge: str) -> Earlier:
    """outs: all outputs of a run. Raises: CheckpointError, if a journal is no regular file or cannot be read."""
    steps = set()
    for out in outs:
        folder, file = place_of(out)
        path = journal_path(Path(os.path.realpath(folder)), file)
        step = state_of(path)
        begun = begun_of(path) if step is not None else None
        if begun is not None and begun.merge == merge:
            steps.add(step)
    if BEGIN in steps:
        return Earlier.WRITING
    return Earlier.PLACING if steps else Earlier.NONE


def held(outs: Iterable[tuple[str | os.PathLike[str], Sequence[str]]], merge: str) -> int:
    """Bytes of the disk that an earlier run of the same merge has taken for these outputs, and this one takes over.

    outs  each with the names of the files that will be written

    Raises: CheckpointError, as `earlier` does.
    """
    total = 0
    for out, names in outs:
        folder, file = place_of(out)
        path = journal_path(Path(os.path.realpath(folder)), file)
        begun = begun_of(path) if state_of(path) is not None else None
        if begun is not None and begun.merge == merge:
            total += reserved(Path(os.path.realpath(folder)), file, names, begun.run)
    return total


def key_of(values: object, inputs: Iterable[str | os.PathLike[str]]) -> str:
    """What tells merges apart that have no plan: a hash of their arguments and of their inputs' sizes and times.

    values  anything whose repr says all of it
    """
    import hashlib  # takes milliseconds: not on the path of `explain`

    digest = hashlib.blake2b(f"{__version__} {values!r}".encode("utf-8", "surrogatepass"), digest_size=16)
    for path in inputs:
        if not is_folder(path):
            digest.update(f"{os.fspath(path)!r} {stamp_of(path)}".encode())
    return digest.hexdigest()
