"""Computes tensors of an output again, in memory, and compares their bytes with the files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np

from fastinterp.checkpoint import remote
from fastinterp.checkpoint.regular_file import close, read_at
from fastinterp.execute.sources import storage
from fastinterp.execute.to_memory import filling
from fastinterp.ops.dtypes import DType
from fastinterp.plan.plan import Plan
from fastinterp.progress import Progress
from fastinterp.verification.pieces import Piece

_COMPARED = 16 << 20  # bytes of a file that are read at a time


class Place(msgspec.Struct, frozen=True):
    """Where a tensor is in the output's files."""

    path: Path
    start: int


class Difference(msgspec.Struct, frozen=True):
    """A tensor whose bytes are not those that the recipe gives.

    file      relative to the output's folder
    element   the first element that differs
    elements  how many of those that were compared differ
    compared  how many were compared
    """

    file: str
    tensor: str
    element: int
    elements: int
    compared: int


def differences(
    plan: Plan,
    pieces: Sequence[Piece],
    places: Mapping[str, Place],
    root: Path,
    *,
    threads: int | None,
    max_memory: int,
    progress: Progress | None = None,
) -> list[Difference]:
    """The tensors that differ, in the order of the plan.

    plan    of the output
    pieces  what of it is computed
    places  of each tensor in the files
    root    the output's folder
    Raises: what run does: CheckpointError, ShapeError, StorageError, UsageError.
    """
    total = sum(piece.nbytes for piece in pieces)
    by_name = {piece.tensor.name: piece for piece in pieces}
    # Requests about the whole model read the tensors, too, that are not compared.
    asked = any(p.tensor.program is not None and p.tensor.program.whole for p in pieces)
    others = [t for t in plan.tensors if t.name not in by_name and t.merged] if asked else []
    run = replace(plan, tensors=(*(p.tensor for p in pieces), *others))
    found: dict[str, Difference] = {}
    with ExitStack() as stack:
        files = _Files(stack)
        arrays, addresses = _allocated(pieces)
        done = 0
        for names in filling(run, addresses, threads=threads, max_memory=max_memory):
            for name in names:
                piece = by_name[name]
                for entry, dtype, _ in piece.tensor.entries:
                    own = entry if piece.tensor is piece.of else piece.of.name
                    _compare(found, piece, own, dtype, arrays.pop(entry), places[own], files, root)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)
    order = {t.name: k for k, t in enumerate(plan.tensors)}
    return sorted(found.values(), key=lambda d: order.get(d.tensor, len(order)))


def _allocated(pieces: Iterable[Piece]) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, int]]]:
    """Memory for the entries of all tensors: the system gives it when it is written."""
    arrays: dict[str, np.ndarray] = {}
    addresses: dict[str, tuple[int, int]] = {}
    for piece in pieces:
        for name, dtype, shape in piece.tensor.entries:
            arrays[name] = np.empty(dtype.nbytes(math.prod(shape)) or 0, np.uint8)
            addresses[name] = arrays[name].ctypes.data, arrays[name].nbytes
    return arrays, addresses


class _Files:
    """The output's files, opened when they are needed."""

    def __init__(self, stack: ExitStack):
        self._stack, self._fds = stack, dict[Path, int]()

    def pieces(self, path: Path, start: int, nbytes: int) -> Iterator[tuple[int, bytes]]:
        """(offset from `start`, bytes), in order. What is missing at the end of the file is left out."""
        if (elsewhere := remote.find(path)) is not None:
            for at in range(0, nbytes, _COMPARED):
                data = bytearray(max(0, min(_COMPARED, nbytes - at, elsewhere.size - start - at)))
                elsewhere.read_into(memoryview(data), start + at)
                yield at, bytes(data)
            return
        with storage(path):
            if path not in self._fds:
                self._fds[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._stack.callback(close, self._fds[path], path)
            there = min(nbytes, os.fstat(self._fds[path]).st_size - start)
            for at in range(0, there, _COMPARED):
                yield at, read_at(self._fds[path], path, start + at, min(_COMPARED, there - at))


def _compare(
    found: dict[str, Difference],
    piece: Piece,
    name: str,
    dtype: DType,
    computed: np.ndarray,
    place: Place,
    files: _Files,
    root: Path,
) -> None:
    bits = dtype.bits if dtype.block is None else 8
    skip = piece.first * dtype.bits // 8
    wrong, first = 0, None
    for at, data in files.pieces(place.path, place.start + skip, computed.nbytes):
        own = computed[at : at + _COMPARED]
        if len(data) == own.nbytes and data == own.tobytes():
            continue
        stored = np.zeros_like(own)
        stored[: len(data)] = np.frombuffer(data, np.uint8)
        unequal = np.nonzero(stored != own)[0]
        unequal = np.unique((unequal + at) * 8 // bits)
        wrong += max(1, len(unequal))
        first = first if first is not None or not len(unequal) else int(unequal[0]) + piece.first
    before = found.get(name)
    compared = computed.nbytes * 8 // bits
    if wrong:
        file = os.path.relpath(place.path, root)
        if before is None:
            found[name] = Difference(file, name, first or 0, wrong, compared)
        else:
            found[name] = Difference(
                file, name, min(before.element, first or 0), before.elements + wrong, before.compared + compared
            )
