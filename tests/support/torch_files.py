"""Files of torch.save made by hand, for what torch itself does not write."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

U2, U4 = struct.Struct("<H"), struct.Struct("<I")


class Entry(NamedTuple):
    """An entry of a zip file; the defaults are those of one that is right.

    here     the local header's name and method
    claimed  the directory's (bytes as stored, bytes, offset of the header); None: the right ones
    """

    name: str
    data: bytes
    method: int = 0
    flags: int = 0x800
    mode: int = 0
    here: tuple[str, int] | None = None
    claimed: tuple[int | None, int | None, int | None] = (None, None, None)


def zipped(entries: Sequence[Entry], *, wide: bool = False, count: int | None = None, tail: bytes = b"") -> bytes:
    """A zip file. wide: sizes and offsets of 64 bits; count: of entries, as the end says; tail: a comment."""
    body, directory = b"", b""
    for e in entries:
        name, (local_name, local_method) = e.name.encode(), e.here or (e.name, e.method)
        local, at = local_name.encode(), len(body)
        size, full, header = (
            c if c is not None else r for c, r in zip(e.claimed, (len(e.data),) * 2 + (at,), strict=True)
        )
        body += struct.pack(
            "<4s5H3L2H", b"PK\3\4", 20, e.flags, local_method, 0, 0, zlib.crc32(e.data), len(e.data), len(e.data),
            len(local), 0,
        ) + local + e.data  # fmt: skip
        extra = struct.pack("<HHQQQ", 1, 24, full, size, header) if wide else b""
        if wide:
            size = full = header = 0xFFFFFFFF
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\1\2", 20, 20, e.flags, e.method, 0, 0, zlib.crc32(e.data), size, full, len(name),
            len(extra), 0, 0, 0, e.mode << 16, header,
        ) + name + extra  # fmt: skip
    number = len(entries) if count is None else count
    end = (number, number, len(directory), len(body))
    if wide:
        at = len(body) + len(directory)
        directory += struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *end)
        directory += struct.pack("<4sLQL", b"PK\6\7", 0, at, 1)
        end = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
    return body + directory + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, *end, len(tail)) + tail


def archive(pickle: bytes, storages: Mapping[str, bytes] | None = None, order: bytes = b"little") -> list[Entry]:
    """The entries of a file of torch.save."""
    found = {"data.pkl": pickle, "byteorder": order, **{f"data/{k}": v for k, v in (storages or {}).items()}}
    return [Entry(f"archive/{name}", data) for name, data in {**found, "version": b"3\n"}.items()]


def put(path: Path, pickle: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """A file of torch.save with this pickle."""
    path.write_bytes(zipped(archive(pickle, storages)))
    return path


# --- pickles, as text of opcodes -------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + U4.pack(len(raw)) + raw


def whole(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def named(name: str) -> bytes:
    module, _, last = name.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def call(function: str, *args: bytes) -> bytes:
    return named(function) + b"(" + b"".join(args) + b"tR"


def many(*values: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(values) + b"t"


def mapping(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def storage(key: str = "0", numel: int = 4, kind: str = "torch.FloatStorage") -> bytes:
    return many(text("storage"), named(kind), text(key), text("cpu"), whole(numel)) + b"Q"


def view(
    of: bytes | None = None, offset: int = 0, shape: Sequence[int] = (2, 2), strides: Sequence[int] = (2, 1)
) -> bytes:  # fmt: skip
    """A tensor, by default of the float32 numbers of 16 bytes."""
    numbers = many(*map(whole, shape)), many(*map(whole, strides))
    tail = b"\x89", call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", of or storage(), whole(offset), *numbers, *tail)


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def file_of(path: Path, **items: Any) -> Path:
    """A file of torch.save with one right tensor `w`, and these values, as opcodes, beside it."""
    tensors = {"w": view(), **items}
    return put(path, pickled(mapping(tensors)), {"0": bytes(range(16))})
