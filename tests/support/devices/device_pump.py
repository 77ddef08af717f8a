"""A pump whose steps are done by a device's kernels, so that what tests of the native one check is checked of those."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec.structs import replace

from fastinterp.backends.cpu import PumpOptions
from fastinterp.backends.device import Piece
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Step, SumStep, join_stats
from tests.support.cases import GUARD, Guarded


class Loan:
    """Bytes of the host in a device's memory: as far from a boundary of 64 bytes as they are here, between guards."""

    def __init__(self, device: Any, queue: Any, address: int, nbytes: int):
        self._host, self._nbytes, self._queue = address, nbytes, queue
        self._image = np.full(nbytes + 2 * GUARD, 0xA5, np.uint8)
        ctypes.memmove(self._image.ctypes.data + GUARD, address, nbytes)
        self._memory = device.memory(self._image.size + 128)
        self._start = -(-self._memory.address // 64) * 64 + address % 64
        queue.upload(self._start, self._image.ctypes.data, self._image.size)

    @staticmethod
    def of(device: Any, queue: Any, buffer: Guarded) -> Loan:
        return Loan(device, queue, buffer.address, buffer.view.size)

    @property
    def address(self) -> int:
        return self._start + GUARD

    def back(self, written: bool) -> None:
        """Free the memory. What was written goes back to the host; an input must be as it was, and all guards."""
        found = np.empty_like(self._image)
        self._queue.download(found.ctypes.data, self._start, found.size)
        self._queue.record().wait()
        own = slice(GUARD, GUARD + self._nbytes)
        assert written or np.array_equal(found[own], self._image[own]), "an input was written"
        assert (found[:GUARD] == 0xA5).all() and (found[own.stop :] == 0xA5).all(), "bytes beside memory were written"
        ctypes.memmove(self._host, found.ctypes.data + GUARD, self._nbytes)
        self._memory.free()


class DevicePump:
    """Made and used as `_C.Pump`, of sources and sinks in the host's memory.

    device  whose kernels work
    most    bytes of a piece. Both are attributes of the class, because no pump has such arguments
    """

    device: Any = None
    most = 1 << 40

    def __init__(self, sources: Sequence[Any], sinks: Sequence[Any], steps: Sequence[Step], options: PumpOptions):
        queue = self.device.queue()
        given, made = ([Loan(self.device, queue, at, size) for _, at, size in some] for some in (sources, sinks))
        cuts = [step.cut(self.most) for step in steps]
        pieces = []
        for step, places in zip(steps, cuts, strict=True):
            assert self.device.refuses(step) is None, self.device.refuses(step)
            if isinstance(step, SumStep) and not options.stochastic:
                step = replace(step, keys=())
            pieces += [_piece(step, given, made, first, count, options) for first, count in places]
        pending = queue.run(pieces)
        event = queue.record()
        event.wait()
        assert event.done()
        for loan in given:
            loan.back(written=False)
        for loan in made:
            loan.back(written=True)
        self._answers, self._stats = [], []
        for step, places in zip(steps, cuts, strict=True):
            own, pending = pending[: len(places)], pending[len(places) :]
            self._answers.append(step.join([p.answer() for p in own]))
            self._stats.append(join_stats([p.stats() for p in own]))
        read = [sum(CODE_BYTES[operand.dtype] for operand in step.inputs) * step.numel for step in steps]
        self.bytes_read = sum(read)

    def start(self) -> None:
        pass

    def wait(self, seconds: float) -> bool:
        return True

    def join(self) -> None:
        pass

    def error(self) -> None:
        pass

    def answers(self) -> list[Any]:
        return self._answers

    def stats(self) -> list[list[dict[str, float]]]:
        return self._stats


def _piece(
    step: Step, given: Sequence[Loan], made: Sequence[Loan], first: int, count: int, options: PumpOptions
) -> Piece:
    inputs: list[int] = []
    for operand in step.inputs:
        assert isinstance(operand, Stored)
        inputs.append(given[operand.source].address + operand.offset + first * CODE_BYTES[operand.dtype])
    outputs: list[int] = []
    if isinstance(step, SumStep):
        size = CODE_BYTES[step.out_dtype]
        places = zip(step.sinks, step.offsets, strict=True)
        outputs = [made[sink].address + offset + first * size for sink, offset in places]
    return Piece(
        step=step, inputs=tuple(inputs), outputs=tuple(outputs), numel=count, first=first,
        stats_every=options.stats_every, fp8_saturate=options.fp8_saturate,
    )  # fmt: skip
