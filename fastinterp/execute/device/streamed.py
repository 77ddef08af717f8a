"""Runs weighted sums on a device with sources that are partly on the host: files, or memory that it cannot access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from fastinterp.backends.cpu import Handle, SinkHandle, SourceHandle, memory_address
from fastinterp.backends.device import Piece
from fastinterp.backends.torch_device import pinned
from fastinterp.backends.waiting import wait
from fastinterp.errors import BackendError
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.execute.rounds import PumpExecutor
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Combine, CopyEqual

if TYPE_CHECKING:
    from fastinterp.backends.device import Event, Queue

_SLOT_BYTES = 64 << 20  # of pinned memory; there are two: one is filled while the device reads the other
_ALIGN = 256  # bytes


class _Slot:
    """Pinned memory, allocated on first use. read: the event after which it may be written again."""

    def __init__(self) -> None:
        self._memory: Any = None
        self.read: Event | None = None

    @property
    def address(self) -> int:
        if self._memory is None:
            self._memory = pinned(_SLOT_BYTES)
        if self._memory is None:
            raise BackendError(f"{_SLOT_BYTES} bytes of pinned memory cannot be allocated: raise `ulimit -l`")
        return int(self._memory.data_ptr())


class StreamedExecutor:
    """Runs plain weighted sums: the pump fills pinned memory, from which kernels read.

    sources  ("device", address, bytes) is memory of the device; the others are on the host, as the pump takes them
    filler   makes the PumpExecutor that reads sources of the host into these sinks

    Waits only for kernels that read from the slot that is filled next, and at the end for all.
    """

    def __init__(
        self,
        queue: Queue,
        sources: Sequence[SourceHandle],
        sinks: Sequence[SinkHandle],
        filler: Callable[[list[Handle]], PumpExecutor],
    ):
        self._queue, self._sources, self._sinks, self._filler = queue, sources, sinks, filler
        self._slots = [_Slot(), _Slot()]
        self._reads: list[TensorStep] = []
        self._pieces: list[Piece] = []
        self._used = 0

    def run(self, steps: Sequence[TensorStep]) -> None:
        """Run Combine steps of stored operands. Raises: TypeError for other steps; the errors of the pump."""
        try:
            self._run(steps)
        except BaseException:
            with suppress(BackendError):
                wait(self._queue.record())  # kernels read from slots, which are let go next
            raise

    def _run(self, steps: Sequence[TensorStep]) -> None:
        for step in steps:
            native = step.native
            if not isinstance(native, Combine):
                raise TypeError(f"steps of kind {native.kind} are not streamed")
            stored = [operand for operand in native.inputs if isinstance(operand, Stored)]
            width = sum(CODE_BYTES[operand.dtype] for operand in stored if self._address(operand.source) is None)
            most = (_SLOT_BYTES - _ALIGN * len(stored)) // max(1, width) // CHUNK * CHUNK
            for first in range(0, native.numel, most):
                self._add(native, stored, first, min(most, native.numel - first))
        self._flush()
        for slot in self._slots:
            if slot.read is not None:
                wait(slot.read)

    def _address(self, source: int) -> int | None:
        """The address of a source in device memory; None for a source on the host."""
        handle = self._sources[source]
        return handle[1] if isinstance(handle, tuple) and handle[0] == "device" else None

    def _add(self, native: Combine, stored: Sequence[Stored], first: int, count: int) -> None:
        """Add elements [first, first + count) of a step to the current slot."""
        sizes = [count * CODE_BYTES[operand.dtype] for operand in stored if self._address(operand.source) is None]
        if self._used + sum(sizes) + _ALIGN * len(sizes) > _SLOT_BYTES:
            self._flush()
        inputs = []
        for operand in stored:
            start = operand.offset + first * CODE_BYTES[operand.dtype]
            address = self._address(operand.source)
            if address is not None:
                inputs.append(address + start)
                continue
            inputs.append(self._slots[0].address + self._used)
            self._read(replace(operand, offset=start), count * CODE_BYTES[operand.dtype])
        locations = zip(native.sinks, native.offsets, strict=True)
        at = first * CODE_BYTES[native.out_dtype]
        outputs = tuple(memory_address(self._sinks[sink]) + offset + at for sink, offset in locations)
        self._pieces.append(Piece(step=native, inputs=tuple(inputs), outputs=outputs, first=first, numel=count))

    def _read(self, operand: Stored, nbytes: int) -> None:
        native = CopyEqual(inputs=(operand,), numel=nbytes, sinks=(0,), offsets=(self._used,))
        self._reads.append(TensorStep("", native, 2 * nbytes))
        self._used += -(-nbytes // _ALIGN) * _ALIGN

    def _flush(self) -> None:
        """Fill the slot, launch the kernels that read it, and switch to the other slot."""
        slot = self._slots[0]
        if self._reads:
            if slot.read is not None:
                wait(slot.read)
            self._filler([("memory", slot.address, _SLOT_BYTES)]).run(self._reads)
        if self._pieces:
            self._queue.run(self._pieces)
            slot.read = self._queue.record()
        self._slots.reverse()
        self._reads, self._pieces, self._used = [], [], 0
