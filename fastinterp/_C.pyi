"""The native extension: kernels and the pump that feeds them. Private; arguments are checked, addresses are trusted."""

from collections.abc import Mapping, Sequence
from typing import Any

MAX_INPUTS: int
MAX_OUTPUTS: int
CHUNK: int
STRIP: int

# pivot, total, [(input, weight)]
_Row = tuple[int, float, list[tuple[int, float]]]
# A file descriptor, or ("memory", address, bytes): the caller keeps it alive and lets nobody write to it.
_Handle = int | tuple[str, int, int]

def isas() -> list[str]: ...
def built_isas() -> list[str]: ...
def combine(
    inputs: list[int],
    in_dtypes: list[int],
    rows: list[_Row],
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
    """Which elements of `count` deltas are kept: filled by a step of kind "kept", used by one of kind "masked"."""

    def __init__(self, count: int, numel: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def filled(self) -> bool: ...  # a pump has been given them to fill

def fold(pieces: Sequence[tuple[Any, Any]]) -> tuple[memoryview, memoryview]:
    """The answer to a measure or a survey of keeps, as `Pump.answers` has it, from those of its pieces, in order.

    Raises: ValueError, if there are none, or if they differ in length.
    """

class Pump:
    """Steps are dicts:

    kind       "combine", "masked", "same" (bytes that must agree), "kept", "measure", "measure_deltas", "divergence" or
               "histogram"
    inputs     [(source, byte offset, dtype code)]; or with rows gathered from parts that count as lying one behind the
               other, -1 for a row of zeros: ([(source, byte offset, rows of the part)], dtype code, i64[rows])
    numel      elements; bytes of "same"
    columns    elements (bytes) of a row: needed by whatever looks at rows or columns, and by gathered inputs
    sinks, offsets, out_dtype, keys
               of the kinds that write, one per output but for the dtype; Philox keys for stochastic rounding only
    per        of "combine" and the measures: "tensor" (as if nothing was said), "row" or "column"
    rows       of "combine", one per output: [(pivot, total, [(input, weight)])]; by groups
               [(pivot, f64[groups], [input], f64[groups * inputs])], all weights of a group together
    masked     of "masked": one dict per output, as ops/masked.py makes them
    keeps, score, l1, squares
               of "kept", made there, too; the score also of "histogram", where it is ranked instead of deltas
    masks      of "kept", may be left out: (Masks to be filled, which of them for each input, -1 for none)
    ranked     of "histogram": [(input, low, high, shift)], magnitudes low..high are counted in bin
               (magnitude - low) >> shift
    every      of "histogram": strip s of the tensor, STRIP elements, is looked at iff s % every == 0

    i64 and f64 are contiguous buffers: array, memoryview, numpy, bytes.

    `answers` has an entry per step: None if it writes, else (f64[...], i64[...]) as memoryviews. Of the measures: the
    upper triangle of the Gram matrix row by row, then the L1 norms; and the counts of elements that are not 0; of one
    group after the other. Of the divergence: one number per row, and nothing. Of "kept": the L1 norm of each delta, 0
    for input 0, then of what is kept of it, then the sum of squares of that; and how many elements are kept, then how
    many of them another delta keeps, too. Of "histogram": a list of Counts, one for each entry of `ranked`.
    """

    def __init__(
        self,
        isa: str,
        sources: Sequence[_Handle],
        sinks: Sequence[_Handle],
        steps: Sequence[Mapping[str, Any]],
        *,
        threads: int,
        write_bytes: int,
        read_bytes: int,
        stochastic: bool,
        fp8_saturate: bool,
        prefetch: bool,
        stats_every: int,
    ) -> None: ...
    def start(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def cancel(self) -> None: ...
    def join(self) -> None: ...
    def error(self) -> tuple[Any, ...] | None: ...
    def stats(self) -> list[list[dict[str, float]]]: ...
    def answers(self) -> list[Any]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
