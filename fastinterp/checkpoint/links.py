"""Small files of a model that are links: which of them are followed."""

from __future__ import annotations

import os
from pathlib import Path

from fastinterp.checkpoint.names import quote, shell_word
from fastinterp.errors import CheckpointError


def refuse_outside(path: Path, root: Path) -> None:
    """Refuse to copy a file that is a link out of its model: an output that is published would hold a stranger's file.

    root  the model's folder. Links within it, and those of the Hub's cache to its blobs, are followed
    Raises: CheckpointError, with the command that puts a copy in the place of the link.
    """
    if not path.is_symlink():
        return
    target = Path(os.path.realpath(path))
    inside = [Path(os.path.realpath(folder)) for folder in (root, path.parent)]
    inside += [blobs for folder in inside if (blobs := _blobs(folder)) is not None]
    if any(target.is_relative_to(folder) for folder in inside):
        return
    raise CheckpointError(
        f"it is a link out of the model's folder, to {quote(target)}, and what is in it would be in the output. "
        "If that is intended, put a copy in its place: "
        f"`cp --remove-destination {shell_word(target)} {shell_word(path)}`",
        file=str(path),
    )


def _blobs(folder: Path) -> Path | None:
    """The folder of the blobs, if `folder` is a snapshot in the Hub's cache, or in one."""
    for parent in (folder, *folder.parents):
        if parent.parent.name == "snapshots" and (parent.parent.parent / "blobs").is_dir():
            return parent.parent.parent / "blobs"
    return None
