"""Reads and validates the header of one safetensors file. Nothing in it is trusted.

Format: 8 bytes little-endian length, that many bytes of JSON, then the data section. The tensors' byte ranges must
cover the data section without holes or overlaps (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import msgspec

from fastinterp.checkpoint.names import quote, shell_word
from fastinterp.checkpoint.remote import Readable, opened
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.ops.dtypes import DTYPES, DType

if TYPE_CHECKING:
    from fastinterp.checkpoint.gguf_keys import GgufHeader

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_NUMEL = 2**63 - 1
UNWRITTEN = (
    "it begins with zeros: its header was never written, because the program or the machine stopped before the file "
    "was complete. Download, copy or make it again"
)
_MAX_METADATA = 200_000  # values
_KEYS = b"dtype", b"shape", b"data_offsets"  # of a tensor


class Header(Protocol):
    """What is known of a tensor without its data."""

    @property
    def dtype(self) -> DType: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


class Conversion(Protocol):
    """How bytes that are not elements one after the other become such: frozen and hashable, equal to what does the
    same. Python converts the tensor into a temporary file when a run opens its inputs.
    """

    @property
    def stored_as(self) -> str:
        """How the tensor is stored, for messages: `Q4_K`, say. Empty: as its elements, in another order."""
        ...

    def pieces(self, path: str) -> Iterator[bytes]:
        """The elements, a piece of a bounded size after the other. path: the file that the tensor is in.

        Raises: CheckpointError, if the file ends too early; OSError.
        """
        ...


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One tensor of a file: dtype, shape and the place of its bytes. Models have hundreds of thousands of them."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    start: int  # byte offset in the file, from its first byte
    nbytes: int  # of its elements
    file: int  # index into Checkpoint.files
    conversion: Conversion | None = None  # by which its bytes become elements of `dtype`; None: they are

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.shape)


class FileHeader(NamedTuple):
    """What a file of weights says without its data.

    entries   its tensors, in an order that is the model's: of their offsets, as a rule
    metadata  strings by key
    remarks   what was decided when it was read, for people
    gguf      the rest of the header of a GGUF file
    """

    entries: list[Entry]
    metadata: dict[str, str]
    remarks: tuple[str, ...] = ()
    gguf: GgufHeader | None = None


def read_header(path: str | os.PathLike[str], file_index: int = 0) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of the safetensors file at `path`, in the order of their offsets, and its metadata.

    Reads the length and the JSON, no tensor data. `file_index` becomes `Entry.file`.
    Raises: CheckpointError, naming file and tensor, if the file cannot be read or breaks the format in any way.
    """
    file = os.fspath(path)
    raw, size = _read_json(file)
    start = 8 + len(raw)
    table, metadata = _quickly(raw, file) or _slowly(raw, file)
    entries = _entries(table, start, size - start, file_index, file)
    _check_cover(entries, start, size, file)
    return entries, metadata


class _Info(msgspec.Struct):
    """What the header says of a tensor. The fields have values for `__metadata__`, which is an object of others."""

    dtype: str = ""
    shape: list[int] = []
    data_offsets: tuple[int, int] = (0, 0)


class _Rest(msgspec.Struct):
    """What the header says beside the tensors, as JSON."""

    metadata: msgspec.Raw = msgspec.field(name="__metadata__", default=msgspec.Raw(b"{}"))


_QUICK = msgspec.json.Decoder(dict[str, _Info]), msgspec.json.Decoder(_Rest)


def _quickly(raw: bytes, file: str) -> tuple[dict[str, _Info], dict[str, str]] | None:
    """The tensors and the metadata of a header, read in a third of the time and memory; None, if anything about it is
    unusual, down to keys that may be there twice.
    """
    if raw[:1] != b"{" or b"\\u" in raw:
        return None
    try:
        table, rest = _QUICK[0].decode(raw), _QUICK[1].decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    there = table.pop("__metadata__", None) is not None
    if raw.count(b'"__metadata__"') != there or any(raw.count(b'"%b"' % k) != len(table) for k in _KEYS):
        return None
    return table, _metadata(parse_object(bytes(rest.metadata), "the metadata", file, most=_MAX_METADATA), file)


