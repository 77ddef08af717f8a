"""Checks the scales of encoded tensors before anything is written: NaN or Inf there would spoil whole blocks."""

from __future__ import annotations

from collections.abc import Sequence

from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.remote import Readable, read_from
from fastinterp.errors import CheckpointError
from fastinterp.plan.inputs import StoredInput

_PIECE = 1 << 20  # bytes that are looked at at a time


def refuse_scales(tensor: StoredInput, companions: Sequence[StoredInput], files: Sequence[Readable]) -> None:
    """Raises: CheckpointError, if a scale of an encoded tensor is not finite; StorageError.

    files  of the companions
    """
    for companion, file in zip(companions, files, strict=True):
        size = max(1, companion.dtype.bits // 8)
        for at in range(0, companion.nbytes, _PIECE):
            data = read_from(file, companion.path, companion.start + at, min(_PIECE, companion.nbytes - at))
            index = not_finite(data, companion.dtype.name)
            if index >= 0:
                raise CheckpointError(
                    f"{quote(companion.name)} ({companion.describe()}), the scale of {quote(tensor.name)}, holds NaN "
                    f"or Inf: its element {at // size + index}, counted from 0. Download or copy the checkpoint again, "
                    "or quantise the model anew",
                    file=str(companion.path),
                    tensor=companion.name,
                )


def not_finite(data: bytes, dtype: str) -> int:
    """The index of the first element that is NaN or Inf; -1, if there is none, or in dtypes that have none.

    U8 holds exponents here, as F8_E8M0 does: 255 is NaN.
    """
    if dtype in ("F8_E8M0", "U8"):
        return data.find(0xFF)
    if dtype == "F8_E4M3":
        return _first(data, (0x7F, 0xFF))
    if dtype == "F16":
        return _first(data[1::2], (*range(0x7C, 0x80), *range(0xFC, 0x100)))
    if dtype in ("F32", "BF16"):
        size = 4 if dtype == "F32" else 2
        high, next_high = data[size - 1 :: size], data[size - 2 :: size]
        at = _first(high, (0x7F, 0xFF))
        while at >= 0 and next_high[at] < 0x80:  # of a large number
            at = _first(high, (0x7F, 0xFF), at + 1)
        return at
    return -1


def _first(data: bytes, values: Sequence[int], start: int = 0) -> int:
    """The first place of any of these bytes, from `start` on; -1, if there is none."""
    return min((at for value in values if (at := data.find(value, start)) >= 0), default=-1)
