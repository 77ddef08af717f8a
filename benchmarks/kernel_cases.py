"""The kernel cases: dtype x N x K x size. Everything about a case follows from its fields, its bytes too."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fastinterp.bench.check import allowed_error
from fastinterp.ops.combine import Combine, Row
from fastinterp.ops.dtypes import BF16, F8_E4M3, F16, F32, DType
from fastinterp.reference import combine as reference
from tests.support.cases import Guarded, fill

DTYPES = (BF16, F16, F32, F8_E4M3)
PERIOD = 65536  # elements; larger arrays repeat them, so that the slow reference need compute no more
IN_CACHE = PERIOD  # elements of each array
_LAST_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")  # in KiB: "32768K"
# Bytes of all arrays together: four times the last-level cache, which virtual machines may see whole though they share
# it.
IN_MEMORY = max(1 << 27, 4096 * int(_LAST_CACHE.read_text().strip().rstrip("K")) if _LAST_CACHE.exists() else 0)


@dataclass(frozen=True)
class KernelCase:
    """n inputs, k outputs, all of one dtype; numel elements each, a multiple of PERIOD."""

    dtype: DType
    n: int
    k: int
    place: str  # where the arrays fit: "cache" or "memory"
    numel: int

    def __str__(self) -> str:
        return f"{self.dtype.name.lower()}-n{self.n}-k{self.k}-{self.place}"

    @property
    def bytes(self) -> int:
        """Read and written: each input once, each output once."""
        return (self.n + self.k) * self.numel * self.dtype.bits // 8

    @property
    def reads(self) -> int:
        """Bytes read."""
        return self.n * self.numel * self.dtype.bits // 8

    @property
    def weights(self) -> list[list[float]]:
        """One list per output, each of sum 1: the mean, then more and more of the later inputs."""
        raw = [[1 + i * j / 8 for i in range(self.n)] for j in range(self.k)]
        return [[w / sum(row) for w in row] for row in raw]

    @property
    def rows(self) -> list[Row]:
        return [Combine(tuple(w), sums_to_one=True).row() for w in self.weights]

    @cached_property
    def period(self) -> list[NDArray[np.uint8]]:
        """The first PERIOD elements of each input: weights, and fine-tunes that are at most one code away from them."""
        rng = np.random.default_rng(zlib.crc32(str(self).encode()))
        return [fill("close", self.dtype, PERIOD, i, rng).view(np.uint8) for i in range(self.n)]

    @cached_property
    def inputs(self) -> list[Guarded]:
        found = [self._empty() for _ in range(self.n)]
        for buffer, period in zip(found, self.period, strict=True):
            buffer.view.reshape(-1, period.size)[:] = period
        return found

    @cached_property
    def outputs(self) -> list[Guarded]:
        return [self._empty() for _ in range(self.k)]

    def arrays(self, buffers: list[Guarded]) -> list[NDArray[Any]]:
        """The same memory as arrays of the case's dtype."""
        kinds = {BF16: ml_dtypes.bfloat16, F16: np.float16, F32: np.float32, F8_E4M3: ml_dtypes.float8_e4m3fn}
        return [b.view.view(kinds[self.dtype]) for b in buffers]

    def _empty(self) -> Guarded:
        return Guarded(self.numel * self.dtype.bits // 8, 0)

    @cached_property
    def expected(self) -> list[NDArray[Any]]:
        """What the numeric contract says of the first PERIOD elements of each output."""
        return reference.combine(self.period, [self.dtype] * self.n, self.rows, self.dtype, stats_every=0)[0]

    def clear(self) -> None:
        """So that a rival that writes nothing does not find the answer of the one before it."""
        for out in self.outputs:
            out.view[:] = 0x5B

    def check(self, *, exact: bool, coarse: bool = False) -> None:
        """Every element of every output, and that nothing was written beside them.

        exact: the reference's bytes. Else within the bound that fastinterp.bench.check derives.
        Raises: AssertionError.
        """
        for j, out in enumerate(self.outputs):
            assert out.intact(), f"output {j}: bytes beside it were written"
            periods = out.view.reshape(-1, self.expected[j].size)
            for period in (periods[0], *periods[(periods != periods[0]).any(axis=1)]):
                if exact:
                    wrong = np.flatnonzero(period != self.expected[j])
                else:
                    wrong = self._off(period, j, coarse)
                assert not wrong.size, f"output {j}: {wrong.size} of {PERIOD} are wrong, first {wrong[0]}"

    def _off(self, period: NDArray[np.uint8], j: int, coarse: bool) -> NDArray[Any]:
        """The elements of output j that are too far from the sum in float64."""
        x = [reference.widen(v, self.dtype).astype(np.float64) for v in self.period]
        truth = np.sum([w * v for w, v in zip(self.weights[j], x, strict=True)], axis=0)
        allowed = allowed_error(truth, np.max(np.abs(x), axis=0), self.weights[j], self.dtype.name, coarse)
        return np.flatnonzero(~(np.abs(reference.widen(period, self.dtype) - truth) <= allowed))


def make_cases(total: int) -> list[KernelCase]:
    """All cases; those in memory have `total` bytes in all arrays together, or a little less."""
    found = []
    for dtype in DTYPES:
        for k in (1, 8):
            for n in (2, 3, 4, 8):
                each = max(1, total * 8 // dtype.bits // (n + k) // PERIOD) * PERIOD
                found += [KernelCase(dtype, n, k, "cache", IN_CACHE), KernelCase(dtype, n, k, "memory", each)]
    return found
