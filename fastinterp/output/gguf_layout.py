"""Layout of an output that is a GGUF file: its header, and the offset of every tensor. Pure: no file is touched."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping

from fastinterp.checkpoint.checksum import KEY, UNKNOWN
from fastinterp.checkpoint.gguf_file import ALIGNMENT, MAGIC
from fastinterp.checkpoint.gguf_keys import STRING, U32, KeyValue
from fastinterp.checkpoint.gguf_types import BY_NAME
from fastinterp.checkpoint.names import GGUF, GGUF_SPLIT, quote
from fastinterp.errors import OutputError
from fastinterp.ops.dtypes import DType
from fastinterp.output.layout import Layout, OutFile

VERSION = 3
_QUANTISATION_VERSION = 2  # of ggml's blocks

# Keys that are not true of other weights: parts of a file, what quantised it, its identity.
_UNTRUE = re.compile(r"split\..*|quantize\.imatrix\..*|general\.(uuid|quantized_by)|fastinterp(\.checksum)?")
_GUESSED = 1024  # the file type that says that there is none
_FILE_TYPES = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}  # of llama.cpp, by the type of most elements

# The name of a quantisation at the end of a file's: `llama-3-Q4_K_M`.
_QUANTISATION = re.compile(
    r"[-._](?:(?:UD-)?I?Q\d(?:_\w+)?|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|B?F16|F32|FP(?:16|32))$", re.IGNORECASE
)


def gguf_layout(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]],
    keys: Mapping[str, KeyValue],
    alignment: int,
    receipt: str,
    origin_name: str,
    same_types: bool = False,
) -> Layout:
    """The layout of one GGUF file with these tensors, in the order given.

    keys         of the origin: kept, but for those that are not true of the output
    alignment    of the data section and of every tensor, bytes
    receipt      the value of the key `fastinterp`
    origin_name  of the origin's first file, by which that of the output is called
    same_types   every tensor has the type that it has in the origin
    Raises: OutputError, if there are no tensors, a name occurs twice, or a dtype is none of GGUF's.
    """
    infos: list[bytes] = []
    places: dict[str, int] = {}
    elements: dict[str, int] = {}
    blocks = False
    end = 0
    for name, dtype, shape in tensors:
        numel = math.prod(shape)
        kind, nbytes = BY_NAME.get(dtype.name), dtype.nbytes(numel)
        if kind is None or nbytes is None:
            raise OutputError(f"tensor {quote(name)}: GGUF has no tensors of {dtype} {list(shape)}")
        if name in places:
            raise OutputError(f"tensor {quote(name)} would be written twice")
        infos.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind.number, end))
        places[name] = end
        end += nbytes + -nbytes % alignment
        elements[kind.name] = elements.get(kind.name, 0) + numel
        blocks |= dtype.block is not None
    if not places:
        raise OutputError("there are no tensors to write")
    most = max(elements, key=lambda name: elements[name])
    table = _true_keys(keys, None if same_types else _FILE_TYPES.get(most, _GUESSED), blocks, alignment)
    table["fastinterp"] = struct.pack("<I", STRING) + _string(receipt)
    table[KEY] = struct.pack("<I", STRING) + _string(UNKNOWN)
    header = struct.pack("<4sIQQ", MAGIC, VERSION, len(places), len(table))
    header += b"".join(_string(key) + raw for key, raw in table.items())
    checksum_at = len(header) - len(UNKNOWN)  # of the last key
    header += b"".join(infos)
    header += bytes(-len(header) % alignment)
    total = sum(BY_NAME[name].dtype.nbytes(numel) or 0 for name, numel in elements.items())
    at = {name: len(header) + offset for name, offset in places.items()}
    file = OutFile(file_name(origin_name, most), header, len(header) + end, at, checksum_at)
    return Layout((file,), {}, total)


def file_name(origin_name: str, most: str) -> str:
    """The name of the output: that of the origin's file without the number of a split, and with the type of most
    elements in the place of a quantisation: `llama-Q4_K_M-00001-of-00002.gguf` -> `llama-F16.gguf`.
    """
    split = GGUF_SPLIT.fullmatch(origin_name)
    stem = split["stem"] if split else origin_name.removesuffix(GGUF)
    return (f"{stem[: found.start() + 1]}{most}" if (found := _QUANTISATION.search(stem)) else stem) + GGUF


def left_out(keys: Iterable[str]) -> list[str]:
    """Those of the origin's keys that are not true of the output."""
    return [key for key in keys if not key.startswith("fastinterp") and _UNTRUE.fullmatch(key)]


def _true_keys(keys: Mapping[str, KeyValue], file_type: int | None, blocks: bool, alignment: int) -> dict[str, bytes]:
    """The keys of the output with their values, in the order of the origin's: new ones come last.

    file_type  None: as in the origin
    """
    changed = {} if file_type is None else {"general.file_type": file_type}
    if blocks:
        changed["general.quantization_version"] = _QUANTISATION_VERSION
    if alignment != ALIGNMENT or "general.alignment" in keys:
        changed["general.alignment"] = alignment
    table = {key: found.raw for key, found in keys.items() if not _UNTRUE.fullmatch(key)}
    for key, value in changed.items():
        if key not in keys or keys[key].value != value:
            table[key] = struct.pack("<II", U32, value)
    return table


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
