"""The native extension: kernels and the pump that feeds them. Private; arguments are checked, addresses are trusted."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastinterp.backends.cpu import PumpOptions
from fastinterp.ops.combine import Row
from fastinterp.ops.steps import Answer, Step

MAX_INPUTS: int
MAX_OUTPUTS: int
CHUNK: int
LANES: int
CELL_BYTES: int
REGION_BYTES: int
STRIP: int
BLOCK_ROWS: int
DTYPE_BYTES: tuple[int, ...]  # of an element, by code

class RangeCache:
    """Files that are elsewhere, as far as they are in memory: cells that the caller's threads fetch when a pump asks
    for them, and that make room for others when they have been read.

    sizes       bytes of each file
    cell_bytes  of a cell, which is fetched at once
    most        bytes of all cells together; 8 cells are held at least
    """

    def __init__(self, sizes: Sequence[int], cell_bytes: int, most: int) -> None: ...
    def take(self, seconds: float) -> tuple[int, int, memoryview] | None:
        """(file, offset, memory to fill) of a cell that is wanted; None, if there is none in this time."""

    def filled(self, file: int, offset: int) -> None: ...
    def fail(self, file: int) -> None:
        """Nothing of the file can be had any more: what reads it stops."""

    def stop(self) -> None: ...
    @property
    def stopped(self) -> bool: ...
    @property
    def fetched(self) -> int:
        """Bytes that were fetched, those that were fetched again included."""

class RemoteSource:
    """A file of a RangeCache, as a source of a Pump."""

    def __init__(self, cache: RangeCache, file: int) -> None: ...

class MappedFile:
    """A whole file as a source of a Pump, whose kernels read it where the page cache has it.

    fd  open for reading; its owner keeps it open
    Raises: OSError, if it cannot be mapped.
    """

    def __init__(self, fd: int) -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def failed(self) -> bool: ...  # whether a page could not be read

# A file descriptor, ("memory", address, bytes), a file elsewhere, or one that is mapped: the caller keeps it alive and
# lets nobody write to it.
_Source = int | tuple[str, int, int] | RemoteSource | MappedFile

def isas() -> list[str]: ...
def built_isas() -> list[str]: ...
def combine(
    inputs: list[int],
    in_dtypes: list[int],
    rows: Sequence[Row],
    outputs: list[int],
    out_dtype: int,
    numel: int,
    *,
    first: int = 0,
    stochastic: bool = False,
    keys: list[int] = ...,
    fp8_saturate: bool = True,
    stats_every: int = 32,
    threads: int = 1,
    isa: str = "",
    streamed: bool | None = None,
) -> list[dict[str, float]]: ...

class SumRow:
    """A row of a sum of so many inputs, as kernels take it."""

    def __init__(self, row: Row, inputs: int) -> None: ...

class PreparedSums:
    """Sums in memory: ((address, dtype code) of each input, that of the output, number of elements) of each."""

    def __init__(self, sums: Sequence[tuple[list[tuple[int, int]], tuple[int, int], int]], isa: str = "") -> None: ...
    def run(self, row: SumRow, threads: int) -> None:
        """Compute all of them, with this row."""

class PlainSums:
    """Weighted sums of arrays of these types, exactly, on the CPU. codes: dtype -> code. tensors: they are torch's."""

    def __init__(self, types: tuple[type, ...], codes: Mapping[Any, int | None], tensors: bool) -> None: ...
    def sum(
        self, arrays: Sequence[Any], row: SumRow, out: Any, threads: int | Callable[[], int], followed: bool
    ) -> bool:
        """False, with nothing written, if anything about the arguments is to be looked at first."""

def reserve(fd: int, size: int) -> None:
    """Reserve the bytes of an output file, which does not grow. Raises: OSError, if the disk is full."""

def start_writeback(fd: int) -> None: ...
def cached_fraction(fd: int, size: int) -> float: ...
def xxh3(bytes: bytes, seed: int = 0) -> int: ...

