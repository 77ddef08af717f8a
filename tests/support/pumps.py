"""Runs of the native pump over arrays in memory, for tests of its kinds of steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp._C import Pump
from fastinterp.ops.dtypes import DType
from tests.support.cases import Guarded, fill

Raw = NDArray[np.uint8]


def code(dtype: DType) -> int:
    assert dtype.code is not None
    return dtype.code


def raws(kind: str, dtypes: Sequence[DType], numel: int) -> list[Raw]:
    return [raw.copy() for raw in _raws(kind, tuple(dtypes), numel)]


@lru_cache(maxsize=4)  # tests on every instruction set follow each other
def _raws(kind: str, dtypes: tuple[DType, ...], numel: int) -> list[Raw]:
    return [fill(kind, d, numel, i, np.random.default_rng([numel, i])).view(np.uint8) for i, d in enumerate(dtypes)]


def guarded(data: Sequence[Raw]) -> list[Guarded]:
    """Copies, each off a boundary by another odd number of bytes."""
    copies = [Guarded(raw.size, (7 * i + 3) % 64) for i, raw in enumerate(data)]
    for copy, raw in zip(copies, data, strict=True):
        copy.view[:] = raw
    return copies


def run(isa: str, steps: list[dict[str, Any]], sources: list[Any], sinks: list[Any], **options: Any) -> Pump:
    settings: dict[str, Any] = {
        "threads": 2, "write_bytes": 4096, "read_bytes": 4096, "stochastic": False, "fp8_saturate": True,
        "prefetch": False, "stats_every": 2,
    }  # fmt: skip
    pump = Pump(isa, sources, sinks, steps, **(settings | options))
    pump.start()
    assert pump.wait(60)
    pump.join()
    assert pump.error() is None
    return pump


def memory(buffers: Sequence[Guarded]) -> list[tuple[str, int, int]]:
    return [("memory", b.address, b.view.size) for b in buffers]
