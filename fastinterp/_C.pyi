"""The native extension: kernels and the pump that feeds them. Private; arguments are checked, addresses are trusted."""

from typing import Any

MAX_INPUTS: int
MAX_OUTPUTS: int
CHUNK: int

# pivot, total, [(input, weight)]
_Row = tuple[int, float, list[tuple[int, float]]]
# kind ("combine", "same", "measure", "measure_deltas"), [(source, offset, dtype code)], rows, sinks, offsets, out dtype
# code, numel (bytes for "same"), keys
_Step = tuple[str, list[tuple[int, int, int]], list[_Row], list[int], list[int], int, int, list[int]]

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
) -> list[dict[str, float]]: ...
def reserve(fd: int, size: int) -> None: ...
def cached_fraction(fd: int, size: int) -> float: ...

class Pump:
    def __init__(
        self,
        isa: str,
        sources: list[int],
        sinks: list[int],
        steps: list[_Step],
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
    def measured(self) -> list[tuple[list[float], list[int]]]: ...
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...
