"""Runs steps on accelerators, and what they cannot or need not do on the processor beside them.

Imported only where a device was asked for, or `--device auto` chose one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastinterp.backends.cpu import Handle, Progress, PumpOptions
from fastinterp.backends.device import Device
from fastinterp.errors import UsageError
from fastinterp.execute.device.batches import Part, Work, batches
from fastinterp.execute.device.worker import LEAST_SLOT, Files, Worker
from fastinterp.execute.jobs.job import Result
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.execute.rounds import DeviceUsage, PumpExecutor
from fastinterp.messages import size
from fastinterp.ops.steps import Combine, CopyEqual, Histogram, MaskedSum, Step

# Of each device. Shorter slots cost more of Python than of the bus (tried: 4, 8, 16, 32 MiB), longer ones more to lock.
SLOTS, SLOT_BYTES = 8, 16 << 20
_LEAST_BATCH = 4 << 20  # bytes: where there is less to do, it is not shared any further
_TICK_S = 0.1
_SAMPLES = "samples of magnitudes"


def device_window(max_memory: int, devices: int) -> int:
    """Bytes of host memory for the slots of all devices: half of what may be used, or as much as they need.

    Raises: UsageError, if that is too little for the smallest slots.
    """
    window = min(max_memory // 2, devices * SLOTS * SLOT_BYTES)
    if window < devices * 2 * LEAST_SLOT:
        raise UsageError(
            f"--max-memory allows {max_memory} bytes, but merging on accelerators takes at least "
            f"{4 * devices * LEAST_SLOT}. Allow more, or use --device cpu"
        )
    return window


class DeviceExecutor(PumpExecutor):
    """A PumpExecutor whose steps run on `devices`; on the processor, what none of them does.

    max_memory  bytes of host memory for slots, scratch and answers together
    The other arguments are those of PumpExecutor. Devices are the caller's; `close` gives their memory back.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        sources: Sequence[Handle],
        sinks: Sequence[Handle],
        options: PumpOptions,
        explained: Callable[[tuple[Any, ...], Sequence[TensorStep]], Exception],
        total: int,
        progress: Progress | None,
        max_memory: int,
    ):
        window = device_window(max_memory, len(devices))
        super().__init__(sources, sinks, options, explained, total, progress, max_memory - window)
        files = Files(sources, sinks, options)
        threads, each = options.threads // len(devices), window // len(devices)
        slot = max(LEAST_SLOT, min(SLOT_BYTES, each // SLOTS))
        self._workers = [Worker(device, each, slot, SLOTS, threads, files) for device in devices]
        self._window = each
        self._on_cpu: dict[str, set[str]] = {}  # why the processor works on tensors, and their names
        self._work = Work((), 0)  # of the round that runs
        self._pinned = 0  # bytes of slots at most

    def usage(self) -> DeviceUsage:
        devices = [worker.device for worker in self._workers]
        names = set().union(*(some for why, some in self._on_cpu.items() if why != _SAMPLES))
        return DeviceUsage(
            devices=tuple(f"{device.name} {device.label} ({device.backend})" for device in devices),
            on_cpu={why: len(some) for why, some in self._on_cpu.items()},
            tensors=len(names),
            lost=tuple(worker.lost for worker in self._workers if worker.lost),
        )

    def run(self, steps: Sequence[TensorStep]) -> list[Result]:
        """Ends all threads before it returns or raises, KeyboardInterrupt included.

        Raises: BackendError, if no device is left; what PumpExecutor.run does.
        """
        workers = [worker for worker in self._workers if not worker.lost]
        most = self._batch_bytes(steps, workers)
        parts, rest = self._sorted(steps, most)
        needed = max((p.nbytes for own in parts.values() for p in own), default=0)
        for worker in workers:
            worker.limit = max(worker.limit, needed)
        every = batches((p for own in parts.values() for p in own), most)
        work = self._work = Work(every, len(workers))
        rounds = self.rounds
        self.scratch_bytes -= self._pinned
        crew = [threading.Thread(target=w.work, args=(work,), name=w.device.name) for w in workers if every]
        try:
            for thread in crew:
                thread.start()
            found = dict(zip(rest, super().run([*rest.values()]), strict=True)) if rest else {}
            while not work.wait(_TICK_S):
                self._tell(self.bytes_read + self.bytes_written)
        finally:
            _end(work, crew)
        self._tell(self.bytes_read + self.bytes_written)
        self.bytes_read += work.bytes_read
        self.bytes_written += work.bytes_written
        self.rounds = rounds + 1
        self._pinned = max(self._pinned, sum(worker.held_bytes for worker in workers))
        self.scratch_bytes += self._pinned
        found |= {i: _result(own) for i, own in parts.items()}
        return [found[i] for i in range(len(steps))]

    def close(self) -> None:
        """Give the memory of all devices back. The executor runs no more."""
        for worker in self._workers:
            worker.close()

    def _batch_bytes(self, steps: Sequence[TensorStep], workers: Sequence[Worker]) -> int:
        """Of one batch: a slot at most, and less where there is so little to do that devices would wait."""
        share = sum(step.nbytes for step in steps) // (len(workers) * SLOTS)
        return min(max(_LEAST_BATCH, share), *(worker.limit for worker in workers))

    def _sorted(self, steps: Sequence[TensorStep], most: int) -> tuple[dict[int, list[Part]], dict[int, TensorStep]]:
        """By number of the step, its parts for the devices; and the steps that the processor does."""
        parts: dict[int, list[Part]] = {}
        rest: dict[int, TensorStep] = {}
        for i, step in enumerate(steps):
            native = step.native
            if isinstance(native, MaskedSum):
                native = native.with_filled_masks()
            why = _nothing_to_compute(native) or self._workers[0].device.refuses(native)
            if why is None:
                own = Part(native, 0, native.numel).cut(most)
                if 2 * own[0].nbytes <= self._window:
                    parts[i] = own
                    continue
                why = f"rows so long that they do not fit into {size(self._window // 2)}"
            self._on_cpu.setdefault(why, set()).add(step.name)
            rest[i] = replace(step, native=native)
        return parts, rest

    def _progress_from(self, before: int) -> Progress:
        return lambda done, _: self._tell(before + done)

    def _tell(self, done: int) -> None:
        """Show the progress of devices and processor: `done` are the bytes of this one, and of rounds before.

        Raises: what stopped the devices.
        """
        work = self._work
        if isinstance(work.error, tuple):
            raise self._explained(work.error, ())
        if work.error is not None:
            raise work.error
        if self._progress is not None:
            self._reported = max(self._reported, done + work.bytes_read + work.bytes_written)
            self._total = max(self._total, self._reported)
            self._progress(self._reported, self._total)


def _nothing_to_compute(step: Step) -> str | None:
    """Why a step is the processor's, whatever devices can do: no device reads it, or sending it costs more."""
    if step.gathers:
        return "rows that are moved"
    if step.decodes:
        return "encoded inputs"
    if isinstance(step, CopyEqual):
        return "not averaged"
    if not step.numel:
        return "empty"
    if isinstance(step, Histogram) and step.every > 1:
        return _SAMPLES
    if isinstance(step, Combine) and len(step.inputs) == 1 and step.inputs[0].dtype == step.out_dtype:
        return "copies" if all(row.is_copy for row in step.rows) else None
    return None


def _result(parts: Sequence[Part]) -> Result:
    """Of a step, when all of its parts are done."""
    whole = parts[0].whole or parts[0]
    if whole.result is None:
        raise ValueError("a step has no result, though all batches are done")
    return whole.result


def _end(work: Work, crew: Sequence[threading.Thread]) -> None:
    """Wait for all threads, even if another exception comes meanwhile: they use memory that is freed next."""
    late = None
    while True:
        try:
            work.stop()
            for thread in crew:
                if thread.ident is not None:
                    thread.join()
            break
        except BaseException as error:
            late = error
    if late is not None:
        raise late
