"""The header of one file: as safetensors reads it, and hostile in every way we know."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from fastinterp.checkpoint.header import MAX_HEADER, read_header
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import DTYPES


def framed(header: bytes | dict, data: bytes = b"") -> bytes:
    """A safetensors file of the given header and data section."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), begin=0, end=8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def without(key: str) -> dict:
    return {k: v for k, v in entry().items() if k != key}


HOSTILE = {
    "empty file": (b"", "the file is empty. Download or copy it again"),
    "a web page": (
        b"\n<!DOCTYPE html>\n<html><body>404</body></html>",
        "this is a web page (HTML or XML), not the file",
    ),
    "an error in XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "Download it again"),
    "other text": (b"Invalid username or password.", "If it is one, download or copy it again"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "a safetensors file has at least 8 bytes, this one has 7"),
    "header past the end": (framed(b"{}")[:-1], "the header claims 2 bytes, but only 1 follow: truncated"),
    "header over 100 MB": (
        (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
        f"the header claims {MAX_HEADER + 1} bytes, more than the allowed {MAX_HEADER}",
    ),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "this is a Git LFS pointer; the file itself was not downloaded. Run `git lfs pull`",
    ),
    "length 2^64 - 1": (b"\xff" * 8 + b"{}", "the header claims 18446744073709551615 bytes, more than the allowed"),
    "no header": (framed(b""), "it begins with zeros: its header was never written"),
    "an array": (framed(b"[1]"), "the header must start with '{', got b'[1]'"),
    "a byte order mark": (framed(b"\xef\xbb\xbf{}"), "the header must start with '{', got b'\\xef\\xbb\\xbf{}'"),
    "utf-16": (framed("{}".encode("utf-16-be")), "the header must start with '{', got b'\\x00{\\x00}'"),
    "bad utf-8": (framed(b'{"\xff": 1}'), "the header is not UTF-8: byte 2 is 0xff"),
    "bad json": (framed(b'{"a": '), "the header is not JSON: Expecting value"),
    "two values": (framed(b"{} {}"), "the header is not JSON: Extra data"),
    "deep nesting": (framed(b'{"a":' + b"[" * 200_000), "the header nests too deeply to be read"),
    "number of 5000 digits": (framed(b'{"a": ' + b"9" * 5000 + b"}"), "the header is not JSON: "),
    "duplicate name": (framed(b'{"a": 1, "b": 2, "a": 3}'), "the header names `a` twice"),
    "duplicate key": (framed(b'{"a": {"dtype": "U8", "dtype": "F32"}}'), "the header names `dtype` twice"),
    "lone surrogate": (framed(b'{"a\\ud800": 1}'), "the tensor name `a\\ud800` is not valid Unicode"),
    "metadata is a list": (framed({"__metadata__": []}), "`__metadata__` must be an object of strings, got a list"),
    "metadata number": (framed({"__metadata__": {"k": 1}}), "`__metadata__` key `k` must be a string, got a number"),
    "entry is a number": (framed({"a": 5}), "tensor `a`: its entry must be an object, got a number"),
    "entry is a list": (framed({"a": []}), "tensor `a`: its entry must be an object, got a list"),
    "no dtype": (framed({"a": without("dtype")}, bytes(8)), "tensor `a`: its entry has no `dtype`"),
    "no shape": (framed({"a": without("shape")}, bytes(8)), "tensor `a`: its entry has no `shape`"),
    "no offsets": (framed({"a": without("data_offsets")}, bytes(8)), "tensor `a`: its entry has no `data_offsets`"),
    "unknown dtype": (framed({"a": entry("F12")}, bytes(8)), "tensor `a`: unknown dtype `F12`; known: F64, F32"),
    "dtype is a list": (framed({"a": entry(["F32"])}, bytes(8)), "tensor `a`: unknown dtype `['F32']`"),
    "negative size": (framed({"a": entry(shape=(-2,))}, bytes(8)), "tensor `a`: `shape` must be a list of integers"),
    "two negatives": (framed({"a": entry(shape=(-1, -2))}, bytes(8)), "from 0 up, got `[-1, -2]`"),
    "fractional size": (framed({"a": entry(shape=(2.0,))}, bytes(8)), "from 0 up, got `[2.0]`"),
    "boolean size": (framed({"a": entry(shape=(True, 2))}, bytes(8)), "from 0 up, got `[True, 2]`"),
    "text size": (framed({"a": entry(shape=(10**9, "2"))}, bytes(8)), "from 0 up, got `[1000000000, '2']`"),
    "shape is text": (framed({"a": {**entry(), "shape": "2"}}, bytes(8)), "tensor `a`: `shape` must be a list"),
    "shape is null": (framed({"a": {**entry(), "shape": None}}, bytes(8)), "tensor `a`: `shape` must be a list"),
    "2^64 elements": (framed({"a": entry(shape=(2**32, 2**32))}, bytes(8)), "has more than 2^63 - 1 elements"),
    "overflow before a 0": (framed({"a": entry(shape=(2**62, 4, 0), end=0)}), "has more than 2^63 - 1 elements"),
    "a million sizes": (framed({"a": entry(shape=[2**62] * 100_000)}, bytes(8)), "has more than 2^63 - 1 elements"),
    "three offsets": (
        framed({"a": {**entry(), "data_offsets": [0, 8, 8]}}, bytes(8)),
        "tensor `a`: `data_offsets` must be two integers, got `[0, 8, 8]`",
    ),
    "boolean offsets": (
        framed({"a": {**entry("U8", [1]), "data_offsets": [False, True]}}, bytes(1)),
        "tensor `a`: `data_offsets` must be two integers, got `[False, True]`",
    ),
    "reversed offsets": (framed({"a": entry(begin=8, end=0)}, bytes(8)), "must go upwards from 0, got [8, 0]"),
    "negative offset": (framed({"a": entry(begin=-8, end=0)}, bytes(8)), "must go upwards from 0, got [-8, 0]"),
    "past the end": (
        framed({"a": entry()}, bytes(7)),
        "tensor `a`: it ends at byte 8 of the data section, which has only 7: truncated, or a damaged header",
    ),
    "size and shape": (
        framed({"a": entry(shape=(3,))}, bytes(8)),
        "tensor `a`: F32 [3] takes 12 bytes, but `data_offsets` [0, 8] hold 8",
    ),
    "half a byte": (framed({"a": entry("F4", [3], 0, 2)}, bytes(2)), "tensor `a`: 3 elements of F4 do not fill whole"),
    "overlap": (
        framed({"a": entry(), "b": entry(begin=4, end=12)}, bytes(12)),
        "tensor `b`: it starts at byte 4 of the data section and overlaps `a`, which ends at 8",
    ),
    "same place": (framed({"a": entry(), "b": entry()}, bytes(8)), "tensor `b`: it starts at byte 0 of the data"),
    "hole": (
        framed({"a": entry(), "b": entry(begin=12, end=20)}, bytes(20)),
        "tensor `b`: it starts at byte 12 of the data section and leaves a hole after `a`, which ends at 8",
    ),
    "hole in front": (framed({"a": entry(begin=4, end=12)}, bytes(12)), "and leaves a hole after nothing"),
    "bytes of no tensor": (framed({"a": entry()}, bytes(9)), "1 bytes belong to no tensor"),
    "ugly name": (framed({"a\n\x1b[31m": 1}), "tensor `a\\n\\x1b[31m`: its entry must be an object"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_refused(case, tmp_path):
    """Each kind of damage gets its own message, which names the file, and the tensor where there is one."""
    content, expected = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert len(message) < 1200 and message.isprintable()
    assert caught.value.file == str(path)
    if expected.startswith("tensor `a`"):
        assert caught.value.tensor == "a"


VALID = framed({"a": entry(), "__metadata__": {"format": "pt"}, "b": entry("U8", (3, 0, 1), 8, 8)}, bytes(8))


def read_bytes(folder: Path, content: bytes):
    path = folder / "fuzz.safetensors"
    path.write_bytes(content)
    return read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(tmp_path_factory, data):
    """Replace, cut or add any bytes of a good file: the answer is entries inside it, or CheckpointError."""
    content = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        entries, _ = read_bytes(tmp_path_factory.getbasetemp(), bytes(content))
    except CheckpointError:
        return
    assert all(0 <= e.start <= e.start + e.nbytes <= len(content) for e in entries)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
odd_entries = json_values | st.fixed_dictionaries(
    {"dtype": json_values, "shape": json_values, "data_offsets": json_values}
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=4), odd_entries, max_size=3), st.binary(max_size=16))
def test_odd_json_never_crashes(tmp_path_factory, header, data):
    """Well-formed JSON of any types in any place is read or refused, and nothing else."""
    try:
        entries, _ = read_bytes(tmp_path_factory.getbasetemp(), framed(header, data))
    except CheckpointError:
        return
    assert sum(e.nbytes for e in entries) == len(data)


