"""Runs of the native pump over arrays in memory, for tests of its kinds of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.ops.dtypes import DType
from fastinterp.ops.masked import Precomputed, mask_tests, masked_output, measured_inputs, read_inputs, score_of
from fastinterp.ops.operands import Stored
from fastinterp.ops.requests import MaskedCombine, MeasureMasked
from fastinterp.ops.steps import MaskedStats, MaskedSum, Step
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


def stored(dtypes: Sequence[DType], offsets: Sequence[int] | None = None) -> tuple[Stored, ...]:
    """Operands that are sources 0, 1, 2 and so on."""
    places = offsets or [0] * len(dtypes)
    return tuple(Stored(i, at, code(dtype)) for i, (dtype, at) in enumerate(zip(dtypes, places, strict=True)))


def run(isa: str, steps: Sequence[Step], sources: list[Any], sinks: list[Any], **options: Any) -> Pump:
    settings: dict[str, Any] = {"threads": 2, "write_bytes": 4096, "read_bytes": 4096, "stats_every": 2}
    pump = Pump(sources, sinks, steps, PumpOptions(isa=isa, **(settings | options)))
    pump.start()
    assert pump.wait(60)
    pump.join()
    assert pump.error() is None
    return pump


def memory(buffers: Sequence[Guarded]) -> list[tuple[str, int, int]]:
    return [("memory", b.address, b.view.size) for b in buffers]


def stats_step(
    ask: MeasureMasked, dtypes: Sequence[DType], shape: Sequence[int], *, name: str, seed: int
) -> MaskedStats:
    """The step that answers `ask`; the inputs that it reads are sources of their own numbers."""
    return MaskedStats(
        inputs=tuple(Stored(i, 0, code(dtypes[i])) for i in measured_inputs(ask)), numel=math.prod(shape),
        columns=columns_of(shape), tests=mask_tests(ask, name=name, seed=seed), score=score_of(ask.score), l1=ask.l1,
        squares=ask.squares,
    )  # fmt: skip


def masked_step(
    asks: Sequence[MaskedCombine], dtypes: Sequence[DType], out_dtype: DType, shape: Sequence[int],
    *, name: str, seed: int, keys: Sequence[int] = (), precomputed: Precomputed | None = None,
) -> MaskedSum:  # fmt: skip
    """The step that writes `asks` into sinks 0, 1 and so on. Inputs that they read are sources of their own numbers."""
    used = sorted(set().union(*(read_inputs(ask) for ask in asks)))
    return MaskedSum(
        inputs=tuple(Stored(i, 0, code(dtypes[i])) for i in used), numel=math.prod(shape), columns=columns_of(shape),
        sinks=tuple(range(len(asks))), offsets=(0,) * len(asks), out_dtype=code(out_dtype), keys=tuple(keys),
        outputs=tuple(
            masked_output(ask, name=name, seed=seed, inputs=used, precomputed=precomputed) for ask in asks
        ),
    )  # fmt: skip


def columns_of(shape: Sequence[int]) -> int:
    """Length of a row: of a tensor of one dimension, all of it. 1 at least."""
    return max(1, shape[-1] if len(shape) > 1 else math.prod(shape))
