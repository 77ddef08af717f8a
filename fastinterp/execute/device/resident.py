"""Runs steps on tensors in the memory of one device: only its kernels read and write them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from msgspec.structs import replace

from fastinterp.backends.cpu import SinkHandle, SourceHandle, memory_address
from fastinterp.backends.device import Piece
from fastinterp.backends.waiting import wait
from fastinterp.errors import BackendError
from fastinterp.execute.jobs.job import Result
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Histogram, Step, SumStep, WritingStep

if TYPE_CHECKING:
    from fastinterp.backends.device import Device, Pending, Queue

# Elements that a histogram counts at a time: devices have bins of 32 bits. A multiple of STRIP.
MOST_COUNTED = 1 << 31
_UNBOUNDED = 1 << 62  # bytes of scratch: the memory of the models themselves is the limit


class ResidentExecutor:
    """An Executor for steps whose sources and sinks are ("device", address, bytes).

    Whole tensors are launched in one queue. Steps that write are not waited for, so that a run without requests returns
    at once; with `stats_every`, their statistics are waited for, too.

    sources, sinks   may be added to between runs
    capturing        the queue is captured into a CUDA graph, so that nothing can be waited for
    """

    round_bytes = 4 << 30  # a millisecond of work, in which the host prepares the next round
    held_bytes = 256 << 20

    def __init__(
        self,
        device: Device,
        queue: Queue,
        sources: Sequence[SourceHandle],
        sinks: Sequence[SinkHandle],
        *,
        stats_every: int = 0,
        capturing: bool = False,
    ):
        self.most = _UNBOUNDED
        self._device, self._queue = device, queue
        self._sources, self._sinks = sources, sinks
        self._stats_every, self._capturing = stats_every, capturing

    def run(self, steps: Sequence[TensorStep]) -> list[Result]:
        """Run steps. Raises: BackendError, if the device has no kernel for one, or if a capture would have to wait."""
        pieces = self.pieces(steps)
        waits = [self._waits(step) for step in steps]
        awaited = [k for k, wait in enumerate(waits) if wait]
        written = [k for k, wait in enumerate(waits) if not wait]
        results = [Result(None, [{} for _ in _sinks(step.native)]) for step in steps]
        pending: list[list[Pending]] = []
        event = None
        if awaited:
            cut = [_cut(pieces[k]) for k in awaited]
            every = iter(self._queue.run([piece for some in cut for piece in some]))
            pending = [list(islice(every, len(some))) for some in cut]
            event = self._queue.record()
        if written:  # these run while the answers are processed
            self._queue.run([pieces[k] for k in written])
        if event is not None:
            wait(event)
        for k, some in zip(awaited, pending, strict=True):
            answer = some[0].answer() if len(some) == 1 else steps[k].native.join([one.answer() for one in some])
            results[k] = Result(answer, some[0].stats())
        return results

    def pieces(self, steps: Sequence[TensorStep]) -> list[Piece]:
        """The steps as pieces: whole tensors, with addresses. Raises: as `run`."""
        for step in steps:
            self._check(step)
        return [self._piece(step.native) for step in steps]

    def _check(self, step: TensorStep) -> None:
        why = self._device.refuses(step.native)
        if why is not None:
            raise BackendError(
                f"{step.name} cannot be merged on {self._device.name}, whose backend is {self._device.backend}: {why}. "
                "Move the tensors to the CPU by .cpu()"
            )
        if self._capturing and self._waits(step):
            raise BackendError(
                f"{step.name} needs answers from {self._device.name} before it is merged, which a CUDA graph cannot "
                "wait for. Merge it before the capture, or by a plain weighted sum"
            )

    def _waits(self, step: TensorStep) -> bool:
        """Whether the host needs the answer or the statistics of the step."""
        return bool(self._stats_every) or not isinstance(step.native, WritingStep)

    def _piece(self, native: Step) -> Piece:
        stored = [operand for operand in native.inputs if isinstance(operand, Stored)]
        outputs: tuple[int, ...] = ()
        if isinstance(native, SumStep):
            locations = zip(native.sinks, native.offsets, strict=True)
            outputs = tuple(memory_address(self._sinks[sink]) + offset for sink, offset in locations)
        return Piece(
            step=native,
            inputs=tuple(memory_address(self._sources[operand.source]) + operand.offset for operand in stored),
            outputs=outputs,
            numel=native.numel,
            stats_every=self._stats_every,
        )


def _cut(piece: Piece) -> list[Piece]:
    """A piece, or the parts of one of a histogram that has more elements than are counted at a time."""
    if not isinstance(piece.step, Histogram) or piece.numel <= MOST_COUNTED:
        return [piece]
    widths = [CODE_BYTES[code] for code in piece.codes]
    return [
        replace(
            piece,
            inputs=tuple(at + first * width for at, width in zip(piece.inputs, widths, strict=True)),
            first=first,
            numel=min(MOST_COUNTED, piece.numel - first),
        )
        for first in range(0, piece.numel, MOST_COUNTED)
    ]


def _sinks(step: Step) -> tuple[int, ...]:
    return step.sinks if isinstance(step, WritingStep) else ()
