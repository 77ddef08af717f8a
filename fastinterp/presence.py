"""What is at a path: a file, a folder, or nothing. Where the system does not say, that is an error, and not "nothing".

`os.path.exists` and its like say no whatever failed (EIO, EACCES, EMFILE), and so do pathlib's in some versions of
Python: a folder that cannot be looked into would be taken for one that lacks its files. Where nothing but the wording
of a message depends on the answer, they do.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator

from fastinterp.errors import UnreadableError

Name = str | os.PathLike[str]
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)  # nothing is called so, or can be


def look(path: Name, *, links: bool = True) -> os.stat_result | None:
    """What the system says of a path; None, if there is nothing. Raises: OSError, if it does not say.

    links  are followed: one that leads nowhere is nothing then
    """
    try:
        return os.stat(path, follow_symlinks=links)
    except ValueError:  # a NUL, or no valid Unicode
        return None
    except OSError as error:
        if error.errno in _NOT_THERE:
            return None
        raise


def is_there(path: Name) -> bool:
    """Whether there is anything of this name, a link that leads nowhere too. Raises: OSError."""
    return look(path, links=False) is not None


def is_real_folder(path: Name) -> bool:
    """Whether this is a folder, and not a link to one. Raises: OSError."""
    info = look(path, links=False)
    return info is not None and stat.S_ISDIR(info.st_mode)


def is_link(path: Name) -> bool:
    """Whether this is a link, wherever it leads. Raises: OSError."""
    info = look(path, links=False)
    return info is not None and stat.S_ISLNK(info.st_mode)


def walk(folder: Name) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, which passes over folders that cannot be listed: here only over those that are not there. Raises:
    OSError.
    """

    def failed(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    return os.walk(folder, onerror=failed)


def info_of(path: Name) -> os.stat_result | None:
    """As `look`. Raises: UnreadableError, as all below."""
    try:
        return look(path)
    except OSError as error:
        raise _unknown(path, error) from None


def exists(path: Name) -> bool:
    """Whether there is a file, a folder or anything else, at the end of a link perhaps."""
    return info_of(path) is not None


def file_size(path: Name) -> int | None:
    """Bytes of a regular file, at the end of a link perhaps; None, if there is none."""
    info = info_of(path)
    return info.st_size if info is not None and stat.S_ISREG(info.st_mode) else None


def is_file(path: Name) -> bool:
    """Whether there is a regular file, at the end of a link perhaps."""
    return file_size(path) is not None


def is_folder(path: Name) -> bool:
    """Whether there is a folder, at the end of a link perhaps."""
    info = info_of(path)
    return info is not None and stat.S_ISDIR(info.st_mode)


def names_at(folder: Name) -> list[str]:
    """The names in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise UnreadableError(f"the folder cannot be read: {error.strerror}", file=os.fspath(folder)) from None


def _unknown(path: Name, error: OSError) -> UnreadableError:
    return UnreadableError(f"it cannot be looked at: {error.strerror}", file=os.fspath(path))
