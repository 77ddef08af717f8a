"""The kinds of files of weights, by their suffixes: a reader of headers each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastinterp.checkpoint import header
from fastinterp.checkpoint.header import FileHeader
from fastinterp.checkpoint.names import GGUF, PICKLES, WEIGHTS
from fastinterp.errors import CheckpointError

# Takes the path and its index in Checkpoint.files, which becomes Entry.file. Raises: CheckpointError, naming file and
# tensor, if the file cannot be read or breaks its format in any way.
HeaderReader = Callable[[Path, int], FileHeader]


def _safetensors(path: Path, number: int) -> FileHeader:
    return FileHeader(*header.read_header(path, number))


def _pytorch(path: Path, number: int) -> FileHeader:
    from fastinterp.checkpoint.pytorch.file import read_header

    return read_header(path, number)


def _gguf(path: Path, number: int) -> FileHeader:
    from fastinterp.checkpoint.gguf_model import read_model

    entries, found = read_model(path, number)
    return FileHeader(entries, found.metadata(), gguf=found)


# By suffix. A new kind of file adds its row; its module is imported when a file of it is read.
KINDS: dict[str, HeaderReader] = {WEIGHTS: _safetensors, **dict.fromkeys(PICKLES, _pytorch), GGUF: _gguf}


def read_header(path: Path, number: int) -> FileHeader:
    """The header of a file of weights, of the kind that its suffix names. Raises: what HeaderReader does."""
    reader = next((reader for suffix, reader in KINDS.items() if path.name.endswith(suffix)), None)
    if reader is None:
        raise CheckpointError(f"this is no file of weights that is read: {', '.join(KINDS)}", file=str(path))
    return reader(path, number)
