"""What an accelerator is to the engine: memory, queues of work, and kernels for pieces of the pump's steps.

Two backends have this form, CUDA (`cuda.py`) and Triton (`triton.py`). Both work on memory that they are given by
address, and know nothing of files, recipes or methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

# A part of a pump step (see _C.pyi) whose operands are in the device's memory. The keys are those of the step, but:
#
# inputs        [(address, dtype code)]
# outputs       [address], one per output, of the kinds that write; instead of sinks and offsets
# numel         elements of the piece
# first         index, in the tensor, of its first element
# stats_every   of the kinds that write: chunk c of the tensor is sampled iff c % stats_every == 0; 0 samples none, and
#               then nothing is counted either
# fp8_saturate  of the kinds that write. Rounding is stochastic if there are `keys`
#
# Pieces of kinds that answer begin at a multiple of a power of two, which all but the last one are long, so that their
# answers fold to that of the tensor: of chunks (CHUNK elements); of blocks of 64 rows where `per` is "column". Pieces
# by row, and those of a divergence, are whole rows; the answers follow each other. Pieces of a histogram are whole
# strips.
Piece = Mapping[str, Any]


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

    def refuses(self, step: Mapping[str, Any]) -> str | None:
        """Why no kernel here does this step, as "random keeps by rank"; None if one does."""
        ...