def test_header_agrees_with_safetensors(tmp_path):
    """Names, dtypes, shapes, bytes and metadata of a file that safetensors itself wrote, odd shapes included."""
    rng = np.random.default_rng(0)
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U8": "u1"}
    arrays = {f"{tag}.{i}": np.asarray(rng.random(s) * 9).astype(k)
              for tag, k in kinds.items() for i, s in enumerate([(), (0,), (3,), (2, 0, 5), (4, 3)])}  # fmt: skip
    arrays["bool"], arrays["ünïcödé \n"] = np.array([True, False]), np.ones(3, "f4")
    path = tmp_path / "a.safetensors"
    save_file(arrays, path, metadata={"format": "pt", "k": "ü"})
    entries, metadata = read_header(path, 7)
    raw = path.read_bytes()
    assert metadata == {"format": "pt", "k": "ü"}
    assert sorted(e.name for e in entries) == sorted(arrays)
    assert [e.start for e in entries] == sorted(e.start for e in entries)
    for e in entries:
        array = arrays[e.name]
        assert (e.shape, e.numel, e.nbytes, e.file) == (array.shape, array.size, array.nbytes, 7)
        assert e.dtype.name == ("BOOL" if e.name == "bool" else e.name.split(".")[0] if "." in e.name else "F32")
        assert raw[e.start : e.start + e.nbytes] == array.tobytes()