def _slowly(raw: bytes, file: str) -> tuple[dict[str, _Info], dict[str, str]]:
    """The same of any header, or what is wrong with it."""
    table = parse_object(raw, "the header", file, text=False)
    metadata = _metadata(table.pop("__metadata__", None), file)
    try:
        "".join(table).encode()
    except UnicodeEncodeError:
        name = next(n for n in table if any("\ud800" <= c <= "\udfff" for c in n))
        raise CheckpointError(f"the tensor name {quote(name)} is not valid Unicode", file=file, tensor=name) from None
    return {name: _info(name, info, file) for name, info in table.items()}, metadata


def _info(name: str, info: Any, file: str) -> _Info:
    """Raises: CheckpointError, if it is not of these types."""
    try:
        return (
            msgspec.convert(info, _Info) if all(key.decode() in info for key in _KEYS) else _explain(name, info, file)
        )
    except (msgspec.MsgspecError, TypeError, UnicodeEncodeError):
        _explain(name, info, file)


def _read_json(file: str) -> tuple[bytes, int]:
    """The JSON bytes and the size of the file in bytes."""
    with opened(file) as source:
        size = source.size
        if size < 8:
            what = f"a safetensors file has at least 8 bytes, this one has {size}" if size else "the file is empty"
            raise CheckpointError(f"{what}. Download or copy it again", file=file)
        first = _read_exactly(source, 8, 0, file)
        if first.startswith(b"PK\3\4"):
            called = quote(os.path.splitext(os.path.basename(file))[0] + ".bin")
            raise CheckpointError(
                f"this is a zip file, as torch.save writes, not a safetensors file. Call it {called}", file=file
            )
        refuse_download(first + source.pread(56, 8), file)
        length = int.from_bytes(first, "little")
        if not length:
            raise CheckpointError(UNWRITTEN, file=file)
        if length > MAX_HEADER:
            raise CheckpointError(
                f"the header claims {length} bytes, more than the allowed {MAX_HEADER}: "
                "damaged, or not a safetensors file. If it is one, download or copy it again",
                file=file,
            )
        if length > size - 8:
            raise CheckpointError(
                f"the header claims {length} bytes, but only {size - 8} follow: truncated, or not a safetensors file. "
                "Download or copy it again",
                file=file,
            )
        return _read_exactly(source, length, 8, file), size


def refuse_download(start: bytes, file: str) -> None:
    """Raises: CheckpointError, if a file that begins so is what a failed download leaves: a web page, a pointer."""
    if b"<" in start[:8] and is_markup(start):
        raise CheckpointError(
            "this is a web page (HTML or XML), not the file: a download failed, or needs a login. Download it again",
            file=file,
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "this is a Git LFS pointer; the file itself was not downloaded. Run `git lfs pull`", file=file
        )


def is_markup(start: bytes) -> bool:
    """Whether a file that begins so is HTML or XML."""
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<error", b"<!--"))


def _read_exactly(source: Readable, count: int, offset: int, file: str) -> bytes:
    """`count` bytes from `offset` on; a read may return fewer, and none when the file shrinks meanwhile."""
    parts: list[bytes] = []
    while count:
        part = source.pread(count, offset)
        if not part:
            raise UnreadableError("the file ended while its header was read: it is being changed", file=file)
        parts.append(part)
        count -= len(part)
        offset += len(part)
    return b"".join(parts)


def _metadata(metadata: Any, file: str) -> dict[str, str]:
    if metadata is None:  # null is as good as nothing for the safetensors library, too
        return {}
    if type(metadata) is not dict:
        raise CheckpointError(f"`__metadata__` must be an object of strings, got {_kind(metadata)}", file=file)
    for key, value in metadata.items():
        if type(value) is not str:
            raise CheckpointError(
                f"`__metadata__` key {quote(key)} must be a string, got {_kind(value)}. {_rewritten(file)}", file=file
            )
    return metadata


def _rewritten(file: str) -> str:
    """How a file becomes one that the safetensors library reads, too."""
    from fastinterp.checkpoint.remedies import rewrite

    return f"The safetensors library refuses it, too. Write the file anew: {rewrite(file)}; then put that in its place"