class Xxh3:
    """XXH3-64 of bytes that come one after the other, with seed 0."""

    def __init__(self) -> None: ...
    def add(self, bytes: bytes) -> None: ...
    def end(self) -> int:
        """The hash of all that was added so far."""

def checksum(fd: int, begin: int, end: int, threads: int = 1, isa: str = "") -> list[int]:
    """The checksums of the regions of a file's section [begin, end), from that of `begin` on.

    A part of a section that begins and ends at multiples of REGION_BYTES, or where the section does, has the same
    checksums for its regions: long sections are read a few regions at a time, between which Ctrl-C is noticed.
    Raises: OSError, if it cannot be read; ValueError, if the file is shorter.
    """

class FileChecksum:
    """The checksum of the section [begin, end) of a file, of what is written to it: a sink of the pump.

    fd  open for reading and writing; its owner keeps it open
    """

    def __init__(self, fd: int, begin: int, end: int, isa: str = "") -> None: ...
    @property
    def fd(self) -> int: ...
    @property
    def first_region(self) -> int: ...
    @property
    def region_count(self) -> int: ...
    def add(self, offset: int, bytes: Any) -> None:
        """Hash bytes (any buffer) that are written at `offset` of the file, before or after they are. Thread-safe."""

    def regions(self, threads: int = 1) -> list[int]:
        """The checksum of every region, from `first_region` on. Reads from the file what has not been hashed, so that
        all must be written. Raises: what `checksum` does.
        """

    def progress(self, region: int) -> tuple[int, bytes]:
        """What was hashed of a region, while nothing is written: the sum, and a bit per cell, the lowest first."""

    def restore(self, region: int, sum: int, hashed: bytes) -> None:
        """Take over the progress of an earlier process, before anything is written."""

    def matches(self, region: int) -> bool:
        """Whether the file still has the cells that were hashed. Reads them. Raises: what `checksum` does."""

class Counts:
    elements: int  # that were looked at
    above: int  # the last bin
    zero: int  # magnitudes that are 0, in a bin or not

    def __init__(self, elements: int, above: int, zero: int, bins: Any) -> None:
        """bins: a buffer of u32. Raises: ValueError, if it is none."""

    @property
    def bins(self) -> memoryview: ...
    def add(self, other: Counts) -> None: ...
    def rank(self, k: int) -> tuple[int, int]: ...
    def at_least(self, first: int) -> int: ...

class Masks:
    """The elements of `count` deltas that pass their masks: filled by a MaskedStats step, used by a MaskedSum."""

    def __init__(self, count: int, numel: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def filled(self) -> bool: ...  # whether a pump fills or has filled them

def fold(pieces: Sequence[tuple[Any, Any]]) -> tuple[memoryview, memoryview]:
    """The answer to a Measure or MaskedStats, as `Pump.answers` has it, from those of its parts, in order.

    Raises: ValueError, if there are none, or if they differ in length.
    """

def register_decoder(name: str, decode: int, block_elements: int, block_bytes: int) -> None:
    """Add a decoder for encoded operands, or replace one that was added.

    decode                       address of a function as csrc/decoder.h has it
    block_elements, block_bytes  so many neighbouring elements are stored in so many bytes

    Raises: ValueError, if the name is empty, or the pump does not read such blocks.
    """

class Pump:
    """Carries out steps, each with its own kernels, on threads of its own. `answers` has an entry per step."""

    def __init__(
        self,
        sources: Sequence[_Source],
        sinks: Sequence[_Source | FileChecksum],
        steps: Sequence[Step],
        options: PumpOptions,
    ) -> None: ...
    def start(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def cancel(self) -> None: ...
    def join(self) -> None: ...
    def error(self) -> tuple[Any, ...] | None: ...
    def stats(self) -> list[list[dict[str, float]]]: ...
    def answers(self) -> list[Answer]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
