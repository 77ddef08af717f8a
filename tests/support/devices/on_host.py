"""A device without an accelerator: its memory is the host's, its kernels are those of the CPU; and tensors on it.

What was put into its queues is done as late as it may be, so that what is looked at too early has not been written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from fastinterp.backends import torch_device as resident_devices
from fastinterp.backends.cpu import Pump, PumpOptions
from fastinterp.backends.device import Piece
from fastinterp.backends.prepared import PreparedPieces
from fastinterp.ops.dtypes import CODE_BYTES, parse_dtype
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Combine, Step, SumStep


class OnHost(torch.Tensor):
    """A tensor that says that it is on cuda:`number`."""

    number = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    @property
    def is_cuda(self) -> bool:
        return True


class OnHost1(OnHost):
    number = 1


_alive: list[torch.Tensor] = []  # as torch keeps memory until what was put in before has used it


def moved(x: torch.Tensor) -> torch.Tensor:
    _alive.append(x.detach().clone().as_subclass(OnHost))
    return _alive[-1]


def moved_module(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its tensors on the device; what was tied is."""
    found: dict[int, Any] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, x in list(own.items()):
                if x is not None and id(x) not in found:
                    there = moved(x)
                    found[id(x)] = torch.nn.Parameter(there) if isinstance(x, torch.nn.Parameter) else there
                    found[id(found[id(x)])] = found[id(x)]
                if x is not None:
                    own[name] = found[id(x)]
    return module


def plain(x: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor of the CPU."""
    assert isinstance(x, OnHost)
    return x.detach().as_subclass(torch.Tensor)


class _Pending:
    def __init__(self) -> None:
        self.found: tuple[Any, list[dict[str, float]]] | None = None

    def answer(self) -> Any:
        assert self.found is not None, "looked at before it was waited for"
        return self.found[0]

    def stats(self) -> list[dict[str, float]]:
        assert self.found is not None, "looked at before it was waited for"
        return self.found[1]


class _Event:
    def __init__(self, queue: HostQueue, upto: int):
        self.queue, self.upto = queue, upto

    def done(self) -> bool:
        if self.queue.finished >= self.upto:
            return True
        self.queue.finish(self.queue.finished + 1)  # so that asking again and again comes to an end
        return False

    def wait(self) -> None:
        self.queue.device.waits += 1
        self.queue.finish(self.upto)


class HostQueue:
    def __init__(self, device: HostDevice, handle: int):
        self.device, self.handle = device, handle
        self._todo: list[tuple[Piece, _Pending] | _Event] = []
        self.finished = 0

    def run(self, pieces: Sequence[Piece]) -> list[_Pending]:
        self.device.runs += 1
        self.device.pieces += [piece.step.kind for piece in pieces]
        pending = [_Pending() for _ in pieces]
        self._todo += zip(pieces, pending, strict=True)
        return pending

    def record(self) -> _Event:
        return _Event(self, len(self._todo))

    def after(self, event: _Event) -> None:
        self.device.orders.append((event.queue.handle, self.handle))
        self._todo.append(event)

    def finish(self, upto: int | None = None) -> None:
        end = len(self._todo) if upto is None else upto
        while self.finished < end:
            todo = self._todo[self.finished]
            self.finished += 1
            if isinstance(todo, _Event):
                todo.queue.finish(todo.upto)
            else:
                todo[1].found = carried_out(todo[0])


class HostDevice:
    """runs, pieces, waits, orders   what was asked of it: to compare with"""

    backend, label = "cuda", "the host"

    def __init__(self, number: int = 0, refused: Mapping[str, str] | None = None):
        self.name = f"cuda:{number}"
        self.runs = self.waits = 0
        self.pieces: list[str] = []
        self.orders: list[tuple[int, int]] = []
        self._refused = refused or {}
        self._queues: dict[int, HostQueue] = {}
        self.room = 1 << 40

    def free_bytes(self) -> int:
        return self.room

    def queue(self, handle: int | None = None) -> HostQueue:
        number = len(self._queues) + 1000 if handle is None else handle
        return self._queues.setdefault(number, HostQueue(self, number))

    def prepare(self, pieces: Sequence[Piece]) -> PreparedPieces:
        return PreparedPieces(pieces)

    def refuses(self, step: Step) -> str | None:
        return self._refused.get(step.kind)

    def finish(self) -> None:
        """As torch.cuda.synchronize()."""
        for queue in list(self._queues.values()):
            queue.finish()


def carried_out(piece: Piece) -> tuple[Any, list[dict[str, float]]]:
    numel, step = piece.numel, piece.step
    keys = step.keys if isinstance(step, SumStep) else ()
    assert piece.first == 0 or (isinstance(step, Combine) and not keys)
    inputs = tuple(Stored(i, 0, operand.dtype) for i, operand in enumerate(step.inputs))
    step = replace(step, inputs=inputs, numel=numel)
    sources = [
        ("memory", address, numel * CODE_BYTES[operand.dtype])
        for address, operand in zip(piece.inputs, step.inputs, strict=True)
    ]
    sinks = []
    if isinstance(step, SumStep):
        sinks = [("memory", address, numel * CODE_BYTES[step.out_dtype]) for address in piece.outputs]
        step = replace(step, sinks=tuple(range(len(sinks))), offsets=(0,) * len(sinks))
    options = PumpOptions(
        isa="scalar", stochastic=bool(keys), fp8_saturate=piece.fp8_saturate, stats_every=piece.stats_every
    )
    pump = Pump(sources, sinks, [step], options)
    pump.start()
    pump.join()
    assert pump.error() is None, pump.error()
    return pump.answers()[0], pump.stats()[0]


class Streams:
    """The number of torch's current stream, and whether it is captured."""

    current = 0
    captured = False

    @contextmanager
    def on(self, number: int) -> Iterator[None]:
        before, self.current = self.current, number
        yield
        self.current = before


@pytest.fixture
def streams() -> Streams:
    return Streams()


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, streams: Streams) -> HostDevice:
    """What `OnHost` tensors are on."""
    found = HostDevice()
    _alive.clear()
    monkeypatch.setattr(resident_devices, "_opened", {0: found, 1: HostDevice(1)})
    monkeypatch.setattr(resident_devices, "_stream", lambda number: streams.current)
    monkeypatch.setattr(resident_devices, "_captures", lambda: streams.captured)
    monkeypatch.setattr(resident_devices, "_spare", lambda number: 0)
    monkeypatch.setattr(resident_devices, "_bytes", lambda nbytes, where: torch.zeros(nbytes, dtype=torch.uint8))
    return found


def bits(x: torch.Tensor) -> bytes:
    """Of a tensor on the CPU, or of what is in an OnHost tensor's memory now."""
    found = plain(x) if isinstance(x, OnHost) else x.detach()
    assert parse_dtype(str(found.dtype)) is not None or not found.is_floating_point()
    return found.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