def _entries(table: dict[str, _Info], start: int, size: int, file_index: int, file: str) -> list[Entry]:
    """Check every tensor by itself. start: of the data section in the file, bytes; size: of the data section, bytes."""
    entries: list[Entry] = []
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # each once: most tensors have that of another
    for name, info in table.items():
        dtype, (begin, end) = DTYPES.get(info.dtype), info.data_offsets
        numel = 1
        for dim in info.shape:
            # Stop at once: the product of a million hostile numbers would take hours.
            if dim < 0 or numel * dim > MAX_NUMEL:
                numel = -1
                break
            numel *= dim
        if dtype is None or not 0 <= begin <= end <= size or numel < 0 or numel * dtype.bits != (end - begin) * 8:
            _explain(name, msgspec.to_builtins(info), file, size)
        shape = tuple(info.shape)
        shape = shapes.setdefault(shape, shape)
        entries.append(Entry(name, dtype, shape, start + begin, end - begin, file_index))
    return entries


def _explain(name: str, info: Any, file: str, size: int = MAX_NUMEL) -> NoReturn:
    """Say what is wrong with an entry that was found to be wrong; slow and complete, where the check is quick."""

    def fail(message: str) -> NoReturn:
        raise CheckpointError(f"tensor {quote(name)}: {message}", file=file, tensor=name)

    if type(info) is not dict:
        fail(f"its entry must be an object, got {_kind(info)}")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in info:
            fail(f"its entry has no `{key}`")
    tag, dims, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if type(tag) is not str or tag not in DTYPES:
        fail(f"unknown dtype {quote(tag)}; known: {', '.join(DTYPES)}")
    if type(dims) is not list or any(type(d) is not int or d < 0 for d in dims):
        fail(f"`shape` must be a list of integers from 0 up, got {quote(dims)}")
    count = 1
    for dim in dims:
        count *= dim
        if count > MAX_NUMEL:
            fail(f"shape {quote(dims)} has more than 2^63 - 1 elements")
    if type(offsets) not in (list, tuple) or len(offsets) != 2 or any(type(o) is not int for o in offsets):
        fail(f"`data_offsets` must be two integers, got {quote(offsets)}")
    begin, end = offsets
    if begin < 0 or end < begin:
        fail(f"`data_offsets` must go upwards from 0, got [{begin}, {end}]")
    if end > size:
        fail(
            f"it ends at byte {end} of the data section, which has only {size}: truncated, or a damaged header. "
            "Download or copy the file again"
        )
    expected = DTYPES[tag].nbytes(count)
    if expected is None:
        fail(f"{count} elements of {tag} do not fill whole bytes")
    fail(f"{tag} {dims} takes {expected} bytes, but `data_offsets` [{begin}, {end}] hold {end - begin}")


def _check_cover(entries: list[Entry], start: int, size: int, file: str) -> None:
    """Sort by offset and check that the tensors lie back to back from `start` to `size`, the end of the file."""
    entries.sort(key=attrgetter("start", "nbytes"))  # an empty tensor comes before the one that starts where it does
    before = start
    for index, entry in enumerate(entries):
        if entry.start != before:
            name, where = entry.name, f"byte {entry.start - start} of the data section"
            after = f"{quote(entries[index - 1].name)}, which ends at {before - start}" if index else "nothing"
            what = "overlaps" if entry.start < before else "leaves a hole after"
            remedy = "" if entry.start < before else f". {_rewritten(file)}"
            raise CheckpointError(
                f"tensor {quote(name)}: it starts at {where} and {what} {after}{remedy}", file=file, tensor=name
            )
        before += entry.nbytes
    if before != size:
        raise CheckpointError(
            f"the tensors end at byte {before} of the file, but the file has {size}: "
            f"{size - before} bytes belong to no tensor. The safetensors library refuses it, too. If it was "
            "downloaded, do that again; if it was written so, cut them off: "
            f"`head -c {before} {shell_word(file)} > NEW.safetensors`; then put that in its place",
            file=file,
        )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
