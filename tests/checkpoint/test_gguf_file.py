"""Headers of GGUF files: read as the package gguf reads them, and refused where they are damaged."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fastinterp.checkpoint.gguf_file import read_gguf
from fastinterp.checkpoint.gguf_types import REMOVED, TYPES
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from tests.support.gguf_models import Type, header_of, keys, numbers, raw, write


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_tensors_and_keys_are_those_of_the_package(tmp_path, alignment):
    path = write(tmp_path / "x.gguf", numbers(1), Type.Q8_0, alignment=alignment)
    entries, header = read_gguf(path)
    tensors = gguf.GGUFReader(path).tensors
    assert [(e.name, e.dtype.name, list(e.shape), e.start, e.nbytes) for e in entries] == [
        (t.name, t.tensor_type.name, t.shape[::-1].tolist(), t.data_offset, t.n_bytes) for t in tensors
    ]
    content = path.read_bytes()
    assert {e.name: content[e.start : e.start + e.nbytes] for e in entries} == raw(path)
    want = header_of(path)
    assert list(header.keys) == list(want)
    for key, found in header.keys.items():
        if not isinstance(want[key], list):
            assert found.value == want[key] and type(found.value) is type(want[key])
        else:
            values = found.numbers()
            assert found.count == len(want[key]) and (values is None or list(values) == want[key])
        assert found.raw in content
    assert header.version == 3 and header.alignment == (alignment or 32) and header.architecture == "llama"
    assert header.metadata()["tokenizer.ggml.tokens"] == "40 x string"


def test_every_type_has_the_size_that_the_package_says():
    for kind, (elements, nbytes) in gguf.GGML_QUANT_SIZES.items():
        if kind not in TYPES:
            assert kind > max(TYPES), f"{kind.name} is in the package, and not in the table"
            continue
        if kind == Type.Q8_1:  # 36 bytes in ggml since its sums are float16; no file has it
            continue
        assert (TYPES[kind].name, TYPES[kind].block) == (kind.name, (elements, nbytes))
    assert not REMOVED.keys() & TYPES.keys()


def test_version_2_and_scalars_of_every_type(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    values: dict[str, Any] = {"uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 2**32 - 1}
    values |= {"int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5, "float64": 0.1, "bool": True}
    for kind, value in values.items():
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_tensor("scalar", np.array(2.5, np.float32))
    writer.add_tensor("none", np.zeros((0, 3), np.float32))
    writer.add_tensor("x", np.arange(6, dtype=np.int64).reshape(2, 3))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = bytearray((tmp_path / "x.gguf").read_bytes())
    content[4] = 2
    (tmp_path / "x.gguf").write_bytes(content)
    entries, header = read_gguf(tmp_path / "x.gguf")
    assert header.version == 2
    assert {key: header.value(key) for key in values} == values
    assert [(e.name, e.dtype.name, e.shape, e.nbytes) for e in entries] == [
        ("scalar", "F32", (), 4), ("none", "F32", (0, 3), 0), ("x", "I64", (2, 3), 48)
    ]  # fmt: skip


def test_a_large_vocabulary_is_not_made_into_objects(tmp_path):
    """Header reads are bounded by its bytes: tokens are skipped, and what is read is kept once, as bytes."""
    tokens = [f"token{i}" for i in range(30_000)]
    write(tmp_path / "x.gguf", numbers(1), header={**keys(), "tokenizer.ggml.tokens": tokens})
    entries, header = read_gguf(tmp_path / "x.gguf")
    found = header.keys["tokenizer.ggml.tokens"]
    assert found.count == 30_000 and len(found.raw) == 16 + sum(8 + len(t) for t in tokens) and len(entries) == 11


# --- damaged files ---------------------------------------------------------------------------------------------------


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def info(name: str = "w", dims: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def built(
    keys: bytes = b"", count: int = 0, tensors: tuple[bytes, ...] = (info(),), *, version: int = 3, data: int = 64,
    claimed: int | None = None, magic: bytes = b"GGUF",
) -> bytes:  # fmt: skip
    n = len(tensors) if claimed is None else claimed
    header = magic + struct.pack("<IQQ", version, n, count) + keys + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


U32 = struct.pack("<I", 4)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "short": (b"GGUF\3\0\0\0", "at least 24 bytes, this one has 8"),
    "another file": (b"PK\3\4" + bytes(60), "this is not a GGUF file: it begins with b'PK"),
    "ggml": (b"tjgg" + bytes(60), "this is a GGML file, as llama.cpp had them before GGUF"),
    "web page": (b"<!DOCTYPE html><html>" + bytes(40), "this is a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "this is a Git LFS pointer"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 0) + bytes(64), "the file is big-endian"),
    "version 1": (built(version=1), "version 1 of GGUF, and versions 2 and 3 are read"),
    "version 4": (built(version=4), "version 4 of GGUF, and versions 2 and 3 are read: damaged, or newer"),
    "tensor count": (built(claimed=2**60), "claims 1152921504606846976 tensors, more than its"),
    "key count": (built(count=2**62), "claims 4611686018427387904 keys, more than its"),
    "key type": (built(string("k") + struct.pack("<I", 99), 1), "the key `k` has a value of type 99"),
    "nested array": (built(string("k") + struct.pack("<IIQ", 9, 9, 1), 1), "the key `k` has an array of arrays"),
    "array length": (
        built(string("k") + struct.pack("<IIQ", 9, 4, 2**61), 1), "the key `k` claims 2305843009213693952 values"
    ),
    "string length": (built(string("k") + struct.pack("<IQ", 8, 2**63), 1), "goes on behind the end of the file"),
    "strings": (built(string("k") + struct.pack("<IIQQ", 9, 8, 2, 2**64 - 1), 1), "goes on behind the end of the file"),
    "key length": (built(struct.pack("<Q", 2**40), 1), "key 0 has a name of 1099511627776 bytes"),
    "key twice": (built((string("k") + U32 + U32) * 2, 2), "the key `k` occurs twice"),
    "key text": (built(struct.pack("<Q", 1) + b"\xff" + U32 + U32, 1), "key 0 has a name that is not valid Unicode"),
    "alignment 0": (built(string("general.alignment") + U32 + bytes(4), 1), "must be a u32 of 1 to"),
    "alignment 48": (
        built(string("general.alignment") + U32 + struct.pack("<I", 48), 1), "must be a power of two, got 48"
    ),
    "alignment text": (
        built(string("general.alignment") + struct.pack("<I", 8) + string("x"), 1), "must be a u32 of 1 to"
    ),
    "dimensions": (built(tensors=(info(dims=(1,) * 5),)), "tensor `w`: it has 5 dimensions, and GGUF allows 4"),
    "many dimensions": (
        built(tensors=(string("w") + struct.pack("<I", 2**31) + bytes(64),)), "it has 2147483648 dimensions"
    ),
    "elements": (built(tensors=(info(dims=(2**40, 2**40)),)), "has more than 2^63 - 1 elements"),
    "unknown type": (built(tensors=(info(kind=77),)), "tensor `w`: unknown type 77: damaged, or a newer file"),
    "removed type": (built(tensors=(info(kind=33),)), "its type is Q4_0_8_8 (33), which llama.cpp has no longer"),
    "rows": (built(tensors=(info(dims=(33, 2), kind=8),)), "Q8_0 has blocks of 32 elements, which do not fill its"),
    "scalar blocks": (built(tensors=(info(dims=(), kind=8),)), "which do not fill its rows of 1"),
    "offset": (built(tensors=(info(offset=8),)), "its offset 8 is not a multiple of the alignment, 32"),
    "truncated": (built(tensors=(info(dims=(400,)),)), "it ends at byte"),
    "far offset": (built(tensors=(info(offset=2**63),)), "it ends at byte"),
    "overlap": (built(tensors=(info("a", (16,)), info("b", (4,), offset=32))), "tensor `b`: it overlaps `a` from byte"),
    "twice": (built(tensors=(info("a"), info("a", offset=32))), "tensor `a`: it is in the file twice"),
    "no tensors": (built(tensors=()), "the checkpoint has no tensors"),
    "cut header": (built()[:40], "goes on behind the end of the file"),
    "intermediate type": (built(tensors=(info(dims=(256,), kind=15),), data=512), "Q8_K is a type of intermediate"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_files(tmp_path, case):
    content, expected = BAD[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    assert expected in str(caught.value) and "x.gguf" in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_file_that_is_cut_anywhere_is_refused_or_whole(tmp_path):
    """No prefix of a file is read as something else: an error of ours, or all tensors."""
    content = write(tmp_path / "whole.gguf", numbers(1, layers=1), Type.Q8_0).read_bytes()
    whole = len(read_gguf(tmp_path / "whole.gguf")[0])
    path, last = tmp_path / "x.gguf", 0
    for size in [*range(0, 2000, 7), *range(2000, len(content), 1009), len(content)]:
        path.write_bytes(content[:size])
        try:
            last = len(read_gguf(path)[0])
        except CheckpointError:
            last = 0
    assert last == whole


def test_flipped_bytes_never_crash(tmp_path):
    content = write(tmp_path / "whole.gguf", numbers(1, layers=1), Type.Q8_0).read_bytes()
    start = min(e.start for e in read_gguf(tmp_path / "whole.gguf")[0])
    rng, path, refused = np.random.default_rng(0), tmp_path / "x.gguf", 0
    for at in rng.integers(0, start, 400):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            entries, _ = read_gguf(path)
            assert all(start <= e.start <= e.start + e.nbytes <= len(content) for e in entries if e.nbytes)
        except CheckpointError:
            refused += 1
    assert 20 < refused < 400


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("adapter", "this is a LoRA adapter of llama.cpp"), ("imatrix", "this is an importance matrix of llama.cpp")],
)
def test_what_is_no_model(tmp_path, kind, expected):
    path = write(tmp_path / "x.gguf", numbers(1), general_type=kind)
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(str(path))


# --- folders and splits ----------------------------------------------------------------------------------------------


def test_a_split_model_is_opened_by_any_part_or_by_its_folder(tmp_path):
    whole = raw(write(tmp_path / "whole.gguf", numbers(1), Type.F16))
    first = write(tmp_path / "s" / "m.gguf", numbers(1), Type.F16, split=5)
    names = sorted(p.name for p in first.parent.iterdir())
    assert names == ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    for name in (first.parent, *first.parent.iterdir()):
        opened = open_checkpoint(str(name))
        assert [f.name for f in opened.files] == names and opened.tensors.keys() == whole.keys()
        assert opened.gguf is not None and "tokenizer.ggml.tokens" in opened.gguf.keys
        for tensor, entry in opened.tensors.items():
            content = opened.files[entry.file].read_bytes()
            assert content[entry.start : entry.start + entry.nbytes] == whole[tensor]


def damage_missing(first: Path) -> str:
    (first.parent / "m-00002-of-00003.gguf").unlink()
    return "2 of 3 files are there; missing: `m-00002-of-00003.gguf`"


def damage_swapped(first: Path) -> str:
    second = first.parent / "m-00002-of-00003.gguf"
    third = first.parent / "m-00003-of-00003.gguf"
    a, b = second.read_bytes(), third.read_bytes()
    second.write_bytes(b)
    third.write_bytes(a)
    return "its name is that of part 2 of 3, but it says that it is part 3 of 3"


def damage_renamed(first: Path) -> str:
    for path in first.parent.iterdir():
        if path != first:
            path.unlink()
    first.rename(first.parent / "alone.gguf")
    return "it says that it is part 1 of 3, and the others are not there"


def damage_number(first: Path) -> str:
    """A part that is called by a word."""
    content = first.read_bytes()
    key = b"split.no" + struct.pack("<IH", 2, 0)  # u16
    word = b"split.no" + struct.pack("<IQ", 8, 3) + b"two"
    assert content.count(key) == 1
    start = content.index(key)
    # The tensors lie elsewhere then, but keys are looked at before.
    first.write_bytes(content[:start] + word + content[start + len(key) :] + bytes(64))
    return "it says that it is part two of 3"


def damage_another(first: Path) -> str:
    other = write(first.parent / "other" / "m.gguf", numbers(1, layers=3), Type.F16, split=7)
    (other.parent / "m-00003-of-00003.gguf").replace(first.parent / "m-00003-of-00003.gguf")
    return "is of another model"


@pytest.mark.parametrize("damage", [damage_missing, damage_swapped, damage_renamed, damage_number, damage_another])
def test_damaged_splits(tmp_path, damage: Callable[[Path], str]):
    first = write(tmp_path / "s" / "m.gguf", numbers(1), Type.F16, split=5)
    expected = damage(first)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(first.parent))
    assert expected in str(caught.value)


def test_folders(tmp_path):
    """The one model; with a projector beside it, the model; of two quantisations, neither."""
    write(tmp_path / "m" / "tiny-F16.gguf", numbers(1), Type.F16)
    assert open_checkpoint(str(tmp_path / "m")).files[0].name == "tiny-F16.gguf"
    write(tmp_path / "m" / "mmproj-tiny.gguf", {"v.patch.weight": np.ones((4, 32), np.float32)}, architecture="clip")
    opened = open_checkpoint(str(tmp_path / "m"))
    assert opened.files[0].name == "tiny-F16.gguf" and "left out of" in opened.remarks[0]
    assert open_checkpoint(str(tmp_path / "m" / "mmproj-tiny.gguf")).tensors.keys() == {"v.patch.weight"}
    write(tmp_path / "m" / "tiny-Q8_0.gguf", numbers(1), Type.Q8_0)
    with pytest.raises(CheckpointError, match=r"not clear which file is the model: .*\. Name one: .*tiny-F16.gguf"):
        open_checkpoint(str(tmp_path / "m"))
