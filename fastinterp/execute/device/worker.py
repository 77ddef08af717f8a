"""Runs batches on one accelerator: threads read into host memory, the device computes, other threads write.

A slot is host memory and device memory of the same size, in which a batch has the same layout. Three queues of the
device run concurrently: one batch is computed while the next one is uploaded and the previous one downloaded.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from fastinterp.backends.cpu import PumpOptions, SinkHandle, SourceHandle
from fastinterp.backends.device import Buffer, Device, Event, Pending, Piece, Queue
from fastinterp.errors import BackendError, OutOfMemory
from fastinterp.execute.device.batches import Batch, SlotRange, Work
from fastinterp.execute.jobs.job import Result

LEAST_SLOT = 64 << 10  # bytes: a device that cannot allocate as much has failed
_LEAST_SLOTS = 2  # so that one is filled while the device computes on the other
_READERS, _WRITERS = 16, 8  # threads for one device at most: 4 writers copy 24 to 55 GB/s, and its bus has 55 or more


def copiers(threads: int) -> tuple[int, int]:
    """How many of the threads of a device read, and how many write."""
    return min(_READERS, max(2, threads // 2)), min(_WRITERS, max(1, threads // 4))


@dataclass(frozen=True, slots=True)
class Files:
    """The sources and sinks of a round, and its options, in the form that the pump takes."""

    sources: Sequence[SourceHandle]
    sinks: Sequence[SinkHandle]
    options: PumpOptions


class FileError(Exception):
    """A read or write that failed. details: the error tuple, in the form of the pump's (_C.pyi)."""

    def __init__(self, *details: Any):
        super().__init__(*details)
        self.details = details


class Slot:
    """Host memory and device memory for one batch at a time."""

    def __init__(self, device: Device, nbytes: int):
        """Raises: OutOfMemory, BackendError; then nothing stays allocated."""
        self.nbytes = nbytes
        self.host: Buffer = device.host(nbytes)
        try:
            self.memory: Buffer = device.memory(nbytes)
        except BaseException:
            _freed(self.host)
            raise

    def free(self) -> None:
        for buffer in (self.memory, self.host):
            _freed(buffer)


def _freed(buffer: Buffer) -> None:
    with suppress(BackendError):  # of a device that failed: its memory is freed with the process
        buffer.free()


