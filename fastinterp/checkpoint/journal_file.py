"""The journal beside an output that is not finished, as it lies on the disk: its name, its records, and what it says.

A journal is lines of text, `CRC32 KIND JSON`. Each has a checksum of its own, so a line that was being written when the
process or the machine died is recognised, and it and all after it count for nothing. The first line is of the kind
`begin`; while the last one is of the kind `finishing`, the output is being put in place. output/journal.py writes
journals; here is what readers need.
"""

from __future__ import annotations

import json
import os
import re
from binascii import crc32
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from fastinterp.checkpoint.regular_file import open_regular
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.presence import is_there

T = TypeVar("T")
BEGIN, GOES_ON, SUBFOLDER = "begin", "goes-on", "subfolder"
FINISHING, PLACED = "finishing", "placed"
PARTIAL, ASIDE = "partial", "old"  # in temporary names: of a file that is being written; of one that is replaced
_ENDING = "fastinterp-journal"
_LONGEST = 255  # bytes in the name of a file
_LINE = re.compile(rb"([0-9a-f]{8}) ([a-z-]+) (.*)", re.DOTALL)
RUN = re.compile("[0-9a-f]{12}")  # the number of a run
_TEMPORARY = re.compile(r"\.(?P<of>.+)\.(?P<what>partial|old)-(?P<run>[0-9a-f]{12})", re.DOTALL)
_LONGEST_ENDING = 48  # bytes: `.partial-0123456789ab`, and room for what several processes add to a name
_TAIL = 1 << 16  # bytes of the first attempt to read the last line


class Begin(msgspec.Struct, frozen=True):
    """The record of the kinds `begin` and, of a later process, `goes-on`: the run that writes the output, its process.

    run      12 hexadecimal digits, part of every temporary name
    merge    what tells merges apart: the same text means the same output. Empty: unknown
    pid      the process; its number alone says little, since numbers are used again
    started  when it began, in ticks since the boot of the machine; 0: unknown
    boot     of that machine, as its system calls it; empty: unknown
    command  the command line that can be run again, and the folder that it was run in; empty: there is none
    """

    run: str
    merge: str = ""
    pid: int = 0
    started: int = 0
    boot: str = ""
    command: tuple[str, ...] = ()
    cwd: str = ""


class Subfolder(msgspec.Struct, frozen=True):
    """The record of the kind `subfolder`: a folder in that of the output has temporary files. made: by the run"""

    name: str
    made: bool


class Finishing(msgspec.Struct, frozen=True):
    """The record of the kind `finishing`: all temporary files are complete, and are given their names in this order.

    names    of the output's files, relative to its folder
    aside    of the files of an old output, moved out of the way in this order before, and removed when all names are
             given
    synced   whether all that it says, the contents of the files included, was on the disk before the record was
    boot     of the machine, in which it was written: what was not synced is gone after another
    replaces the inode of the file that the output, if it is one file, replaces at once; 0: none
    """

    names: tuple[str, ...]
    aside: tuple[str, ...] = ()
    synced: bool = False
    boot: str = ""
    replaces: int = 0


class Record(msgspec.Struct, frozen=True):
    """A line of a journal: its kind, and its value as JSON."""

    kind: str
    value: bytes


def journal_path(folder: Path, file: str | None = None) -> Path:
    """The journal of the output `folder`, or of the output `file` in it."""
    return hidden(folder, file, _ENDING) if file else folder / f".{_ENDING}"


def journal_of(name: str) -> str | None:
    """The output file, its name perhaps shortened, whose journal a file is called as; empty: of a folder."""
    if name == f".{_ENDING}":
        return ""
    return name[1:].removesuffix(f".{_ENDING}") if name.startswith(".") and name.endswith(f".{_ENDING}") else None


def temporary(folder: Path, name: str, what: str, run: str) -> Path:
    """The temporary name that `name` in `folder` has in a run. what: PARTIAL or ASIDE"""
    return hidden(folder, name, f"{what}-{run}")


def hidden(folder: Path, name: str, ending: str) -> Path:
    """`.NAME.ENDING` beside `name` in `folder`."""
    below, _, last = name.rpartition("/")
    return folder / below / f".{shortened(last)}.{ending}"


def shortened(name: str) -> str:
    """`name`, or a hash of it, if the temporary names of a file that is called so would be too long."""
    if len(os.fsencode(name)) + _LONGEST_ENDING < _LONGEST:
        return name
    import hashlib  # takes milliseconds: few names are long

    return hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()


def temporary_of(name: str) -> tuple[str, str, str] | None:
    """(name, perhaps shortened, that it stands for; PARTIAL or ASIDE; run) of a file called as temporary ones are."""
    match = _TEMPORARY.fullmatch(os.path.basename(name))
    return (match["of"], match["what"], match["run"]) if match else None


def line_of(kind: str, value: bytes) -> bytes:
    """The line of a record. value: JSON, without line breaks"""
    text = b"%s %s" % (kind.encode(), value)
    return b"%08x %s\n" % (crc32(text), text)


def parsed(line: bytes) -> Record | None:
    """The record of a line, without its line break; None, if the line is damaged."""
    match = _LINE.fullmatch(line)
    if match is None or crc32(line[9:]) != int(match[1], 16):
        return None
    return Record(match[2].decode(), match[3])


def parsed_all(content: bytes) -> Iterator[tuple[Record, int]]:
    """The records up to the first that is damaged, each with the offset of its end."""
    at = 0
    while (end := content.find(b"\n", at)) >= 0:
        record = parsed(content[at:end])
        if record is None:
            return
        at = end + 1
        yield record, at


def state_of(path: Path) -> str | None:
    """What an output's journal says of it: FINISHING, while files get their names; PLACED, when they have them; BEGIN,
    before that; None, if there is no journal. Only its last line is read.

    Raises: CheckpointError, if it is no regular file or cannot be read.
    """
    try:
        if not is_there(path):
            return None
    except OSError as error:
        raise UnreadableError(f"it cannot be looked at: {error.strerror}", file=str(path)) from None
    fd, size = open_regular(str(path))
    try:
        length = min(size, _TAIL)
        tail = os.pread(fd, length, size - length)
        while tail.rfind(b"\n", 0, -1) < 0 and length < size:
            length = min(size, 8 * length)
            tail = os.pread(fd, length, size - length)
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror}", file=str(path)) from None
    finally:
        os.close(fd)
    last = parsed(tail[tail.rfind(b"\n", 0, -1) + 1 : -1]) if tail.endswith(b"\n") else None
    return last.kind if last is not None and last.kind in (FINISHING, PLACED) else BEGIN


def begun_of(path: Path) -> Begin | None:
    """The first record of a journal; None, if it is damaged, or of another version. Raises: CheckpointError."""
    fd, _ = open_regular(str(path))
    with open(fd, "rb") as stream:
        record = parsed(stream.readline(_TAIL).rstrip(b"\n"))
    if record is None or record.kind != BEGIN:
        return None
    try:
        return decoded(record.value, Begin)
    except (msgspec.DecodeError, ValueError):
        return None


def encoded(value: object) -> bytes:
    """A value as JSON in one line."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # names of files that are no valid Unicode
        return json.dumps(msgspec.to_builtins(value)).encode()


def decoded(value: bytes, type_: type[T]) -> T:
    """Raises: msgspec.DecodeError, ValueError."""
    try:
        return msgspec.json.decode(value, type=type_)
    except (msgspec.DecodeError, UnicodeError):
        return msgspec.convert(json.loads(value), type_)
