"""Layout of the output files: which shard and offset each tensor gets. Pure: no file is touched."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import msgspec

from fastinterp.checkpoint.checksum import KEY, UNKNOWN, checksum_text
from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import WEIGHTS, index_of, quote
from fastinterp.errors import OutputError, UsageError
from fastinterp.ops.dtypes import DType

ALIGN = 4096  # bytes; the data section starts on a page, so that it can be mapped and written directly

_UNITS = {
    "": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes in `text`: `5GB` or `5G` (10^9), `1.5GiB` (2^30), or a plain number of bytes.

    Raises: UsageError, if it is anything else, or less than one byte.
    """
    match = re.fullmatch(r"\s*(\d{1,18})(?:\.(\d{1,18}))?\s*([A-Za-z]*)\s*", text, re.ASCII)
    unit = _UNITS.get(match[3].upper()) if match else None
    if match is None or unit is None:
        raise UsageError(
            f"{quote(text)} is not a size; write a number with KB, MB, GB, TB, KiB, MiB, GiB or TiB, as 5GB"
        )
    fraction = match[2] or ""
    size: int = int(match[1] + fraction) * unit // 10 ** len(fraction)
    if size < 1:
        raise UsageError(f"the size {quote(text)} is less than one byte")
    return size


class OutFile(msgspec.Struct, frozen=True):
    """One output file: its first bytes, and where its tensors go."""

    name: str  # relative to the output folder: `unet/diffusion_pytorch_model.safetensors`
    header: bytes  # length and JSON, padded with spaces to a multiple of ALIGN
    size: int  # of the whole file, bytes
    places: dict[str, int]  # tensor name -> byte offset in the file, from its first byte
    checksum_at: int | None = None  # where the header states the checksum of the data; None: it states none

    def header_with(self, checksum: int) -> bytes:
        """The header, with the checksum of the data in the place of UNKNOWN."""
        if self.checksum_at is None:
            return self.header
        text = checksum_text(checksum).encode()
        return self.header[: self.checksum_at] + text + self.header[self.checksum_at + len(text) :]


class Layout(msgspec.Struct, frozen=True, dict=True):
    """The files of an output."""

    files: tuple[OutFile, ...]
    indexes: dict[str, bytes]  # STEM.safetensors.index.json -> its content; none for a single file
    total_size: int  # bytes of all tensors, without headers

    @cached_property
    def _file_of(self) -> dict[str, int]:
        return {name: number for number, file in enumerate(self.files) for name in file.places}

    def place(self, tensor: str) -> tuple[int, int]:
        """The number of a tensor's file, and its byte offset in that. Raises: KeyError, if no file has it."""
        number = self._file_of[tensor] if len(self.files) > 1 else 0
        return number, self.files[number].places[tensor]

    @property
    def disk_bytes(self) -> int:
        """What the output takes on the disk: data, headers and indexes."""
        return sum(f.size for f in self.files) + sum(map(len, self.indexes.values()))


class _Tensor(msgspec.Struct, frozen=True, gc=False):
    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int