@pytest.mark.parametrize("metadata", [None, {}])
def test_no_metadata(tmp_path, metadata):
    """null is as good as nothing, as for safetensors."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(framed({"__metadata__": metadata, "a": entry()}, bytes(8)))
    with safe_open(path, "numpy") as stream:
        assert list(stream.keys()) == ["a"]
    entries, found = read_header(path)
    assert [e.name for e in entries] == ["a"] and found == {}


def test_tensors_in_any_order_of_offsets(tmp_path):
    """The JSON may name tensors in another order than they lie."""
    entries, _ = read_bytes(
        tmp_path, framed({"b": entry(begin=8, end=16), "z": entry("U8", (0,), 8, 8), "a": entry()}, bytes(16))
    )
    assert [e.name for e in entries] == ["a", "z", "b"]


def test_reads_headers_only(tmp_path):
    """A sparse file of 1 TB opens at once: no tensor data is touched."""
    text = json.dumps({"a": entry("U8", (10**12,), 0, 10**12)}).encode()
    path = tmp_path / "big.safetensors"
    with open(path, "wb") as stream:
        stream.write(framed(text))
        try:
            stream.truncate(8 + len(text) + 10**12)
        except OSError:
            pytest.skip("this file system has no sparse files of 1 TB")
    assert open_checkpoint(str(path)).nbytes == 10**12


def test_special_files_are_refused(tmp_path):
    """A named pipe or a folder called like weights neither hangs nor opens."""
    os.mkfifo(tmp_path / "p.safetensors")
    (tmp_path / "d.safetensors").mkdir()
    for name in ("p.safetensors", "d.safetensors"):
        with pytest.raises(CheckpointError, match="this is not a regular file"):
            read_header(tmp_path / name)
