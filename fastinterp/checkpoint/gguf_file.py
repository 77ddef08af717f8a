"""Reads and validates the header of one GGUF file, version 2 or 3, little-endian. Nothing in it is trusted.

Format: `GGUF`, version u32, number of tensors u64, number of keys u64; the keys, each a string, a type and a value;
the tensors, each a name, its dimensions, the innermost first, a type and an offset; then, at the next multiple of
`general.alignment`, the data section. A string is its length as u64 and that many bytes
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import os
import struct
from operator import attrgetter
from typing import NoReturn

import msgspec

from fastinterp.checkpoint.gguf_keys import ARRAY, SCALARS, STRING, U32, GgufHeader, KeyValue
from fastinterp.checkpoint.gguf_types import REMOVED, TYPES
from fastinterp.checkpoint.header import MAX_NUMEL, UNWRITTEN, Entry, refuse_download
from fastinterp.checkpoint.names import quote, shell_word
from fastinterp.checkpoint.remote import Readable, opened
from fastinterp.errors import CheckpointError

MAGIC = b"GGUF"
ALIGNMENT = 32  # of the data section and of every tensor, unless `general.alignment` says otherwise
MAX_HEADER = 400_000_000  # bytes: vocabularies of some 200,000 tokens take 10 MB
_LONGEST_NAME = 65535  # bytes of a key or a tensor's name, as the specification has it for keys
_MOST_DIMENSIONS = 4  # of ggml
_LARGEST_ALIGNMENT = 1 << 20
_READ = 1 << 20  # bytes that are read at first; then twice as many each time

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def read_gguf(path: str | os.PathLike[str], file_index: int = 0) -> tuple[list[Entry], GgufHeader]:
    """The tensors of the GGUF file at `path`, in its order, and the rest of its header. Reads no tensor data.

    Shapes are in row-major order: the innermost dimension, which files have first, comes last.
    Raises: CheckpointError, naming file and tensor, if the file cannot be read or breaks the format in any way.
    """
    file = os.fspath(path)
    with opened(file) as source:
        return _Reader(source, file, file_index).header()


class _Reader:
    """Reads the header from the front: `at` is the next byte, `_data` what was read of the file so far."""

    def __init__(self, source: Readable, file: str, file_index: int):
        self._source, self._size, self._file, self._index = source, source.size, file, file_index
        self._data = bytearray()
        self._at = 0

    def header(self) -> tuple[list[Entry], GgufHeader]:
        version = self._version()
        tensors = self._count("tensors", 24)
        keys = self._count("keys", 13)
        found = self._keys(keys)
        alignment = self._alignment(found)
        entries = [self._tensor(alignment) for _ in range(tensors)]
        start = self._at + -self._at % alignment
        return self._placed(entries, start), GgufHeader(version, found, alignment)

    def _fail(self, message: str, tensor: str | None = None) -> NoReturn:
        what = f"tensor {quote(tensor)}: {message}" if tensor is not None else message
        raise CheckpointError(what, file=self._file, tensor=tensor)

    def _need(self, end: int) -> None:
        """Have the bytes before `end`."""
        if end > self._size:
            self._fail(
                f"the header goes on behind the end of the file, which has {self._size} bytes: truncated, or a damaged "
                "header. Download or copy it again"
            )
        if end > MAX_HEADER:
            self._fail(f"the header has more than {MAX_HEADER} bytes: damaged. Download or copy the file again")
        while len(self._data) < end:
            wanted = max(_READ, len(self._data), end - len(self._data))
            part = self._source.pread(min(wanted, self._size - len(self._data)), len(self._data))
            if not part:
                self._fail("the file ended while its header was read: it is being changed")
            self._data += part

    def _u32(self) -> int:
        self._need(self._at + 4)
        self._at += 4
        number: int = _U32.unpack_from(self._data, self._at - 4)[0]
        return number

    def _u64(self) -> int:
        self._need(self._at + 8)
        self._at += 8
        number: int = _U64.unpack_from(self._data, self._at - 8)[0]
        return number

    def _count(self, what: str, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        count = self._u64()
        if count > (self._size - self._at) // least:
            self._fail(
                f"the header claims {count} {what}, more than its {self._size} bytes can hold: truncated, or damaged. "
                "Download or copy it again"
            )
        return count

    def _name(self, what: str) -> str:
        """The next string, which names something."""
        length = self._u64()
        if length > _LONGEST_NAME:
            self._fail(f"{what} has a name of {length} bytes, more than the allowed {_LONGEST_NAME}: damaged")
        self._need(self._at + length)
        self._at += length
        raw = self._data[self._at - length : self._at]
        text = raw.decode(errors="replace")
        if text.encode() != raw:
            self._fail(f"{what} has a name that is not valid Unicode: {quote(text)}")
        return text

    def _version(self) -> int:
        if self._size < 24:
            least = f"a GGUF file has at least 24 bytes, this one has {self._size}"
            self._fail(f"{least if self._size else 'the file is empty'}. Download or copy it again")
        self._need(24)
        first = bytes(self._data[:64])
        refuse_download(first, self._file)
        if first[:4] != MAGIC:
            if first[:4] in (b"lmgg", b"fmgg", b"tjgg", b"algg"):
                self._fail(
                    "this is a GGML file, as llama.cpp had them before GGUF (August 2023): no longer read. Convert the "
                    "original model with llama.cpp's convert_hf_to_gguf.py"
                )
            if not any(first[:8]):
                self._fail(UNWRITTEN)
            self._fail(f"this is not a GGUF file: it begins with {first[:4]!r}, not with {MAGIC!r}")
        self._at = 4
        version = self._u32()
        if version not in (2, 3):
            self._refuse_version(version)
        return version

    def _refuse_version(self, version: int) -> NoReturn:
        if version & 0xFFFF == 0:
            self._fail(
                "the file is big-endian, and only little-endian ones are read. Convert it with the package gguf, which "
                f"changes the file in its place: `gguf-convert-endian {shell_word(self._file)} little`"
            )
        if version == 1:
            self._fail(
                "the file has version 1 of GGUF, and versions 2 and 3 are read. Convert the original model with "
                "llama.cpp's convert_hf_to_gguf.py"
            )
        self._fail(f"the file has version {version} of GGUF, and versions 2 and 3 are read: damaged, or newer")

    def _keys(self, count: int) -> dict[str, KeyValue]:
        found: dict[str, KeyValue] = {}
        for number in range(count):
            key = self._name(f"key {number}")
            if key in found:
                self._fail(f"the key {quote(key)} occurs twice")
            start = self._at
            kind = element = self._u32()
            elements = 1
            if kind == ARRAY:
                element, elements = self._u32(), self._u64()
            self._skip(key, element, elements)
            found[key] = KeyValue(key, kind, element, elements, bytes(self._data[start : self._at]))
        return found

    def _skip(self, key: str, kind: int, count: int) -> None:
        """Go behind so many values of one type."""
        if kind != STRING and kind not in SCALARS:
            what = "an array of arrays" if kind == ARRAY else f"a value of type {kind}"
            self._fail(f"the key {quote(key)} has {what}, which no program writes: damaged, or newer")
        width = 8 if kind == STRING else struct.calcsize(SCALARS[kind])
        if count > (self._size - self._at) // width:
            self._fail(
                f"the key {quote(key)} claims {count} values, more than the file can hold: truncated, or damaged. "
                "Download or copy it again"
            )
        if kind == STRING:
            self._skip_strings(count)
        else:
            self._at += count * width
            self._need(self._at)

    def _skip_strings(self, count: int) -> None:
        at, data, unpack = self._at, self._data, _U64.unpack_from
        for _ in range(count):
            try:
                at += 8 + unpack(data, at)[0]
            except (struct.error, OverflowError, IndexError):  # not read yet, or behind the end
                self._need(at + 8)
                at += 8 + unpack(data, at)[0]
        self._need(at)
        self._at = at

    def _alignment(self, keys: dict[str, KeyValue]) -> int:
        found = keys.get("general.alignment")
        if found is None:
            return ALIGNMENT
        alignment = found.value
        if found.kind != U32 or not isinstance(alignment, int) or not 1 <= alignment <= _LARGEST_ALIGNMENT:
            self._fail(f"`general.alignment` must be a u32 of 1 to {_LARGEST_ALIGNMENT}, got {found.describe()}")
        if alignment & (alignment - 1):
            self._fail(f"`general.alignment` must be a power of two, got {alignment}")
        return alignment

    def _tensor(self, alignment: int) -> Entry:
        """The next tensor, its `start` counted from the data section."""
        name = self._name("a tensor")
        dimensions = self._u32()
        if dimensions > _MOST_DIMENSIONS:
            self._fail(f"it has {dimensions} dimensions, and GGUF allows {_MOST_DIMENSIONS}: damaged", name)
        shape = tuple(reversed([self._u64() for _ in range(dimensions)]))
        number, start = self._u32(), self._u64()
        numel = 1
        for dim in shape:
            numel *= dim
            if numel > MAX_NUMEL:
                self._fail(f"shape {list(shape)} has more than 2^63 - 1 elements", name)
        kind = TYPES.get(number)
        if kind is None:
            self._unknown(number, name)
        elements, nbytes = kind.block
        if elements > 1 and (not shape or shape[-1] % elements):
            row = shape[-1] if shape else 1
            self._fail(f"{kind.name} has blocks of {elements} elements, which do not fill its rows of {row}", name)
        if start % alignment:
            self._fail(f"its offset {start} is not a multiple of the alignment, {alignment}: damaged", name)
        return Entry(name, kind.dtype, shape, start, numel // elements * nbytes, self._index)

    def _unknown(self, number: int, name: str) -> NoReturn:
        if number in REMOVED:
            self._fail(
                f"its type is {REMOVED[number]} ({number}), which llama.cpp has no longer. Quantise the original model "
                "anew",
                name,
            )
        known = ", ".join(t.name for t in TYPES.values())
        self._fail(f"unknown type {number}: damaged, or a newer file. Known: {known}", name)

    def _placed(self, entries: list[Entry], start: int) -> list[Entry]:
        """The tensors at their places in the file. Checks that they lie in it, and do not overlap."""
        seen: set[str] = set()
        placed = []
        for entry in entries:
            if entry.name in seen:
                self._fail("it is in the file twice", entry.name)
            seen.add(entry.name)
            end = start + entry.start + entry.nbytes
            if end > self._size:
                self._fail(
                    f"it ends at byte {end} of the file, which has only {self._size}: truncated, or a damaged header. "
                    "Download or copy the file again",
                    entry.name,
                )
            placed.append(msgspec.structs.replace(entry, start=start + entry.start))
        before = None
        for entry in sorted((e for e in placed if e.nbytes), key=attrgetter("start")):
            if before is not None and entry.start < before.start + before.nbytes:
                self._fail(f"it overlaps {quote(before.name)} from byte {entry.start} of the file on", entry.name)
            before = entry
        return placed
