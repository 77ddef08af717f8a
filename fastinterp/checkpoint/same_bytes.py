"""Whether two tensors have the same bytes: sizes first, then one piece after the other, up to the first difference."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fastinterp.checkpoint import remote
from fastinterp.checkpoint.remote import opened, read_from

Place = tuple[Path, int, int]  # file, first byte, number of bytes

_PIECE = 4 << 20  # bytes that are read at a time
_SAMPLE, _SAMPLES = 64 << 10, 5  # bytes of a sample, and how many are spread over a tensor


def same_bytes(a: Place, b: Place) -> bool:
    """Whether the bytes at two places are equal; reads at most twice 4 MiB at a time, and nothing behind a difference.
    Of files elsewhere samples are compared first; if these are equal, the files are fetched, or, where only headers are
    wanted, that is the answer.

    Raises: CheckpointError, if a file cannot be opened or ends too early; StorageError, if it cannot be read.
    """
    if a == b:
        return True
    if a[2] != b[2]:
        return False
    if (remote.find(a[0]) or remote.find(b[0])) is not None:
        if not _same_samples(a, b):
            return False
        if remote.only_headers():
            return True
        remote.fetch(path for path in (a[0], b[0]) if not remote.is_streamed(path))  # they are read anyway
    with ExitStack() as stack:
        files = [stack.enter_context(opened(str(place[0]))) for place in (a, b)]
        for done in range(0, a[2], _PIECE):
            count = min(_PIECE, a[2] - done)
            first, second = (read_from(f, p[0], p[1] + done, count) for f, p in zip(files, (a, b), strict=True))
            if first != second:
                return False
    return True


def _same_samples(a: Place, b: Place) -> bool:
    """Whether samples of two places of one size are equal."""
    with ExitStack() as stack:
        files = [stack.enter_context(opened(str(place[0]))) for place in (a, b)]
        for k in range(_SAMPLES):
            count = min(_SAMPLE, a[2])
            done = (a[2] - count) * k // (_SAMPLES - 1)
            first, second = (read_from(f, p[0], p[1] + done, count) for f, p in zip(files, (a, b), strict=True))
            if first != second:
                return False
    return True
