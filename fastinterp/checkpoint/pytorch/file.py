"""Reads the header of a file of torch.save: a zip file with a pickle, and with storages that are read in place."""

from __future__ import annotations

import os
from pathlib import Path

from fastinterp.checkpoint.header import MAX_NUMEL, Entry, FileHeader
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.pytorch import remedies
from fastinterp.checkpoint.pytorch.pickle_reader import read_pickle
from fastinterp.checkpoint.pytorch.state_dict import choose_state_dict
from fastinterp.checkpoint.pytorch.strided import Strided, is_contiguous
from fastinterp.checkpoint.pytorch.tensors import Tensor, TensorCalls
from fastinterp.checkpoint.pytorch.zip_file import ZipEntry, read_directory
from fastinterp.checkpoint.remote import Readable, opened, read_from
from fastinterp.errors import CheckpointError

_MAX_PICKLE = 100_000_000  # bytes
_MAX_EXPANDED = 1 << 30  # bytes of a tensor in a file that is smaller than the tensor


def read_header(path: Path, number: int) -> FileHeader:
    """The tensors of the file at `path`, in the order of their dict; torch may have written storages in another.

    Reads the directory of the zip file and the pickle, no storages. `number` becomes `Entry.file`. Tensors that share a
    storage, tied weights, are entries with the same bytes.
    Raises: CheckpointError, naming file and tensor, if the file is damaged, no zip file of torch.save, or needs what is
    not read.
    """
    file = os.fspath(path)
    with opened(file) as source:
        if message := remedies.other_form(source.pread(512, 0), file):
            raise CheckpointError(message, file=file)
        directory = read_directory(source, file)
        root = _root(directory, file)
        pickle = _pickle(source, directory, root, file)
    calls = TensorCalls(file)
    tensors, remarks = choose_state_dict(read_pickle(pickle, calls, file), file, calls.foreign)
    entries = [_entry(name, tensor, directory, root, source.size, number, file) for name, tensor in tensors.items()]
    return FileHeader(entries, {}, remarks)


def _root(directory: dict[str, ZipEntry], file: str) -> str:
    """The folder in the zip file that all is in."""
    root = next(iter(directory), "").partition("/")[0]
    names = {name for name in (f"{root}/data.pkl", f"{root}/constants.pkl", f"{root}/code/") if name in directory}
    if f"{root}/constants.pkl" in names:
        raise CheckpointError(remedies.torch_script(file), file=file)
    if f"{root}/data.pkl" not in names:
        raise CheckpointError("it is a zip file, but not one that torch.save wrote: it has no data.pkl", file=file)
    return root


def _pickle(source: Readable, directory: dict[str, ZipEntry], root: str, file: str) -> bytes:
    if any(entry.compressed for name, entry in directory.items() if name.startswith(f"{root}/")):
        raise CheckpointError(remedies.compressed(file), file=file)
    order = directory.get(f"{root}/byteorder")
    if order is not None and (found := source.pread(min(order.nbytes, 16), order.start)) != b"little":
        raise CheckpointError(remedies.byte_order(file, found), file=file)
    entry = directory[f"{root}/data.pkl"]
    if entry.nbytes > _MAX_PICKLE:
        raise CheckpointError(f"its pickle has {entry.nbytes} bytes, more than the allowed {_MAX_PICKLE}", file=file)
    return read_from(source, file, entry.start, entry.nbytes)


def _entry(
    name: str, tensor: Tensor, directory: dict[str, ZipEntry], root: str, size: int, number: int, file: str
) -> Entry:  # fmt: skip
    """The place of a tensor. size: of the file, in bytes."""

    def error(what: str) -> CheckpointError:
        return CheckpointError(f"tensor {quote(name)}: {what}", file=file, tensor=name)

    try:
        name.encode()
    except UnicodeEncodeError:
        raise error("its name is not valid Unicode") from None
    storage = tensor.storage
    place = directory.get(f"{root}/data/{storage.key}")
    if place is None:
        raise error(f"its storage {quote(storage.key)} is not in the file")
    if place.nbytes < storage.nbytes:
        raise error(f"its storage {quote(storage.key)} has {place.nbytes} bytes, and {storage.nbytes} are named")
    numel, last = 1, tensor.offset
    for length, stride in zip(tensor.shape, tensor.strides, strict=True):
        numel *= length
        last += (length - 1) * stride
        if numel > MAX_NUMEL:
            raise error(f"shape {quote(list(tensor.shape))} has more than 2^63 - 1 elements")
    item = tensor.dtype.bits // 8
    start, nbytes = place.start + tensor.offset * item, numel * item
    if not numel:
        return Entry(name, tensor.dtype, tensor.shape, place.start, 0, number)
    if (last + 1) * item > storage.nbytes:
        raise error(f"it ends at byte {(last + 1) * item} of its storage, which has {storage.nbytes}")
    if is_contiguous(tensor.shape, tensor.strides):
        return Entry(name, tensor.dtype, tensor.shape, start, nbytes, number)
    if nbytes > max(size, _MAX_EXPANDED):
        raise error(f"it has {nbytes} bytes, made of {storage.nbytes}: an expanded tensor of that size is not read")
    kept = [(n, s * item) for n, s in zip(tensor.shape, tensor.strides, strict=True) if n > 1]
    view = Strided(start, item, tuple(n for n, _ in kept), tuple(s for _, s in kept))
    return Entry(name, tensor.dtype, tensor.shape, start, nbytes, number, view)
