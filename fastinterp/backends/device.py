"""The interface of an accelerator: memory, queues of work, and kernels for pieces of the pump's steps.

Two backends have it, CUDA (`cuda.py`) and Triton (`triton/device.py`). Both work on memory that they are given by
address, and know nothing of files, recipes or methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from fastinterp.ops.steps import Step, SumStep


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """Elements [first, first + numel) of a step's tensor, whose operands are in the device's memory.

    step          of the whole tensor; where its operands and outputs are is not looked at
    inputs        addresses of the piece's elements, one per input
    outputs       addresses, one per output
    stats_every   chunk c of the tensor is sampled iff c % stats_every == 0; 0 samples none, and then nothing is counted
                  either
    fp8_saturate  what becomes of numbers beyond those of 8-bit floats: the largest; else Inf or NaN

    Rounding is stochastic if the step has keys. Where a step may be cut: see its `grain`.
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
        """Of the dtypes of the inputs."""
        return tuple(operand.dtype for operand in self.step.inputs)

    @property
    def sum_step(self) -> SumStep:
        """The step of a piece that writes. Raises: TypeError, if it does not."""
        if not isinstance(self.step, SumStep):
            raise TypeError(f"pieces of kind {self.step.kind} write nothing")
        return self.step


class Buffer(Protocol):
    """Memory of the device, or of the host and ready for copies to and from it. Freed by `free`, or when collected."""

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def view(self) -> memoryview:
        """Of host memory: its bytes, writable."""
        ...

    def free(self) -> None: ...


class Event(Protocol):
    """A moment in a queue: passed when all that was put in before it has been done."""

    def done(self) -> bool: ...
    def wait(self) -> None:
        """Wait here, on the host, without the GIL. Raises: BackendError, if something before it failed."""
        ...


class Pending(Protocol):
    """What a piece answers, once an event that was recorded after it has passed."""

    def answer(self) -> Any:
        """As `_C.Pump.answers` has it, of this piece alone; None if it writes."""
        ...

    def stats(self) -> list[dict[str, float]]:
        """As `_C.Pump.stats` has it: one per output; empty if the piece answers."""
        ...


class Queue(Protocol):
    """Work in order, beside the work of other queues: a stream. Nothing here waits for the device."""

    @property
    def handle(self) -> int: ...
    def upload(self, to: int, host: int, nbytes: int) -> None: ...
    def download(self, host: int, of: int, nbytes: int) -> None: ...
    def run(self, pieces: Sequence[Piece]) -> list[Pending]:
        """Pieces of the same kind become one launch, as far as their description fits."""
        ...

    def record(self) -> Event: ...
    def after(self, event: Event) -> None:
        """What is put in from now on begins after the event, which may be another queue's."""
        ...


class Device(Protocol):
    """One accelerator. Everything may raise BackendError, which names call, device and bytes; OutOfMemory, if there is
    too little memory for a buffer."""

    @property
    def name(self) -> str: ...  # "cuda:0"
    @property
    def backend(self) -> str: ...  # "cuda" or "triton"
    @property
    def label(self) -> str: ...  # for people: the product's name
    def free_bytes(self) -> int: ...
    def memory(self, nbytes: int) -> Buffer: ...
    def host(self, nbytes: int) -> Buffer: ...
    def queue(self, handle: int | None = None) -> Queue:
        """A new stream, or the one with this handle (0: the default one)."""
        ...

    def refuses(self, step: Step) -> str | None:
        """Why no kernel here does this step, as "random masks by rank"; None if one does."""
        ...
