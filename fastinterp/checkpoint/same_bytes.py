"""Whether two tensors have the same bytes: sizes first, then one piece after the other, up to the first difference."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fastinterp.checkpoint.regular_file import read_at, regular

Place = tuple[Path, int, int]  # file, first byte, number of bytes

_PIECE = 4 << 20  # bytes that are read at a time


def same_bytes(a: Place, b: Place) -> bool:
    """Whether the bytes at two places are equal; reads at most twice 4 MiB at a time, and nothing behind a difference.

    Raises: CheckpointError, if a file cannot be opened or ends too early; StorageError, if it cannot be read.
    """
    if a == b:
        return True
    if a[2] != b[2]:
        return False
    with ExitStack() as stack:
        files = [stack.enter_context(regular(str(place[0])))[0] for place in (a, b)]
        for done in range(0, a[2], _PIECE):
            count = min(_PIECE, a[2] - done)
            first, second = (read_at(f, p[0], p[1] + done, count) for f, p in zip(files, (a, b), strict=True))
            if first != second:
                return False
    return True
