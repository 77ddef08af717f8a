"""Gathers the rows of an embedding in the order of another vocabulary.

Rows of a model with the same dtype are read in place. Means, padding, and rows in another dtype are computed first, a
piece at a time, into an unnamed temporary file beside the output, so that memory stays bounded.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.checkpoint.regular_file import close, write_all
from fastinterp.checkpoint.remote import Readable, opened, read_from
from fastinterp.execute.decode_rows import decoded_rows
from fastinterp.ops.dtypes import DType
from fastinterp.plan.inputs import GatheredInput, StoredInput
from fastinterp.tokenizer.embedding_rows import PADDING, ZEROS, split

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 2 << 20  # bytes of rows that are held at a time


@dataclass(frozen=True)
class Gathered:
    """The location of each row of one embedding.

    parts          (tensor, rows): tensors of checkpoints and how many rows they have, numbered one part after the other
    computed       descriptor of a temporary file of further rows, from byte 0, numbered after `parts`; or None
    computed_rows  number of rows in it
    rows           i64[rows of the output]: the number of the row, -1 for zeros; None: `computed` is the whole tensor
    """

    parts: tuple[tuple[StoredInput, int], ...]
    computed: int | None
    computed_rows: int
    rows: NDArray[Any] | None


def gather(tensor: GatheredInput, folder: Path | None, stack: ExitStack) -> Gathered:
    """Compute the rows that no file holds, and locate all rows.

    folder  folder of the temporary file, which is open until `stack` closes; None: the system's

    Rows of another model are rounded to this tensor's dtype, to nearest, if theirs is another; so are means, which are
    summed in float32 (float64 if a row is F64) in the order of the plan, and padding, summed in float64. A tensor of
    one dimension, as of a bias, is computed as a whole: its rows are single elements.
    Raises: CheckpointError, if a file of a model cannot be read or was truncated; OSError, if the temporary file cannot
    be written.
    """
    import numpy as np

    codes = np.frombuffer(tensor.rows.codes, np.int64)
    if len(tensor.shape) == 1:
        return Gathered((), _computed(tensor, codes, folder, stack), codes.size, None)
    parts: list[tuple[StoredInput, int]] = []
    end = 0
    columns = tensor.numel // max(1, codes.size)
    starts = np.full(len(tensor.sources) + 1, -1, np.int64)  # of each source, its first row; the last stands for means
    for model in tensor.models:
        source = tensor.sources[model]
        if source is not None and source.dtype == tensor.dtype:
            starts[model] = end
            count = source.numel // max(1, columns)
            parts.append((source, count))
            end += count
    stored = (codes >= 0) & (starts[codes >> 40] >= 0)  # codes below 0 look at the last
    rows = np.where(stored, (codes & (1 << 40) - 1) + starts[codes >> 40], -1)
    left = (codes != ZEROS) & ~stored
    rows[left] = np.arange(left.sum()) + end
    computed = _computed(tensor, codes[left], folder, stack) if left.any() else None
    return Gathered(tuple(parts), computed, int(left.sum()), rows)


def _computed(tensor: GatheredInput, codes: NDArray[Any], folder: Path | None, stack: ExitStack) -> int:
    """A descriptor of an unnamed temporary file that holds the rows of these codes."""
    with tempfile.TemporaryFile(dir=folder) as file:
        fd = os.dup(file.fileno())
    stack.callback(close, fd, folder or "a temporary file")
    with ExitStack() as inputs:
        reader = _RowReader(tensor, inputs)
        mean = reader.mean_of_all() if PADDING in codes else b""
        for first in range(0, codes.size, reader.step):
            write_all(fd, reader.rows(codes[first : first + reader.step], mean).tobytes(), first * reader.nbytes)
    return fd


class _RowReader:
    """Reads, converts and averages the rows of one embedding. Its input files are open until `stack` closes.

    nbytes  size of one row in bytes
    step    number of rows that are held at a time
    """

    def __init__(self, tensor: GatheredInput, stack: ExitStack):
        import numpy as np

        self._np, self._tensor, self._stack = np, tensor, stack
        self._files: dict[Path, Readable] = {}
        self.columns = tensor.numel // max(1, len(tensor.rows.codes))
        self.nbytes = tensor.dtype.nbytes(self.columns) or 0
        self.step = max(1, _PIECE // max(1, self.nbytes))

    def rows(self, codes: NDArray[Any], padding: bytes) -> NDArray[Any]:
        """The rows of these codes, u8[len(codes), nbytes]; `padding` for rows of padding."""
        np = self._np
        out: NDArray[Any] = np.zeros((codes.size, self.nbytes), np.uint8)
        if padding:
            out[codes == PADDING] = np.frombuffer(padding, np.uint8)
        named = np.flatnonzero(codes >= 0)
        # Runs of rows that are contiguous both in the model and in the output are read at once.
        breaks = (np.diff(codes[named]) != 1) | (np.diff(named) != 1)
        for run in np.split(named, np.flatnonzero(breaks) + 1) if named.size else ():
            out[run[0] : run[0] + run.size] = self._run(int(codes[run[0]]), run.size)
        return out

    def mean_of_all(self) -> bytes:
        """The mean of all rows of the output except padding, as bytes."""
        np = self._np
        every = np.frombuffer(self._tensor.rows.codes, np.int64)
        every = every[every != PADDING]
        total = np.zeros((1, self.columns), np.float64)
        for first in range(0, every.size, self.step):
            raw = self.rows(every[first : first + self.step], b"")
            wide = self._wide(raw, self._tensor.dtype).astype(np.float64).reshape(-1, self.columns)
            # Row after row, so that the sum depends neither on the size of a piece nor on numpy's order of summation.
            total = np.concatenate((total, wide)).cumsum(axis=0)[-1:]
        mean: bytes = self._narrow(total[0] / max(1, every.size)).tobytes()
        return mean

    def _run(self, code: int, count: int) -> NDArray[Any]:
        """`count` contiguous rows of one model, u8[count, nbytes]; or as many means."""
        model, row = split(code)
        if model == len(self._tensor.sources):
            return self._np.stack([self._mean(k) for k in range(row, row + count)])
        raw, dtype = self._raw(model, row, count)
        if dtype != self._tensor.dtype:
            raw = self._narrow(self._wide(raw, dtype))
        return raw.reshape(count, self.nbytes)

    def _mean(self, k: int) -> NDArray[Any]:
        rows = [self._wide(*self._raw(model, row, 1)) for model, row in self._tensor.means[k]]
        total = rows[0].astype(self._np.result_type(*rows))
        for row in rows[1:]:
            total = total + row
        return self._narrow(total / total.dtype.type(len(rows)))

    def _raw(self, model: int, row: int, count: int) -> tuple[NDArray[Any], DType]:
        source = self._tensor.sources[model]
        assert source is not None
        if source.encoding is not None:
            return decoded_rows(source, row, count, self.columns, self._bytes).view(self._np.uint8), source.dtype
        nbytes = source.dtype.nbytes(self.columns) or 0
        raw = self._bytes(source.path, source.start + row * nbytes, count * nbytes)
        return self._np.frombuffer(raw, self._np.uint8), source.dtype

    def _bytes(self, path: Path, start: int, nbytes: int) -> bytes:
        if path not in self._files:
            self._files[path] = self._stack.enter_context(opened(str(path)))
        return read_from(self._files[path], path, start, nbytes)

    def _wide(self, raw: NDArray[Any], dtype: DType) -> NDArray[Any]:
        from fastinterp.reference.combine import widen

        return widen(raw.reshape(-1), dtype)

    def _narrow(self, values: NDArray[Any]) -> NDArray[Any]:
        from fastinterp.reference.combine import narrow

        return narrow(values, self._tensor.dtype).view(self._np.uint8)
