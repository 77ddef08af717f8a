"""The rows of embeddings, put into the order of another vocabulary before they are merged.

They go through memory a piece at a time into a file without a name, beside the output, which the merge then reads like
any other: so memory stays bounded, whatever the method reads and how often. numpy does the work.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.compute.dtypes import DType
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.files.embedding import PADDING, ZEROS, MappedEntry, split
from fastinterp.files.regular import open_regular

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 2 << 20  # bytes that are held at a time


def gathered(entry: MappedEntry, folder: Path | None, stack: ExitStack) -> int:
    """A descriptor of a file that holds the tensor from byte 0 and is open until `stack` closes; it has no name.

    Rows of another model are rounded to this tensor's dtype, to nearest, if theirs is another; so are means, which are
    summed in float32 (float64 if a row is F64) in the order of the plan, padding in float64.
    folder  None: that for temporary files
    Raises: CheckpointError, if a model's file cannot be read or was cut; OSError, if the new one cannot be written.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        fd = os.dup(file.fileno())
    stack.callback(os.close, fd)
    with ExitStack() as inputs:
        _write_all(fd, _Rows(entry, inputs))
    return fd


def _write_all(fd: int, rows: _Rows) -> None:
    size = rows.entry.shape[0]
    step = max(1, _PIECE // max(1, rows.nbytes))
    for first in range(0, size, step):
        _write(fd, rows.piece(first, min(step, size - first)), first * rows.nbytes)
    if rows.padded:
        mean = rows.mean_of_all()
        for r in rows.padded:
            _write(fd, mean, r * rows.nbytes)


class _Rows:
    """The rows of one new embedding, and their sum so far: f64[columns]. Its inputs are open until `stack` closes.

    nbytes  of one row
    padded  those that are the mean of all others
    """

    def __init__(self, entry: MappedEntry, stack: ExitStack):
        import numpy as np

        self._np, self.entry, self._stack = np, entry, stack
        self._fds: dict[Path, int] = {}
        self.columns = entry.numel // max(1, entry.shape[0])
        self.nbytes = entry.dtype.nbytes(self.columns) or 0
        self.padded = [r for r, code in enumerate(entry.rows.codes) if code == PADDING]
        self._sum = np.zeros(self.columns, np.float64)

    def piece(self, first: int, count: int) -> bytes:
        """Rows first .. first + count - 1, in which those of padding are zeros."""
        np = self._np
        codes = np.frombuffer(self.entry.rows.codes, np.int64)[first : first + count]
        out = np.zeros((count, self.nbytes), np.uint8)
        starts = np.flatnonzero(np.diff(codes, prepend=codes[0] - 2) != 1)  # of runs that are read at once
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), count], strict=True):
            code = int(codes[start])
            # A run that crosses -2, -1, 0 holds one row each: consecutive codes there mean different things.
            for at, length, value in _parts(start, end, code):
                if value not in (ZEROS, PADDING):
                    out[at : at + length] = self._run(value, length)
        if self.padded:
            wide = self._wide(out, self.entry.dtype).astype(np.float64).reshape(count, -1)
            # Row after row, so that neither the size of a piece nor numpy's way of summing shows.
            self._sum = np.concatenate((self._sum[None], wide)).cumsum(axis=0)[-1]
        data: bytes = out.tobytes()
        return data

    def mean_of_all(self) -> bytes:
        """The mean of the rows that are no padding; all of them have been made."""
        mean: bytes = self._narrow(self._sum / max(1, self.entry.shape[0] - len(self.padded))).tobytes()
        return mean

    def _run(self, code: int, count: int) -> NDArray[Any]:
        """`count` rows that follow each other in one model, uint8[count, nbytes]; or as many means."""
        model, row = split(code)
        if model == len(self.entry.sources):
            return self._np.stack([self._mean(k) for k in range(row, row + count)])
        raw, dtype = self._raw(model, row, count)
        if dtype != self.entry.dtype:
            raw = self._narrow(self._wide(raw, dtype))
        return raw.reshape(count, self.nbytes)

    def _mean(self, k: int) -> NDArray[Any]:
        rows = [self._wide(*self._raw(model, row, 1)) for model, row in self.entry.means[k]]
        total = rows[0].astype(self._np.result_type(*rows))
        for row in rows[1:]:
            total = total + row
        return self._narrow(total / total.dtype.type(len(rows)))

    def _raw(self, model: int, row: int, count: int) -> tuple[NDArray[Any], DType]:
        place = self.entry.sources[model]
        assert place is not None
        path, source = place
        if path not in self._fds:
            self._fds[path] = open_regular(str(path))[0]
            self._stack.callback(os.close, self._fds[path])
        nbytes = source.dtype.nbytes(self.columns) or 0
        raw = _read(self._fds[path], path, source.start + row * nbytes, count * nbytes)
        return self._np.frombuffer(raw, self._np.uint8), source.dtype

    def _wide(self, raw: NDArray[Any], dtype: DType) -> NDArray[Any]:
        from fastinterp.compute.reference import widen

        return widen(raw.reshape(-1), dtype)

    def _narrow(self, values: NDArray[Any]) -> NDArray[Any]:
        from fastinterp.compute.reference import narrow

        return narrow(values, self.entry.dtype).view(self._np.uint8)


def _parts(start: int, end: int, code: int) -> list[tuple[int, int, int]]:
    """A run of consecutive codes as (start, rows, code): the negative ones apart from those that name rows."""
    found = []
    while code < 0 and start < end:
        found.append((start, 1, code))
        start, code = start + 1, code + 1
    return [*found, (start, end - start, code)] if start < end else found


def _read(fd: int, path: Path, offset: int, count: int) -> bytes:
    parts: list[bytes] = []
    while count:
        try:
            part = os.pread(fd, count, offset)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror}, reading {count} bytes at {offset}") from None
        if not part:
            raise CheckpointError(
                f"{count} bytes are missing at byte {offset}: it was cut or replaced. Try again when it rests",
                file=str(path),
            )
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _write(fd: int, data: bytes, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], offset + done)
