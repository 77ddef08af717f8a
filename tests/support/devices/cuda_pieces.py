"""Steps of the pump in pieces, for tests of CUDA's kernels: on a GPU if there is one, else on the host's emulation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from fastinterp.backends.device import Piece
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Step, SumStep, join_stats
from tests.support import backends
from tests.support.cases import Guarded
from tests.support.devices import cuda_host
from tests.support.pumps import Raw, guarded, memory, run


class Rig:
    """A device with one queue."""

    def __init__(self) -> None:
        self._name = next(name for name in ("cuda", backends.EMULATED) if name not in backends.skipped())
        self.device = backends.cuda_module(self._name).Device(0)
        self.queue = self.device.queue()
        self.buffers: list[Any] = []

    def put(self, raw: Raw, offset: int) -> int:
        """The address of a copy in the device's memory, `offset` bytes off a boundary."""
        buffer = self.device.memory(raw.size + offset)
        self.buffers.append(buffer)
        held = np.ascontiguousarray(raw)
        self.queue.upload(buffer.address + offset, held.ctypes.data, held.size)
        self.queue.record().wait()
        return int(buffer.address) + offset

    def get(self, address: int, nbytes: int) -> Raw:
        held = np.zeros(nbytes, np.uint8)
        self.queue.download(held.ctypes.data, address, nbytes)
        self.queue.record().wait()
        return held

    def run(self, some: Sequence[Piece]) -> list[Any]:
        pending = self.queue.run(some)
        self.queue.record().wait()
        assert self._name == "cuda" or cuda_host.fake().wrong() == ""
        return list(pending)


def addressed(rig: Rig, step: Step, data: Sequence[Raw], first: int, count: int, offset: int, **more: Any) -> Piece:
    """The piece of elements [first, first + count); its inputs lie `offset` times odd numbers off a boundary."""
    inputs = []
    for i, operand in enumerate(step.inputs):
        assert isinstance(operand, Stored)
        size = CODE_BYTES[operand.dtype]
        part = data[operand.source][first * size : (first + count) * size]
        inputs.append(rig.put(part, offset * (2 * i + 1) % 64))
    return Piece(step=step, inputs=tuple(inputs), numel=count, first=first, **more)


def answers(step: Step, data: Sequence[Raw], offset: int = 0, most: int = 1 << 30) -> Any:
    """What the pieces of at most so many bytes answer together."""
    rig = Rig()
    some = [addressed(rig, step, data, first, count, offset) for first, count in step.cut(most)]
    return step.join([pending.answer() for pending in rig.run(some)])


def pump_answers(step: Step, data: Sequence[Raw]) -> Any:
    sources = guarded(data)
    return run("", [step], memory(sources), []).answers()[0]


def same(a: Any, b: Any) -> bool:
    """Whether two answers hold the same bytes, every NaN being one."""
    if isinstance(a, list):
        return [_counts(c) for c in a] == [_counts(c) for c in b]
    reals = [np.array(x[0], np.float64) for x in (a, b)]
    for x in reals:
        x[np.isnan(x)] = np.nan
    return reals[0].tobytes() == reals[1].tobytes() and a[1].tobytes() == b[1].tobytes()


def _counts(c: Any) -> tuple[Any, ...]:
    return c.elements, c.above, c.zero, c.bins.tobytes()


def written(
    step: SumStep, data: Sequence[Raw], offset: int = 0, most: int = 1 << 30, **options: Any
) -> tuple[list[Raw], list[dict[str, float]]]:
    """The outputs that pieces of at most so many bytes write, and their statistics together.

    options  fp8_saturate and stats_every of the pieces, and stochastic
    """
    rig, size = Rig(), CODE_BYTES[step.out_dtype]
    if not options.pop("stochastic", False):
        step = replace(step, keys=())
    some = []
    for first, count in step.cut(most):
        outputs = [rig.put(np.full(count * size, 0x5A, np.uint8), offset * (2 * k + 5) % 64) for k in step.sinks]
        some.append(addressed(rig, step, data, first, count, offset, outputs=tuple(outputs), **options))
    pending = rig.run(some)
    parts = [[rig.get(o, piece.numel * size) for o in piece.outputs] for piece in some]
    stats = join_stats([p.stats() for p in pending])
    return [np.concatenate(own) for own in zip(*parts, strict=True)], stats


def pump_written(step: SumStep, data: Sequence[Raw], **options: Any) -> tuple[list[Raw], list[dict[str, float]]]:
    sources = guarded(data)
    sinks = [Guarded(step.numel * CODE_BYTES[step.out_dtype], 5) for _ in step.sinks]
    pump = run("", [step], memory(sources), memory(sinks), **options)
    return [s.view.copy() for s in sinks], pump.stats()[0]
