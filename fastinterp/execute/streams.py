"""Files that are elsewhere as sources of the pump: threads fetch what it asks for, a bounded part at a time.

The pump reads such a file as any other, and asks ahead for the bytes of the next blocks. What it asks for lies in cells
of a few MiB in memory (csrc/range_cache.h): a thread here takes a cell that is wanted, and has the file fill it by one
request. Cells that were read make room. So nothing touches the disk, memory is bounded, and what is read again, by
methods with statistics, is fetched again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

from fastinterp.backends.cpu import RangeCache, RemoteSource
from fastinterp.checkpoint.remote import RemoteFile

_LARGEST, _SMALLEST = 8 << 20, 256 << 10  # bytes of a cell
_CELLS = 16  # for each file that is read at the same time: in use, being fetched, and ahead
_THREADS = 4  # for each such file
_MOST_THREADS = 16
_BLOCK = 2 << 20  # kBlockBytes of the pump
_TICK_S = 0.2


class Streams:
    """Files elsewhere, fetched by threads until `stack` closes.

    files    RemoteFiles
    at_once  how many of them are read at the same time: one for each model
    most     bytes of memory for what is fetched
    """

    def __init__(self, files: Sequence[RemoteFile], at_once: int, most: int, stack: ExitStack):
        at_once = max(1, min(at_once, len(files)))
        cell = max(_SMALLEST, min(_LARGEST, most // (_CELLS * at_once))) // 65536 * 65536
        self._files = files
        self._cache = RangeCache([file.size for file in files], cell, most)
        self._errors: dict[int, BaseException] = {}
        threads = min(_MOST_THREADS, _THREADS * at_once)
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(threads)]
        stack.callback(self._stop)
        for thread in self._threads:
            thread.start()

    def source(self, number: int) -> RemoteSource:
        """A file as a source of the pump."""
        return RemoteSource(self._cache, number)

    def error(self, number: int) -> BaseException | None:
        """Why a file cannot be read; None, if it can."""
        return self._errors.get(number)

    @property
    def fetched(self) -> int:
        """Bytes that were fetched so far."""
        return self._cache.fetched

    def _work(self) -> None:
        while not self._cache.stopped:
            taken = self._cache.take(_TICK_S)
            if taken is None:
                continue
            number, offset, view = taken
            try:
                self._files[number].read_into(view, offset)
            except BaseException as error:
                self._errors.setdefault(number, error)
                self._cache.fail(number)
            else:
                self._cache.filled(number, offset)

    def _stop(self) -> None:
        """Have the threads end, without waiting. One that is in a request ends after it, and holds what it fills."""
        self._cache.stop()
        for thread in self._threads:
            thread.join(_TICK_S / len(self._threads))


def blocks_ahead(at_once: int, most: int) -> int:
    """How many blocks the pump asks for ahead, where so many files are read at the same time with `most` bytes."""
    return max(2, min(64, most // 2 // (_BLOCK * max(1, at_once))))
