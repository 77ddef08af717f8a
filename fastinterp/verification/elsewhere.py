"""Checksums of files elsewhere, which are read by ranges, 64 MiB at a time, and stored nowhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from fastinterp.backends.cpu import REGION_BYTES, checksum
from fastinterp.backends.registry import cpu_threads
from fastinterp.checkpoint.regular_file import write_all
from fastinterp.checkpoint.remote import RemoteFile
from fastinterp.progress import Progress

_PIECE = 8 << 20  # bytes of a request
_AT_ONCE = 8  # requests


def regions_elsewhere(
    file: RemoteFile, start: int, end: int, threads: int | None, progress: Progress | None
) -> list[int]:
    """The checksums of the regions of a file's data. Raises: StorageError; CheckpointError, if the file changed."""
    numbers: list[int] = []
    with _memory() as fd, ThreadPoolExecutor(_AT_ONCE) as pool:

        def fetch(at: int, stop: int) -> None:
            data = bytearray(stop - at)
            file.read_into(memoryview(data), at)
            write_all(fd, bytes(data), at)  # where it is in the file: checksums depend on places

        at = start
        while at < end:
            stop = min(end, (at // REGION_BYTES + 1) * REGION_BYTES)
            spans = [(first, min(stop, first + _PIECE)) for first in range(at, stop, _PIECE)]
            for _ in pool.map(lambda span: fetch(*span), spans):
                pass
            numbers += checksum(fd, at, stop, cpu_threads(threads))
            os.ftruncate(fd, 0)
            at = stop
            if progress is not None:
                progress(at, end)
    return numbers


@contextmanager
def _memory() -> Iterator[int]:
    """Context manager: a file without a name, in memory where the system has such."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("fastinterp")
        try:
            yield fd
        finally:
            os.close(fd)
    else:
        with tempfile.TemporaryFile() as file:
            yield file.fileno()