def make_layout(
    tensors: Iterable[tuple[str, DType, tuple[int, ...]]],
    metadata: dict[str, str],
    max_shard_size: int,
    stem: str = "model",
    folder: str = "",
    beside: Mapping[str, str] = {},
) -> Layout:
    """Lay `tensors` out in one file, or in shards of at most `max_shard_size` bytes of data, in the order given.

    A tensor larger than that gets a shard of its own. Within a file wider dtypes come first, as safetensors itself
    writes them, so that every tensor is aligned to its own width. `metadata` goes into every file; a checksum in it is
    UNKNOWN.

    beside  tensor -> the one before it whose shard it must be in: scales -> codes
    folder  of the files in the output's. All names of tensors start with `FOLDER/`, which is left out in the files
    Raises: OutputError, if there are no tensors, a name occurs twice or is reserved, or a header grows too large.
    """
    prefix = f"{folder}/" if folder else ""
    shards = _cut(_checked(tensors, prefix), max_shard_size, beside)
    files = []
    for number, shard in enumerate(shards, 1):
        name = f"{stem}{WEIGHTS}" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}{WEIGHTS}"
        files.append(_out_file(prefix + name, shard, metadata, len(prefix)))
    total = sum(t.nbytes for shard in shards for t in shard)
    indexes = {}
    if len(shards) > 1:
        skip = len(prefix)
        weight_map = {tensor[skip:]: file.name[skip:] for file in files for tensor in file.places}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        indexes[prefix + index_of(stem)] = (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
    return Layout(tuple(files), indexes, total)


def joined(layouts: Sequence[Layout]) -> Layout:
    """The layout of an output that has the files of all of these, which lie in different folders."""
    files = tuple(file for layout in layouts for file in layout.files)
    indexes = {name: content for layout in layouts for name, content in layout.indexes.items()}
    return Layout(files, indexes, sum(layout.total_size for layout in layouts))


def _checked(tensors: Iterable[tuple[str, DType, tuple[int, ...]]], prefix: str) -> list[_Tensor]:
    checked: dict[str, _Tensor] = {}
    for name, dtype, shape in tensors:
        nbytes = dtype.nbytes(math.prod(shape))
        if nbytes is None:
            raise OutputError(f"tensor {quote(name)}: {dtype} {list(shape)} does not fill whole bytes")
        if name in checked:
            raise OutputError(f"tensor {quote(name)} would be written twice")
        if name.removeprefix(prefix) == "__metadata__":
            raise OutputError("a tensor cannot be called `__metadata__`: safetensors reserves the name")
        checked[name] = _Tensor(name, dtype, tuple(shape), nbytes)
    if not checked:
        raise OutputError("there are no tensors to write")
    return list(checked.values())


def _cut(tensors: list[_Tensor], max_shard_size: int, beside: Mapping[str, str]) -> list[list[_Tensor]]:
    """Fill one shard after the other, as huggingface_hub does, so that the shards are those of `save_pretrained`."""
    groups: dict[str, list[_Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(beside.get(tensor.name, tensor.name), []).append(tensor)
    shards: list[list[_Tensor]] = []
    current: list[_Tensor] = []
    used = 0
    for group in groups.values():
        nbytes = sum(tensor.nbytes for tensor in group)
        if nbytes > max_shard_size:
            shards.append(group)
            continue
        if used + nbytes > max_shard_size:
            shards.append(current)
            current, used = [], 0
        current.extend(group)
        used += nbytes
    return [*shards, current] if current else shards


def _out_file(name: str, tensors: list[_Tensor], metadata: dict[str, str], skip: int) -> OutFile:
    """skip: how many characters at the start of tensors' names are left out in the file"""
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: -t.dtype.bits):
        offsets[tensor.name] = end
        table[tensor.name[skip:]] = {
            "dtype": tensor.dtype.name,
            "shape": tensor.shape,
            "data_offsets": (end, end + tensor.nbytes),
        }
        end += tensor.nbytes
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    if len(text) > MAX_HEADER:
        more = len(json.dumps(metadata, ensure_ascii=False).encode())
        raise OutputError(
            f"{name}: its header takes {len(text)} bytes, {more} of them metadata; safetensors allows {MAX_HEADER}. "
            "Where there are too many tensors, use more shards: --max-shard-size"
        )
    start = 8 + len(text)
    places = {tensor: start + offset for tensor, offset in offsets.items()}
    header = len(text).to_bytes(8, "little") + text
    # Within strings every quote follows on a backslash; and no tensor has a string for an entry.
    found = re.search(rf'[{{,]"{re.escape(KEY)}":"(?={UNKNOWN}")'.encode(), header)
    return OutFile(name, header, start + end, places, found.end() if found else None)
