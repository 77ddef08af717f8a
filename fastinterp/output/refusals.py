"""What an output is refused for, before anything is written: inputs, what is in its place, a full disk."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from fastinterp.checkpoint.names import listing, quote
from fastinterp.output.old_checkpoint import identities, identity, old_checkpoint
from fastinterp.presence import exists, is_file, is_folder, is_link, is_there

_FORCE = "Add --force (in Python force=True) to write into it all the same"
_ELSEWHERE = "Choose another output: inputs are never overwritten, whatever the options"
_NEW = "Give the name of a new folder"

# Each function returns the reason for a refusal; empty, if there is none. It may raise OSError.


def about_inputs(root: Path, file: str | None, inputs: Sequence[str | os.PathLike[str]]) -> str:
    """Folders are compared by device and inode all the way up, so links and bind mounts do not hide anything."""
    own, out = identity(root), identities(root)
    place = identity(root / file) if file else None
    for name in inputs:
        path = Path(name)
        if is_folder(path):
            if identity(path) in out:
                inside = "is" if identity(path) == own and not file else "lies inside"
                return f"the output {inside} the input folder {quote(path)}. {_ELSEWHERE}"
            folders = [path]
        elif file:  # other files in its folder are left alone
            if place is not None and identity(path) == place:
                return f"the output is the input {quote(path)}. {_ELSEWHERE}"
            continue
        else:
            folders = [path.parent, Path(os.path.realpath(path)).parent]
        if own and not file and any(own in identities(f) for f in folders):
            return f"the output folder holds the input {quote(path)}. {_ELSEWHERE}"
    return ""


def about_place(name: str, root: Path, file: str | None) -> str:
    """name: of the output, as it was given"""
    if is_folder(root) or not (is_there(root) or (is_link(name) and not file)):
        return ""
    what = "it is in no folder: its parent is something else" if file else "this is not a folder"
    return f"{what}, and it will not be replaced. {_NEW}"


def about_contents(
    root: Path, entries: Sequence[str], present: Sequence[str], inputs: Sequence[str | os.PathLike[str]],
    new: Collection[str], *, force: bool,
) -> str:  # fmt: skip
    """About an output folder that is there.

    entries  names in it; present: those that are not left from runs that died
    new      names of the files that will be written
    """
    if same := _about_same_files(root, entries, inputs):
        return same
    if present and not force:
        return f"the folder is not empty: {listing(present)}. {_FORCE}"
    _, strangers = old_checkpoint(root, present, new)
    if strangers:
        return (
            f"the folder holds weights that no index there names: {listing(strangers)}. They would be mixed with "
            "the output, and --force does not remove them: move them away, or choose another folder"
        )
    return _about_rights(root)


def about_file(root: Path, file: str, inputs: Sequence[str | os.PathLike[str]], *, force: bool) -> str:
    """About an output that is one file, in a folder that is there."""
    path = root / file
    if same := _about_same_files(root, [file], inputs):
        return same
    if is_folder(path):
        return "this is a folder, but the name ends as that of a file. Give another name"
    if is_there(path) and (is_link(path) or not is_file(path)):
        return "this is no regular file, and it will not be replaced. Give another name"
    if is_there(path) and not force:
        return "this file exists already. Add --force (in Python force=True) to replace it"
    return _about_rights(root)


def _about_same_files(root: Path, entries: Sequence[str], inputs: Sequence[str | os.PathLike[str]]) -> str:
    known = {identity(Path(p)): p for p in inputs}
    known.pop(None, None)
    for name in entries:
        same = known.get(identity(root / name))
        if same is not None:
            return f"{quote(name)} there is the same file as the input {quote(same)}. {_ELSEWHERE}"
    return ""


def _about_rights(root: Path) -> str:
    if os.access(root, os.W_OK | os.X_OK):
        return ""
    read_only = os.statvfs(root).f_flag & os.ST_RDONLY
    return f"the folder cannot be written to: {os.strerror(errno.EROFS if read_only else errno.EACCES)}"


def about_space(root: Path, needed: int) -> str:
    """needed: bytes that will be written"""
    folder = root
    while not exists(folder):
        folder = folder.parent
    info = os.statvfs(folder)
    free = info.f_bavail * info.f_frsize
    # Some network file systems report no sizes at all.
    if not info.f_blocks or free >= needed:
        return ""
    large = needed >= 10**9
    factor, unit = (1e9, "GB") if large else (1e6, "MB") if needed >= 10**6 else (1e3, "KB")
    return (
        f"not enough space: the output takes {needed} bytes ({needed / factor:.2f} {unit}), "
        f"but {free} ({free / factor:.2f} {unit}) are free. Free some, or choose another folder"
    )
