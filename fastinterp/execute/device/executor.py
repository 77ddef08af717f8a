"""Runs steps on accelerators, and on the CPU those that accelerators cannot run or that need no computation.

Imported only where a device is named, or `--device auto` chose one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastinterp.backends.cpu import Progress, PumpOptions, SinkHandle, SourceHandle
from fastinterp.backends.device import Device
from fastinterp.errors import UsageError
from fastinterp.execute.device.batches import Part, Work, batches
from fastinterp.execute.device.worker import LEAST_SLOT, Files, Worker, copiers
from fastinterp.execute.jobs.job import Result
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.execute.rounds import DeviceUsage, PumpExecutor
from fastinterp.messages import size
from fastinterp.ops.steps import Combine, CopyEqual, Histogram, MaskedSum, Step

# Of each device; with many threads it has more of them. Shorter ones take more time in Python than on the bus (tried:
# 4, 8, 16, 32 MiB); longer ones take longer to lock in memory.
SLOTS, SLOT_BYTES = 8, 16 << 20
_LEAST_BATCH = 4 << 20  # bytes: smaller amounts of work are not divided any further
_TICK_S = 0.1
_HANGS_S = 5.0  # a device that takes longer to end what it has in hand is taken to hang: a slot takes milliseconds
_SAMPLES, _LEFT = "samples of magnitudes", "left by a device that failed"


def slots_of(threads: int) -> int:
    """The number of slots of a device with so many threads: one for each that reads or writes, and no fewer than 8."""
    return max(SLOTS, sum(copiers(threads)))


def device_window(max_memory: int, devices: int, threads: int) -> int:
    """Bytes of host memory for the slots of all devices: half of the limit, or as much as they need.

    threads  number of threads of all devices together

    Raises: UsageError, if that is too little for the smallest slots.
    """
    window = min(max_memory // 2, devices * slots_of(threads // devices) * SLOT_BYTES)
    if window < devices * 2 * LEAST_SLOT:
        raise UsageError(
            f"--max-memory allows {max_memory} bytes, but merging on accelerators takes at least "
            f"{4 * devices * LEAST_SLOT}. Allow more (in Python max_memory=...), or use "
            "--device cpu (in Python device='cpu')"
        )
    return window


class DeviceExecutor(PumpExecutor):
    """A PumpExecutor whose steps run on `devices`, and on the CPU where no device has a kernel.

    max_memory  bytes of host memory for slots, scratch and answers together
    or_cpu      where no device is left, the CPU does what is not done; else that is an error
    The other arguments are those of PumpExecutor. Devices belong to the caller; `close` frees the memory on them.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        sources: Sequence[SourceHandle],
        sinks: Sequence[SinkHandle],
        options: PumpOptions,
        explained: Callable[[tuple[Any, ...], Sequence[TensorStep]], Exception],
        total: int,
        progress: Progress | None,
        max_memory: int,
        *,
        or_cpu: bool = False,
    ):
        window = device_window(max_memory, len(devices), options.threads)
        super().__init__(sources, sinks, options, explained, total, progress, max_memory - window)
        files = Files(sources, sinks, options)
        threads, each = options.threads // len(devices), window // len(devices)
        slot = max(LEAST_SLOT, min(SLOT_BYTES, each // SLOTS))
        self._workers = [Worker(device, each, slot, slots_of(threads), threads, files) for device in devices]
        self._window, self._or_cpu = each, or_cpu
        self._on_cpu: dict[str, set[str]] = {}  # reason -> names of the tensors that the CPU computes
        self._work = Work((), 0)  # of the current round
        self._pinned = 0  # bytes of slots at most

    def usage(self) -> DeviceUsage:
        devices = [worker.device for worker in self._workers]
        names = set().union(*(some for why, some in self._on_cpu.items() if why != _SAMPLES))
        return DeviceUsage(
            devices=tuple(f"{device.name} {device.label} ({device.backend})" for device in devices),
            on_cpu={why: len(some) for why, some in self._on_cpu.items() if some},
            tensors=len(names),
            lost=tuple(worker.lost for worker in self._workers if worker.lost),
        )

    def run(self, steps: Sequence[TensorStep]) -> list[Result]:
        """Run steps. Ends all threads before it returns or raises, KeyboardInterrupt included; but for those that wait
        for a device that hangs, when Ctrl-C is pressed again.

        Raises: BackendError, if no device is left and the CPU may not take their place; what PumpExecutor.run does.
        """
        workers = [worker for worker in self._workers if not worker.lost]
        if not workers:
            return super().run(steps)
        most = self._batch_bytes(steps, workers)
        parts, rest = self._assigned(steps, most)
        needed = max((p.nbytes for of_step in parts.values() for p in of_step), default=0)
        for worker in workers:
            worker.limit = max(worker.limit, needed)
        every = batches((p for of_step in parts.values() for p in of_step), most)
        work = self._work = Work(every, len(workers), or_cpu=self._or_cpu)
        rounds = self.rounds
        self.scratch_bytes -= self._pinned
        try:
            for worker in workers if every else ():
                worker.start(work)
            results = self._on_processor(rest)
            while not work.wait(_TICK_S):
                self._report(self.bytes_read + self.bytes_written)
        except UsageError as error:  # beside devices the processor has less memory
            if not self._or_cpu:
                raise
            for worker in workers:
                worker.lost = worker.lost or f"{worker.device.name} {worker.device.label}: beside it, {error}"
            results = {}
        finally:
            _end(work, workers)
        self._report(self.bytes_read + self.bytes_written)
        self.bytes_read += work.bytes_read
        self.bytes_written += work.bytes_written
        self.rounds = rounds + 1
        self._pinned = max(self._pinned, sum(worker.held_bytes for worker in workers))
        self.scratch_bytes += self._pinned
        results |= {i: whole for i, of_step in parts.items() if (whole := _result(of_step)) is not None}
        left = {i: step for i, step in enumerate(steps) if i not in results}
        if left and not self._or_cpu:
            raise ValueError("a step has no result, though all batches are done")
        if all(worker.lost for worker in self._workers):
            self._leave_devices()
        self._on_cpu.setdefault(_LEFT, set()).update(step.name for step in left.values())
        results |= self._on_processor(left)
        self.rounds = rounds + 1
        return [results[i] for i in range(len(steps))]

    def _on_processor(self, steps: Mapping[int, TensorStep]) -> dict[int, Result]:
        """Run steps, by their index, on the CPU."""
        return dict(zip(steps, super().run([*steps.values()]), strict=True)) if steps else {}

    def _leave_devices(self) -> None:
        """Go on without devices: their host memory is the processor's."""
        self.close()
        self._work = Work((), 0)
        self.most, self._window = self.most + self._window * len(self._workers), 0

    def close(self) -> None:
        """Free the memory on all devices. The executor must not run afterwards."""
        for worker in self._workers:
            worker.close()

    def _batch_bytes(self, steps: Sequence[TensorStep], workers: Sequence[Worker]) -> int:
        """Size of one batch: at most a slot, and less where there is so little to do that devices would be idle."""
        share = sum(step.nbytes for step in steps) // (len(workers) * SLOTS)
        return min(max(_LEAST_BATCH, share), *(worker.limit for worker in workers))

    def _assigned(self, steps: Sequence[TensorStep], most: int) -> tuple[dict[int, list[Part]], dict[int, TensorStep]]:
        """For each step, by its index, the parts for the devices; and the steps for the CPU."""
        parts: dict[int, list[Part]] = {}
        rest: dict[int, TensorStep] = {}
        for i, step in enumerate(steps):
            native = step.native
            if isinstance(native, MaskedSum):
                native = native.with_filled_masks()
            why = _nothing_to_compute(native) or self._workers[0].device.refuses(native)
            if why is None:
                pieces = Part(native, 0, native.numel).cut(most)
                if 2 * pieces[0].nbytes <= self._window:
                    parts[i] = pieces
                    continue
                why = f"rows that do not fit into {size(self._window // 2)}"
            self._on_cpu.setdefault(why, set()).add(step.name)
            rest[i] = replace(step, native=native)
        return parts, rest

    def _progress_from(self, before: int) -> Progress:
        return lambda done, _: self._report(before + done)

    def _report(self, done: int) -> None:
        """Report the progress of devices and CPU. done: bytes of the CPU in this round, and of all earlier rounds.

        Raises: the error that stopped the devices.
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
    """The reason why a step runs on the CPU, whatever kernels a device has: its operands, or the cost of copies."""
    if step.gathers:
        return "rows that are moved"
    if step.decodes:
        return "encoded inputs"
    if step.encodes:
        return "encoded outputs"
    if isinstance(step, CopyEqual):
        return "not averaged"
    if not step.numel:
        return "empty"
    if isinstance(step, Histogram) and step.every > 1:
        return _SAMPLES
    if isinstance(step, Combine) and len(step.inputs) == 1 and step.inputs[0].dtype == step.out_dtype:
        return "copies" if all(row.is_copy for row in step.rows) else None
    return None


def _result(parts: Sequence[Part]) -> Result | None:
    """The result of a step, if all of its parts are done."""
    return (parts[0].whole or parts[0]).result


def _end(work: Work, workers: Sequence[Worker]) -> None:
    """Stop all workers and wait for them, even if another exception is raised meanwhile: memory is freed next.

    An exception that comes _HANGS_S seconds later, Ctrl-C again, ends that: a driver that does not answer cannot be
    interrupted. What is left behind neither reads nor writes files any more.
    """
    late, until = None, time.monotonic() + _HANGS_S
    while True:
        try:
            work.stop()
            for worker in workers:
                worker.wait()
            break
        except BaseException as error:
            late = error
            if time.monotonic() > until:
                break
    if late is not None:
        raise late
