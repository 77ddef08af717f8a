"""Names in an output folder: those of folders in it, and the order in which files get theirs."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fastinterp.checkpoint.names import GGUF, PIPELINES, WEIGHTS, names_file


def place_of(path: str | os.PathLike[str]) -> tuple[str, str | None]:
    """The folder of an output, and the name of the file in it, if the output is one file."""
    text = os.fspath(path)
    return (os.path.dirname(text) or ".", os.path.basename(text)) if names_file(text) else (text, None)


def subfolders(names: Iterable[str]) -> list[str]:
    """The folders that these names are in, and those above, below that of the output: outermost first."""
    parts = {tuple(name.split("/")[:-1]) for name in names}
    return sorted({"/".join(p[:i]) for p in parts for i in range(1, len(p) + 1)})


def rank(name: str) -> tuple[int, str]:
    """Order of the renames: what readers look for first comes last."""
    if name in PIPELINES:
        return 3, name
    return (2 if name.endswith(".index.json") else 1 if name.endswith((WEIGHTS, GGUF)) else 0), name