class Worker:
    """Runs batches on one device until none is left, or until the device fails.

    window   bytes of host memory for the device
    slot     bytes of one slot: `limit`, which may be raised between two rounds up to half of the window
    slots    number of slots at most
    threads  number of CPU threads that it may use

    `lost` is the reason why the device failed; empty if it has not.
    """

    def __init__(self, device: Device, window: int, slot: int, slots: int, threads: int, files: Files):
        self.device, self.files, self.lost = device, files, ""
        self.limit = slot
        self.readers, self.writers = copiers(threads)
        self.queues: tuple[Queue, ...] = ()  # up, compute, down
        self._window, self._slots = window, slots
        self._ring: list[Slot] = []
        self._thread: threading.Thread | None = None
        self._idle = threading.Event()  # Thread.join believes that a thread has ended where a signal comes meanwhile
        self._idle.set()

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that are allocated."""
        return sum(slot.nbytes for slot in self._ring)

    def start(self, work: Work) -> None:
        """Begin to run batches, in a thread of the device. Raises: RuntimeError, if there can be no more threads."""
        # A daemon: the program can end though the device hangs.
        self._thread = threading.Thread(target=self._work, args=(work,), name=self.device.name, daemon=True)
        self._idle.clear()
        try:
            self._thread.start()
        except RuntimeError:
            self._idle.set()
            raise

    def wait(self) -> None:
        """Wait until what was started has ended."""
        self._idle.wait()
        if self._thread is not None and self._thread.ident is not None:
            self._thread.join()

    def _work(self, work: Work) -> None:
        """Raises nothing: errors are reported to `work`."""
        try:
            while not self._attempt(work):
                pass
        except BaseException as error:  # a bug: it must not pass for the end of the work
            work.fail(error)
        finally:
            self._idle.set()

    def close(self) -> None:
        """Free all memory; none while it runs batches, which is so where it waits for a device that hangs."""
        if self._idle.is_set():
            self._free()

    def _free(self) -> None:
        while self._ring:
            self._ring.pop().free()

    def _attempt(self, work: Work) -> bool:
        """Run batches until the end, or the first failure of the device. Whether the device takes no more."""
        try:
            session = _Session(self, work, self._allocated(work))
            session.run()
            if session.failed is not None:
                raise session.failed
            return True
        except OutOfMemory as error:
            self._free()
            self.limit //= 2
            if self.limit >= max(LEAST_SLOT, work.least()):
                return False
            return self._give_up(work, f"{error}, with a slot of {2 * self.limit} bytes")
        except BackendError as error:
            self._free()
            return self._give_up(work, str(error))

    def _give_up(self, work: Work, why: str) -> bool:
        self.lost = f"{self.device.name} {self.device.label}: {why}"
        work.leave(self.lost)
        return True

    def _allocated(self, work: Work) -> list[Slot]:
        """The slots, as many as this round can use, or as memory allows.

        Raises: OutOfMemory, if two slots do not fit.
        """
        if not self.queues:
            self.queues = tuple(self.device.queue() for _ in range(3))
        if self._ring and self._ring[0].nbytes < self.limit:
            self._free()
        most = max(_LEAST_SLOTS, min(self._slots, self._window // self.limit))
        while len(self._ring) < min(most, work.batches):
            try:
                self._ring.append(Slot(self.device, self.limit))
            except OutOfMemory:
                if len(self._ring) < _LEAST_SLOTS:
                    raise
                self._slots = len(self._ring)
                break
        return self._ring


class _Session:
    """The threads of one worker in one round, until all is done, the round stops or the device fails."""

    def __init__(self, worker: Worker, work: Work, ring: Sequence[Slot]):
        self.failed: BackendError | None = None
        self._worker, self._work, self._files = worker, work, worker.files
        self._upload, self._compute, self._download = worker.queues
        self._ended = threading.Event()
        self._launching = threading.Lock()
        self._free: SimpleQueue[Slot] = SimpleQueue()
        self._launched: SimpleQueue[tuple[Batch, Slot, Event, list[Pending]] | None] = SimpleQueue()
        for slot in ring:
            self._free.put(slot)

    def run(self) -> None:
        writers: list[threading.Thread] = []
        readers: list[threading.Thread] = []
        try:
            self._start(self._write, self._worker.writers, writers)
            self._start(self._read, self._worker.readers, readers)
        except BaseException as error:  # the system allows no more threads
            self._work.fail(error)
        for thread in readers:
            thread.join()
        for _ in writers:
            self._launched.put(None)
        for thread in writers:
            thread.join()
        if self.failed is not None or self._work.stopped:
            for queue in self._worker.queues:
                with suppress(BackendError):  # no copy may be in progress in memory that is freed next
                    queue.record().wait()

    def _start(self, target: Callable[[], None], count: int, threads: list[threading.Thread]) -> None:
        for _ in range(count):
            name = f"{self._worker.device.name}{target.__name__}"
            thread = threading.Thread(target=target, name=name, daemon=True)  # as in Worker.start
            thread.start()
            threads.append(thread)

    def _fail(self, error: BackendError, batch: Batch) -> None:
        """Record a failure of the device: the batch goes back, and the device gets no more."""
        self.failed = self.failed or error
        self._ended.set()
        self._work.give_back(batch)

    # --- threads that read

    def _read(self) -> None:
        try:
            while self._next():
                pass
        except FileError as error:
            self._work.fail(error.details)
        except BaseException as error:  # a bug: it must not pass for the end of the work
            self._work.fail(error)

    def _next(self) -> bool:
        """Read the next batch and launch it. False at the end."""
        slot = self._free.get()
        launched = False
        try:
            batch = self._work.take(self._worker.limit, self._ended)
            if batch is None:
                return False
            self._fill(slot, batch)
            if self._work.stopped:
                return False
            try:
                self._launch(slot, batch)
                launched = True
            except BackendError as error:
                self._fail(error, batch)
        finally:
            if not launched:
                self._free.put(slot)  # at the end, for the next thread to see it
        return launched

    def _fill(self, slot: Slot, batch: Batch) -> None:
        operands = [o for some in batch.inputs for o in some]
        if self._files.options.prefetch and hasattr(os, "posix_fadvise"):
            for o in operands:
                source = self._files.sources[o.handle]
                if isinstance(source, int):
                    os.posix_fadvise(source, o.offset, o.nbytes, os.POSIX_FADV_WILLNEED)
        for o in operands:
            if self._work.stopped:
                return
            _read_into(slot, o, self._files.sources[o.handle])

    def _launch(self, slot: Slot, batch: Batch) -> None:
        """Enqueue uploads, kernels and downloads of a batch in the three queues of the device."""
        pieces = [self._piece(slot, batch, i) for i in range(len(batch.parts))]
        host, memory, output_bytes = slot.host.address, slot.memory.address, batch.nbytes - batch.input_bytes
        with self._launching:
            self._upload.upload(memory, host, batch.input_bytes)
            self._compute.after(self._upload.record())
            pendings = self._compute.run(pieces)
            event = self._compute.record()
            if output_bytes:
                self._download.after(event)
                self._download.download(host + batch.input_bytes, memory + batch.input_bytes, output_bytes)
                event = self._download.record()
            self._launched.put((batch, slot, event, pendings))

    def _piece(self, slot: Slot, batch: Batch, i: int) -> Piece:
        part, options = batch.parts[i], self._files.options
        return Piece(
            step=part.native,
            inputs=tuple(slot.memory.address + o.slot_offset for o in batch.inputs[i]),
            outputs=tuple(slot.memory.address + o.slot_offset for o in batch.outputs[i]),
            numel=part.count,
            first=part.first,
            stats_every=options.stats_every,
            fp8_saturate=options.fp8_saturate,
        )

    # --- threads that write

    def _write(self) -> None:
        while (launched := self._launched.get()) is not None:
            batch, slot, event, pendings = launched
            try:
                event.wait()
                results = [Result(pending.answer(), pending.stats()) for pending in pendings]
                if self._store(slot, batch):
                    self._work.done(batch, results)
            except BackendError as error:
                self._fail(error, batch)
            except FileError as error:
                self._work.fail(error.details)
            except BaseException as error:
                self._work.fail(error)
            finally:
                self._free.put(slot)

    def _store(self, slot: Slot, batch: Batch) -> bool:
        """Write the outputs of a batch. False, if the round stopped before all were written."""
        for o in (o for some in batch.outputs for o in some):
            if self._work.stopped:
                return False
            _write_from(slot, o, self._files.sinks[o.handle])
        return not self._work.stopped


# --- reads and writes, with the pump's errors ------------------------------------------------------------------------


def _read_into(slot: Slot, o: SlotRange, source: SourceHandle) -> None:
    if isinstance(source, tuple):
        _, address, size = source
        held = max(0, min(o.nbytes, size - o.offset))
        if held < o.nbytes:
            raise FileError("read", o.handle, 0, o.offset, o.nbytes, held)
        ctypes.memmove(slot.host.address + o.slot_offset, address + o.offset, o.nbytes)
        return
    view, done = slot.host.view[o.slot_offset : o.slot_offset + o.nbytes], 0
    while done < o.nbytes:
        try:
            assert isinstance(source, int)  # what is elsewhere is read on the CPU
            got = os.preadv(source, [view[done:]], o.offset + done)
        except OSError as error:
            raise FileError("read", o.handle, error.errno, o.offset, o.nbytes, done) from None
        if got == 0:
            raise FileError("read", o.handle, 0, o.offset, o.nbytes, done)
        done += got


def _write_from(slot: Slot, o: SlotRange, sink: SinkHandle) -> None:
    if isinstance(sink, tuple):
        _, address, size = sink
        held = max(0, min(o.nbytes, size - o.offset))
        if held < o.nbytes:
            raise FileError("write", o.handle, 0, o.offset, o.nbytes, held)
        ctypes.memmove(address + o.offset, slot.host.address + o.slot_offset, o.nbytes)
        return
    view, done = slot.host.view[o.slot_offset : o.slot_offset + o.nbytes], 0
    if not isinstance(sink, int):
        sink.add(o.offset, view)
        sink = sink.fd
    while done < o.nbytes:
        try:
            put = os.pwrite(sink, view[done:], o.offset + done)
        except OSError as error:
            raise FileError("write", o.handle, error.errno, o.offset, o.nbytes, done) from None
        if put == 0:
            raise FileError("write", o.handle, errno.ENOSPC, o.offset, o.nbytes, done)
        done += put
