"""The interface of an accelerator: memory, queues, and kernels for pieces of steps.

Two backends implement it, CUDA (`cuda.py`) and Triton (`triton/device.py`). Both work on memory by address, and know
nothing of files, recipes or methods. The module of a backend, named in its row of `registry.py`, has

    missing() -> str              the reason why it has no device; empty if it has one
    device_count() -> int         the number of its devices
    device(index: int) -> Device  the one of this number, from 0. Raises: BackendError, if there is none, or if it
                                  cannot be used: kernels cannot run on it, or its memory is taken
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from fastinterp.ops.combine import Row
from fastinterp.ops.steps import Step, SumStep


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Elements [first, first + numel) of a step, with operands in the device's memory.

    step          the step of the whole tensor; the locations of its operands and outputs are ignored
    inputs        addresses of the piece's elements, one per input
    outputs       addresses, one per output
    stats_every   chunk c of the tensor is sampled iff c % stats_every == 0; 0: no statistics, no counts either
    fp8_saturate  numbers beyond the range of an 8-bit float become the largest; else Inf or NaN

    Rounding is stochastic if the step has keys. Pieces begin and end where `grain` of the step allows.
    """

    step: Step
    inputs: tuple[int, ...]
    outputs: tuple[int, ...] = ()
    numel: int
    first: int = 0
    stats_every: int = 0
    fp8_saturate: bool = True

    @property
    def codes(self) -> tuple[int, ...]:
        """The dtype codes of the inputs."""
        return tuple(operand.dtype for operand in self.step.inputs)

    @property
    def sum_step(self) -> SumStep:
        """The step, if it writes sums. Raises: TypeError, if it does not."""
        if not isinstance(self.step, SumStep):
            raise TypeError(f"pieces of kind {self.step.kind} write nothing")
        return self.step


class Buffer(Protocol):
    """Device memory, or pinned host memory for copies to and from the device. Freed by `free`, or when collected."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def view(self) -> memoryview:
        """The bytes of host memory, writable."""
        ...

    def free(self) -> None: ...


class Event(Protocol):
    """An event of a queue: complete when all work that was enqueued before it is done."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Block the host until it is complete, without the GIL. Raises: BackendError, if work before it failed."""
        ...


class Pending(Protocol):
    """The results of a piece, available once an event that was recorded after it is complete."""

    def answer(self) -> Any:
        """The answer of this piece, in the form of `_C.Pump.answers`; None if it writes."""
        ...

    def stats(self) -> list[dict[str, float]]:
        """The statistics of each output, in the form of `_C.Pump.stats`; empty if the piece does not write."""
        ...


class Queue(Protocol):
    """A stream: work in order, concurrent with that of other queues. No method waits for the device."""

    @property
    def handle(self) -> int: ...
    def upload(self, to: int, host: int, nbytes: int) -> None: ...
    def download(self, host: int, of: int, nbytes: int) -> None: ...
    def run(self, pieces: Sequence[Piece]) -> list[Pending]:
        """Enqueue kernels for pieces. Pieces of the same kind share a launch, as far as their arguments fit."""
        ...

    def record(self) -> Event: ...
    def after(self, event: Event) -> None:
        """Work that is enqueued from now on begins after the event, which may be of another queue."""
        ...


class PreparedSums(Protocol):
    """Weighted sums of which only the row is to be told, again and again: `Device.prepare`."""

    def run(self, queue: Queue, row: Row) -> None:
        """Enqueue the sums in a queue of the device, all with this row. Nothing is allocated, and nothing answers."""
        ...


class Device(Protocol):
    """One accelerator. All methods may raise BackendError, which names call, device and bytes; OutOfMemory, if a buffer
    cannot be allocated."""

    @property
    def name(self) -> str: ...  # "cuda:0"
    @property
    def backend(self) -> str: ...  # its name in registry.py, as "cuda"
    @property
    def label(self) -> str: ...  # the product name, for messages
    def free_bytes(self) -> int: ...
    def memory(self, nbytes: int) -> Buffer: ...
    def host(self, nbytes: int) -> Buffer: ...
    def queue(self, handle: int | None = None) -> Queue:
        """A new stream, or the one with this handle (0: the default one)."""
        ...

    def prepare(self, pieces: Sequence[Piece]) -> PreparedSums:
        """Pieces of Combine steps with one output each and without statistics, of which the rows do not count.

        Rows of `run` number the inputs of each piece.
        """
        ...

    def refuses(self, step: Step) -> str | None:
        """The reason why no kernel supports this step, such as "random masks by rank"; None if one does."""
        ...
