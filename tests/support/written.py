"""Small checkpoints, written as the engine writes them."""

from __future__ import annotations

import os
from pathlib import Path

from fastinterp.ops.dtypes import F32
from fastinterp.output.folder import OutFolder
from fastinterp.output.layout import make_layout

GB = 10**9


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below `folder`: contents of files, targets of links, empty for folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        link = os.readlink(path).encode() if path.is_symlink() else None
        found[str(path.relative_to(folder))] = link or (b"" if path.is_dir() else path.read_bytes())
    return found


def checkpoint(folder: Path, tensors=("a", "b", "c"), limit: int = GB) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    layout = make_layout([(t, F32, (4,)) for t in tensors], {"format": "pt"}, limit)
    for file in layout.files:
        (folder / file.name).write_bytes(file.header + bytes(file.size - len(file.header)))
    for name, content in layout.indexes.items():
        (folder / name).write_bytes(content)
    (folder / "config.json").write_text("{}")
    return folder


def write(out: OutFolder, tensors=("a", "b", "c"), limit: int = GB, value: bytes = b"\1") -> None:
    """A merge in small: temporaries, data, sidecars, commit."""
    write_files(out, tensors, limit, value)
    out.commit()


def write_files(out: OutFolder, tensors=("a", "b", "c"), limit: int = GB, value: bytes = b"\1") -> None:
    """The same without the last."""
    layout = make_layout([(t, F32, (4,)) for t in tensors], {}, limit)
    for file in layout.files:
        with open(out.temp(file.name), "r+b") as stream:
            stream.write(file.header + value * (file.size - len(file.header)))
    for name, content in layout.indexes.items():
        out.write(name, content)
    out.write("config.json", b"{}")
