"""An accelerator on host memory, with queues that are threads: what is not waited for shows as wrong bytes.

Its kernels are the processor's. Delays, failures and a shortage of memory can be asked for.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
from msgspec.structs import replace

from fastinterp import _C
from fastinterp.backends import device
from fastinterp.backends.cpu import PumpOptions
from fastinterp.backends.device import Piece
from fastinterp.backends.prepared import PreparedPieces
from fastinterp.errors import BackendError, OutOfMemory
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.operands import Stored
from fastinterp.ops.steps import Combine, Divergence, GroupCombine, Histogram, MaskedStats, MaskedSum, Step, SumStep

POISON = 0xA5


@dataclass
class Fault:
    """What goes wrong: the n-th call of this name (upload, run, download, memory, host), counted from 1, raises."""

    call: str
    at: int
    error: type[BackendError] = BackendError
    lasts: bool = True  # later calls fail, too
    late: bool = False  # not the call, but what it put into the queue


class Buffer:
    def __init__(self, device: FakeDevice, nbytes: int, kind: str):
        raw = np.full(nbytes + 256, POISON, np.uint8)
        start = -int(raw.ctypes.data) % 256
        self._bytes = raw[start : start + nbytes]
        self._device, self._kind, self.nbytes = device, kind, nbytes
        device.hold(kind, nbytes)

    @property
    def address(self) -> int:
        return int(self._bytes.ctypes.data)

    @property
    def view(self) -> memoryview:
        assert self._kind == "host"
        return self._bytes.data

    def free(self) -> None:
        assert self.nbytes, "freed twice"
        self._bytes[:] = POISON
        self._device.hold(self._kind, -self.nbytes)
        self.nbytes = 0


class Event:
    def __init__(self) -> None:
        self._passed = threading.Event()
        self.error: BaseException | None = None

    def done(self) -> bool:
        return self._passed.is_set()

    def set(self, error: BaseException | None) -> None:
        self.error = error
        self._passed.set()

    def wait(self) -> None:
        assert self._passed.wait(60), "an event that never comes"
        if self.error is not None:
            raise self.error


@dataclass
class Pending:
    found: Any = None
    of: list[dict[str, float]] = field(default_factory=list)
    event: Event = field(default_factory=Event)

    def answer(self) -> Any:
        assert self.event.done(), "asked before an event behind the piece has passed"
        return self.found

    def stats(self) -> list[dict[str, float]]:
        assert self.event.done()
        return self.of


_QUEUE = "the queue of a fake device"  # name of its thread, which never ends


def running() -> set[threading.Thread]:
    """All threads but those of fake devices."""
    return {thread for thread in threading.enumerate() if thread.name != _QUEUE}


class Queue:
    handle = 0

    def __init__(self, device: FakeDevice):
        self._device = device
        self._work: SimpleQueue[Callable[[], None] | Event] = SimpleQueue()
        self._error: BaseException | None = None
        threading.Thread(target=self._go, name=_QUEUE, daemon=True).start()

    def _go(self) -> None:
        while True:
            work = self._work.get()
            if isinstance(work, Event):
                work.set(self._error)
                continue
            time.sleep(random.random() * self._device.jitter)
            if self._error is None:
                try:
                    work()
                except BaseException as error:  # a mistake of the test shows where the event is waited for
                    self._error = error

    def _put(self, name: str, nbytes: int, work: Callable[[], None]) -> None:
        late = self._device.count(name)

        def slow() -> None:
            time.sleep(nbytes / self._device.bytes_per_s)
            if late is not None:
                raise late
            work()

        self._work.put(slow)

    def upload(self, to: int, host: int, nbytes: int) -> None:
        self._device.check("memory", to, nbytes)
        self._device.check("host", host, nbytes)
        self._put("upload", nbytes, lambda: _copy(to, host, nbytes))

    def download(self, host: int, of: int, nbytes: int) -> None:
        self._device.check("memory", of, nbytes)
        self._device.check("host", host, nbytes)
        self._put("download", nbytes, lambda: _copy(host, of, nbytes))

    def run(self, pieces: Sequence[Piece]) -> list[device.Pending]:
        pendings = [Pending() for _ in pieces]
        assert pieces
        for piece in pieces:
            assert all(address % 256 == 0 for address in (*piece.inputs, *piece.outputs))

        def work() -> None:
            for piece, pending in zip(pieces, pendings, strict=True):
                pending.found, pending.of = computed(piece)

        self._put("run", 0, work)
        for pending in pendings:
            self._work.put(pending.event)
        self._device.pieces += len(pieces)
        return [*pendings]

    def record(self) -> Event:
        event = Event()
        self._work.put(event)
        return event

    def after(self, event: device.Event) -> None:
        assert isinstance(event, Event)

        def wait() -> None:
            event._passed.wait(60)
            if event.error is not None:
                raise event.error

        self._work.put(wait)


class FakeDevice:
    """bytes_per_s  of each copy; jitter: seconds of delay at most before everything; room: bytes of device memory."""

    backend, label = "fake", "Fake"

    def __init__(
        self,
        ordinal: int = 0,
        *,
        bytes_per_s: float = float("inf"),
        jitter: float = 0.0,
        room: int = 1 << 40,
        faults: Sequence[Fault] = (),
        refuses: Callable[[Step], str | None] = lambda step: None,
    ):
        self.name = f"cuda:{ordinal}"
        self.bytes_per_s, self.jitter, self.room, self.faults = bytes_per_s, jitter, room, list(faults)
        self.held = {"host": 0, "memory": 0}
        self.most = {"host": 0, "memory": 0}
        self.calls: dict[str, int] = {}
        self.pieces = 0
        self._refuses = refuses
        self._buffers: list[Buffer] = []
        self._lock = threading.Lock()

    def free_bytes(self) -> int:
        return self.room - self.held["memory"]

    def hold(self, kind: str, nbytes: int) -> None:
        with self._lock:
            self.held[kind] += nbytes
            self.most[kind] = max(self.most[kind], self.held[kind])

    def count(self, name: str) -> BackendError | None:
        """Count a call. Raises what is to go wrong with it, or returns it, if that is to be later."""
        with self._lock:
            self.calls[name] = at = self.calls.get(name, 0) + 1
        for fault in self.faults:
            if fault.call == name and (at == fault.at or (fault.lasts and at > fault.at)):
                error = fault.error(f"{name} {at} of {self.name} failed on purpose")
                if fault.late:
                    return error
                raise error
        return None

    def check(self, kind: str, address: int, nbytes: int) -> None:
        assert any(
            b._kind == kind and b.nbytes and b.address <= address and address + nbytes <= b.address + b.nbytes
            for b in self._buffers
        ), f"{nbytes} bytes at {address} are in no {kind} buffer"

    def memory(self, nbytes: int) -> Buffer:
        self.count("memory")
        if self.held["memory"] + nbytes > self.room:
            raise OutOfMemory(f"{self.name}: out of memory, {nbytes} bytes")
        return self._kept(Buffer(self, nbytes, "memory"))

    def host(self, nbytes: int) -> Buffer:
        self.count("host")
        return self._kept(Buffer(self, nbytes, "host"))

    def _kept(self, buffer: Buffer) -> Buffer:
        self._buffers = [b for b in self._buffers if b.nbytes] + [buffer]
        return buffer

    def queue(self, handle: int | None = None) -> Queue:
        return Queue(self)

    def prepare(self, pieces: Sequence[Piece]) -> PreparedPieces:
        return PreparedPieces(pieces)

    def refuses(self, step: Step) -> str | None:
        if step.by_rank:
            return "random masks by rank"
        if isinstance(step, Divergence):
            return "divergence"
        if isinstance(step, Histogram) and step.score is not None:
            return "scores in a histogram"
        return self._refuses(step)


def _copy(to: int, of: int, nbytes: int) -> None:
    ctypes.memmove(to, of, nbytes)


# --- kernels ---------------------------------------------------------------------------------------------------------


def computed(piece: Piece) -> tuple[Any, list[dict[str, float]]]:
    """A piece, by the processor: (answer, stats)."""
    step = piece.step
    codes = [operand.dtype for operand in step.inputs]
    if isinstance(step, Combine):
        return None, _C.combine(
            list(piece.inputs), codes, step.rows, list(piece.outputs), step.out_dtype, piece.numel, first=piece.first,
            stochastic=bool(step.keys), keys=list(step.keys), fp8_saturate=piece.fp8_saturate,
            stats_every=piece.stats_every,
        )  # fmt: skip
    if not piece.outputs and not isinstance(step, MaskedStats):
        sources = [("memory", a, piece.numel * CODE_BYTES[code]) for a, code in zip(piece.inputs, codes, strict=True)]
        if isinstance(step, Histogram):
            step = replace(step, columns=piece.numel)
        return _pump(piece, step, sources, [], piece.numel).answers()[0], []
    return _embedded(piece, codes)


def _embedded(piece: Piece, codes: Sequence[int]) -> tuple[Any, list[dict[str, float]]]:
    """The piece at its place in a tensor of zeros, from which its random numbers and groups follow; less what the zeros
    before it count."""
    first, count, step = piece.first, piece.numel, piece.step
    numel = _whole(step, first + count)
    sources, sinks, held = [], [], []
    for address, code in zip(piece.inputs, codes, strict=True):
        x = np.zeros(numel * CODE_BYTES[code], np.uint8)
        _copy(x.ctypes.data + first * CODE_BYTES[code], address, count * CODE_BYTES[code])
        held.append(x)
        sources.append(("memory", x.ctypes.data, x.nbytes))
    width = CODE_BYTES[step.out_dtype] if isinstance(step, SumStep) else 0
    for _ in piece.outputs:
        held.append(np.zeros(numel * width, np.uint8))
        sinks.append(("memory", held[-1].ctypes.data, held[-1].nbytes))
    pump = _pump(piece, step, sources, sinks, numel)
    for address, (_, made, _) in zip(piece.outputs, sinks, strict=True):
        _copy(address, made + first * width, count * width)
    if piece.outputs:  # zeros add nothing but their number
        sampled = float(_sampled(first, first + count, piece.stats_every))
        return None, [{**stats, "sampled": sampled} for stats in pump.stats()[0]]
    reals, counts = pump.answers()[0]
    for x, code in zip(held, codes, strict=True):
        x[first * CODE_BYTES[code] : (first + count) * CODE_BYTES[code]] = 0
    zeros = np.asarray(_pump(piece, step, sources, [], numel).answers()[0][1])
    return (reals, memoryview((np.asarray(counts) - zeros).tobytes()).cast("q")), []


def _sampled(first: int, stop: int, every: int) -> int:
    """Elements of [first, stop) in the chunks whose statistics are taken: each of `every`, from the first on."""
    if not every:
        return 0
    starts = range(first // CHUNK // every * every * CHUNK, stop, every * CHUNK)
    return sum(max(0, min(stop, at + CHUNK) - max(first, at)) for at in starts)


def _whole(step: Step, end: int) -> int:
    """Elements of a tensor that has this piece, in whole rows; of as many rows as numbers for each row are given."""
    columns = step.columns
    rows = -(-end // columns)
    if isinstance(step, GroupCombine) and step.per == "row":
        rows = len(step.rows[0].totals)
    scores = [output.score for output in step.outputs] if isinstance(step, MaskedSum) else []
    for score in [step.score, *scores] if isinstance(step, MaskedStats) else scores:
        if score is not None and score.factors:
            rows = len(score.factors) // 4
    return rows * columns


def _pump(piece: Piece, step: Step, sources: list[Any], sinks: list[Any], numel: int) -> _C.Pump:
    inputs = tuple(Stored(i, 0, operand.dtype) for i, operand in enumerate(step.inputs))
    step = replace(step, inputs=inputs, numel=numel)
    if isinstance(step, MaskedStats):
        step = replace(step, fills=None)
    if isinstance(step, SumStep):
        step = replace(step, sinks=tuple(range(len(sinks))), offsets=(0,) * len(sinks))
    options = PumpOptions(
        stochastic=isinstance(step, SumStep) and bool(step.keys), fp8_saturate=piece.fp8_saturate,
        stats_every=piece.stats_every,
    )  # fmt: skip
    pump = _C.Pump(sources, sinks, [step], options)
    pump.start()
    assert pump.wait(60)
    pump.join()
    assert pump.error() is None, pump.error()
    return pump
