"""Where the entries of a zip file lie. Only entries that are stored as they are can be read in place.

Format: a local header before each entry's bytes, and a directory of all entries at the end of the file, with offsets of
64 bits where those of 32 do not suffice (PKWARE's APPNOTE). Both must say the same; nothing in them is trusted.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import NamedTuple, NoReturn

from fastinterp.checkpoint.names import is_relative, quote
from fastinterp.checkpoint.remote import Readable
from fastinterp.errors import CheckpointError

_MAX_DIRECTORY = 100_000_000  # bytes
_END, _END64, _LOCATOR = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q"), struct.Struct("<4sLQL")
_CENTRAL, _LOCAL = struct.Struct("<4s6H3L5H2L"), struct.Struct("<4s5H3L2H")
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 1, 8, 0x800  # flags; sizes in a descriptor behind the bytes, zeros in the header
_STORED, _LINK = 0, 0o120000  # a method of compression; of a file mode
_SHORT, _LONG = 0xFFFF, 0xFFFFFFFF  # stand for values that do not fit


class ZipEntry(NamedTuple):
    """An entry of a zip file.

    start       byte offset of its bytes in the file
    nbytes      of them, as they lie in the file
    compressed  they are not what was put in
    """

    start: int
    nbytes: int
    compressed: bool


def read_directory(source: Readable, file: str) -> dict[str, ZipEntry]:
    """The entries of the zip file `file`, which is open as `source`: by name, in the file's order of names. Reads the
    directory and the local headers.

    Raises: CheckpointError, if directory and headers are damaged, contradict each other, or are not safe; OSError.
    """
    count, start, nbytes = _find_directory(source, file)
    found: dict[str, ZipEntry] = {}
    extents: list[tuple[int, int]] = []
    directory = source.pread(nbytes, start)
    at = 0
    entries = []
    for _ in range(count):
        entries.append(entry := _central(directory, at, file))
        at = entry[-1]
    source.expect([(header, _LOCAL.size + len(raw)) for _, raw, _, _, _, _, header, _ in entries])
    for name, raw, flags, method, packed, unpacked, header, _ in entries:
        local = source.pread(_LOCAL.size + len(raw), header) if header < start else b""
        if len(local) < _LOCAL.size + len(raw) or local[:4] != b"PK\3\4" or local[_LOCAL.size :] != raw:
            _damaged(file, f"the entry {quote(name)} is not at byte {header}, where the directory has it")
        _, _, flags_here, method_here, _, _, _, packed_here, unpacked_here, length, extra = _LOCAL.unpack_from(local)
        sizes = (packed_here, unpacked_here)
        known = sizes == (packed, unpacked) or _LONG in sizes or (flags_here & _SIZES_FOLLOW and sizes == (0, 0))
        if (flags | flags_here) & _ENCRYPTED:
            raise CheckpointError(f"the entry {quote(name)} is encrypted", file=file)
        if method_here != method or not known or (method == _STORED and packed != unpacked):
            _damaged(file, f"the directory and the entry {quote(name)} contradict each other")
        first = header + _LOCAL.size + length + extra
        if first + packed > start:
            _damaged(file, f"the entry {quote(name)} runs into the directory")
        if name in found:
            _damaged(file, f"two entries are called {quote(name)}")
        found[name] = ZipEntry(first, packed, method != _STORED)
        extents.append((header, first + packed))
    if at != nbytes:
        _damaged(file, f"the directory has {nbytes} bytes, its {count} entries {at}")
    extents.sort()
    for (_, before), (after, _) in pairwise(extents):
        if after < before:
            _damaged(file, f"two entries overlap at byte {after}")
    return found


def _find_directory(source: Readable, file: str) -> tuple[int, int, int]:
    """(number of entries, offset of the directory, its bytes)."""
    size = source.size
    tail = source.pread(_END.size + _SHORT, max(0, size - _END.size - _SHORT))
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and (len(tail) < at + _END.size or at + _END.size + _END.unpack_from(tail, at)[7] != len(tail)):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        _damaged(file, "the directory at its end is missing: truncated")
    _, disk, first_disk, here, count, nbytes, start, _ = _END.unpack_from(tail, at)
    end = size - len(tail) + at
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size :][:4] == b"PK\6\7":
        _, _, where, _ = _LOCATOR.unpack_from(tail, at - _LOCATOR.size)
        record = source.pread(_END64.size, where) if where <= size else b""
        if len(record) < _END64.size or record[:4] != b"PK\6\6":
            _damaged(file, "its directory of 64 bits is not where it should be")
        _, _, _, _, disk, first_disk, here, count, nbytes, start = _END64.unpack(record)
        end = where
    if disk or first_disk or here != count:
        raise CheckpointError("the zip file has several parts: join them first", file=file)
    if start + nbytes > end or nbytes < count * _CENTRAL.size:
        _damaged(file, f"its directory of {count} entries, {nbytes} bytes at {start}, does not fit")
    if nbytes > _MAX_DIRECTORY:
        raise CheckpointError(f"its directory has {nbytes} bytes, more than the allowed {_MAX_DIRECTORY}", file=file)
    return count, start, nbytes


def _central(directory: bytes, at: int, file: str) -> tuple[str, bytes, int, int, int, int, int, int]:
    """(name, the same in bytes, flags, method, bytes as stored, bytes as put in, offset of the local header, where the
    next one begins) of the directory's entry at `at`.
    """
    if len(directory) < at + _CENTRAL.size or directory[at : at + 4] != b"PK\1\2":
        _damaged(file, f"its directory has no entry at byte {at}")
    fields = _CENTRAL.unpack_from(directory, at)
    flags, method, (packed, unpacked, length, extra, comment, disk) = fields[3], fields[4], fields[8:14]
    header = fields[16]
    names_end = at + _CENTRAL.size + length
    raw = directory[at + _CENTRAL.size : names_end]
    after = names_end + extra + comment
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        _damaged(file, f"the name of an entry, {quote(raw)}, is not UTF-8")
    if after > len(directory) or disk:
        _damaged(file, f"its directory's entry {quote(name)} does not fit")
    if (fields[15] >> 16) & 0o170000 == _LINK or not is_relative(name.removesuffix("/")):
        raise CheckpointError(f"the entry {quote(name)} is a link, or leads out of the file: not read", file=file)
    if _LONG in (packed, unpacked, header):
        unpacked, packed, header = _wide(directory[names_end : names_end + extra], unpacked, packed, header, name, file)
    return name, raw, flags, method, packed, unpacked, header, after


def _wide(extra: bytes, unpacked: int, packed: int, header: int, name: str, file: str) -> tuple[int, int, int]:
    """The values of 64 bits, in that order, for those that are marked not to fit."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wanted = [value == _LONG for value in (unpacked, packed, header)]
            if at + 4 + length > len(extra) or length < 8 * sum(wanted):
                break
            values = iter(struct.unpack_from(f"<{sum(wanted)}Q", extra, at + 4))
            chosen = [
                next(values) if w else old for w, old in zip(wanted, (unpacked, packed, header), strict=True)
            ]  # fmt: skip
            return chosen[0], chosen[1], chosen[2]
        at += 4 + length
    return _damaged(file, f"the entry {quote(name)} lacks its sizes of 64 bits")


def _damaged(file: str, what: str) -> NoReturn:
    raise CheckpointError(f"the zip file is damaged: {what}. Download or copy it again", file=file)
