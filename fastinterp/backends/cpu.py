"""The native pump: reads, combines, measures and writes on native threads, while Python waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from fastinterp._C import (
    CELL_BYTES,
    REGION_BYTES,
    FileChecksum,
    MappedFile,
    Masks,
    PlainSums,
    PreparedSums,
    Pump,
    RangeCache,
    RemoteSource,
    SumRow,
    Xxh3,
    cached_fraction,
    checksum,
    combine,
    reserve,
    start_writeback,
    xxh3,
)  # fmt: skip
from fastinterp.errors import StorageError
from fastinterp.ops.steps import Answer, Step
from fastinterp.progress import Progress

__all__ = [
    "CELL_BYTES",
    "REGION_BYTES",
    "FileChecksum",
    "Handle",
    "MappedFile",
    "Masks",
    "Memory",
    "PlainSums",
    "PreparedSums",
    "Progress",
    "Pump",
    "PumpOptions",
    "RangeCache",
    "RemoteSource",
    "SinkHandle",
    "SourceHandle",
    "SumRow",
    "Xxh3",
    "cached_fraction",
    "checksum",
    "combine",
    "memory_address",
    "reserve",
    "start_writeback",
    "survey",
    "watch",
    "xxh3",
]  # fmt: skip

# (kind, address, bytes): kind "memory" is memory of the host; "device" that of an accelerator, which the pump rejects.
Memory = tuple[str, int, int]
Handle = int | Memory  # a source or sink: a file descriptor, or memory
SourceHandle = Handle | RemoteSource | MappedFile  # also a file that is elsewhere, or mapped
SinkHandle = Handle | FileChecksum  # also a file with the checksum of what is written


def memory_address(handle: SourceHandle | SinkHandle) -> int:
    """The address of a source or sink in memory. Raises: TypeError, if it is a file."""
    if not isinstance(handle, tuple):
        raise TypeError(f"{handle} is a file, and has no address")
    return handle[1]


# Called from the thread that runs the merge, about ten times a second, with bytes done and bytes in total (read and
# written together).

_TICK_S = 0.1


class PumpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a pump. The compiled code reads the attributes.

    isa           instruction set of the kernels; empty: the best of this machine
    write_bytes   bytes of one output that are written at a time
    read_bytes    bytes of one input that are read at a time
    stochastic    round stochastically at the store, by the keys of the steps
    fp8_saturate  numbers beyond the range of an 8-bit float become the largest; else Inf or NaN
    prefetch      files are not in the page cache: request read-ahead
    ahead         so many blocks of 2 MiB of an output ahead of the work
    stats_every   in steps that write: chunk c of a tensor is sampled iff c % stats_every == 0; 0 samples none
    """

    isa: str = ""
    threads: int = 1
    write_bytes: int = 128 << 10
    read_bytes: int = 64 << 10
    stochastic: bool = False
    fp8_saturate: bool = True
    prefetch: bool = False
    ahead: int = 8
    stats_every: int = 0


def watch(pump: Pump, total: int, progress: Progress | None) -> None:
    """Run the pump to its end, or to the first exception in this thread (Ctrl-C).

    All its threads have ended on return, even if another exception is raised while they are joined: they use files that
    are closed next.

    total  bytes that it will read and write, for `progress`
    Raises: StorageError, if the system allows no thread.
    """
    try:
        try:
            pump.start()
        except RuntimeError as error:
            raise StorageError(f"no thread can be started: {error}. Allow more (ulimit -u, -v)") from None
        while not pump.wait(_TICK_S):
            if progress:
                progress(pump.bytes_read + pump.bytes_written, total)
    finally:
        ended, late = False, None
        while not ended:
            try:
                pump.cancel()
                pump.join()
                ended = True
            except BaseException as error:
                late = error
        if late is not None:
            raise late
    if progress and pump.error() is None:
        progress(total, total)


def survey(
    sources: Sequence[SourceHandle],
    steps: Sequence[Step],
    options: PumpOptions,
    explained: Callable[[tuple[Any, ...]], Exception],
    total: int = 0,
    progress: Progress | None = None,
) -> list[Answer]:
    """The answers of steps that write nothing, in order.

    explained  translates the error tuple of the pump into the exception to raise
    total      bytes that are read, for `progress`
    """
    if not steps:
        return []
    pump = Pump(sources, [], steps, options)
    watch(pump, total, progress)
    error = pump.error()
    if error is not None:
        raise explained(error)
    return pump.answers()
