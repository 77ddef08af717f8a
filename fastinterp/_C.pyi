"""The native extension: kernels and the pump that feeds them. Private; arguments are checked, addresses are trusted."""

from collections.abc import Sequence
from typing import Any

from fastinterp.backends.cpu import PumpOptions
from fastinterp.ops.combine import Row
from fastinterp.ops.steps import Answer, Step

MAX_INPUTS: int
MAX_OUTPUTS: int
CHUNK: int
LANES: int
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

# A file descriptor, ("memory", address, bytes), or of sources a RemoteSource: the caller keeps it alive and lets nobody
# write to it.
_Handle = int | tuple[str, int, int] | RemoteSource

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
def reserve(fd: int, size: int) -> None: ...
def cached_fraction(fd: int, size: int) -> float: ...

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
        self, sources: Sequence[_Handle], sinks: Sequence[_Handle], steps: Sequence[Step], options: PumpOptions
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
