"""Rows of encoded tensors in numpy, where a few are needed outside of a run: those that are averaged, say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.plan.encoded_rows import aligned, rows_of
from fastinterp.plan.inputs import StoredInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

Read = Callable[[Path, int, int], bytes]  # (file, byte offset, bytes)


def decoded_rows(tensor: StoredInput, first: int, count: int, columns: int, read: Read) -> NDArray[Any]:
    """f32[count, columns]: rows of an encoded tensor, of the length that the caller takes for a row."""
    import numpy as np

    own = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.numel
    if own != columns:  # single elements of a tensor of one dimension
        whole = decoded(tensor, read).reshape(-1, columns)
        return np.ascontiguousarray(whole[first : first + count])
    start, length = aligned(tensor, first, count)
    part = rows_of(tensor, start, length)
    numbers = decoded(tensor if part is None else part, read).reshape(-1, columns)
    start = 0 if part is None else start
    return np.ascontiguousarray(numbers[first - start : first - start + count])


def decoded(tensor: StoredInput, read: Read) -> NDArray[Any]:
    """f32[numel]: all numbers of an encoded tensor."""
    import numpy as np

    from fastinterp.reference.decode import decode

    encoding = tensor.encoding
    assert encoding is not None
    nbytes = tensor.nbytes - sum(companion.nbytes for companion in encoding.companions)
    codes = np.frombuffer(read(tensor.path, tensor.start, nbytes), np.uint8)
    companions = [np.frombuffer(read(c.path, c.start, c.nbytes), np.uint8) for c in encoding.companions]
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.numel
    return decode(encoding.decoder, codes, companions, encoding.parameters, tensor.numel, columns)
