"""Runs a plan: opens the files, has its tensors carried out in rounds, and puts the pump's errors into words."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.backends.cpu import Handle, Progress, PumpOptions
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.errors import OutputError, UsageError
from fastinterp.execute.jobs.job import Job
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.execute.rounds import DeviceUsage, PumpExecutor, run_jobs
from fastinterp.execute.sinks import Sinks
from fastinterp.execute.sources import Sources, remedy
from fastinterp.ops.combine import philox_key
from fastinterp.ops.steps import Operand
from fastinterp.plan.inputs import PlannedTensor, TensorInput
from fastinterp.plan.plan import Plan
from fastinterp.plan.tensors import must_agree

if TYPE_CHECKING:
    from fastinterp.backends.device import Device
    from fastinterp.execute.jobs.chained_job import ScratchFile

STATS_EVERY = 32  # chunks of 16384 elements: one of so many is measured, which costs a few percent of the kernel's time
_STORE = 0  # Philox stream of the store's rounding


@dataclass(frozen=True)
class Window:
    """How much memory the workers use at a time, in bytes.

    Reads are small enough that the inputs are still in the second-level cache when they are combined, and writes take
    no larger pages than `cp` does: docs/performance.md has the measurements.

    most  what may be used. What methods ask, and sums with masks, have scratch of their own: with less, fewer threads
          work on them
    asks  whether there are such
    """

    threads: int
    write_bytes: int
    read_bytes: int
    inputs: int
    outputs: int
    most: int
    asks: bool

    @property
    def bytes(self) -> int:
        """All workers' scratch; page roundings and slack included. Of plain sums; else the bound."""
        return self.most if self.asks else self.plain_bytes

    @property
    def plain_bytes(self) -> int:
        return self.threads * (self.inputs * (self.read_bytes + 4096) + self.outputs * (self.write_bytes + 4096))


def make_window(plan: Plan, threads: int, max_memory: int) -> Window:
    """The largest window that suits the caches and fits `max_memory`.

    Raises: UsageError, if even the smallest does not fit.
    """
    inputs, outputs = max(len(s.inputs) for t in plan.tensors for s in t.stages), len(plan.recipes)
    asks = any(s.program is not None for t in plan.tensors for s in t.stages)
    read, write = _pages(max(16 << 10, min(64 << 10, (512 << 10) // inputs))), 128 << 10
    while True:
        window = Window(threads, write, read, inputs, outputs, max_memory, asks)
        if window.plain_bytes <= max_memory:
            return window
        if write <= 4096 and read <= 4096:
            raise UsageError(
                f"{threads} threads with {inputs} inputs and {outputs} outputs need at least {window.plain_bytes} "
                f"bytes, but --max-memory allows {max_memory}. Allow more, or use fewer threads"
            )
        write, read = _pages(write // 2), _pages(read // 2)


def fitting_outputs(plan: Plan, threads: int, max_memory: int) -> int:
    """How many outputs of such a plan one read can make within `max_memory`; at least 1."""
    inputs = max(len(s.inputs) for t in plan.tensors for s in t.stages)
    fixed, each = (Window(threads, 4096, 4096, i, k, max_memory, False).plain_bytes for i, k in ((inputs, 0), (0, 1)))
    return max(1, (max_memory - fixed) // each)


def _pages(size: int) -> int:
    """`size` in whole pages, at least one: so writes end at pages of the output, and scratch holds no half pages."""
    return max(4096, size // 4096 * 4096)


@dataclass(frozen=True)
class Done:
    """What was done: for each tensor that was made its job, which has the statistics of every output."""

    jobs: dict[str, Job]
    bytes_read: int
    bytes_written: int
    threads: int
    isa: str
    scratch_bytes: int
    usage: DeviceUsage


class Run:
    """A plan whose files are open.

    jobs    those of the tensors that have sinks, by name, in the order of the outputs
    others  those of tensors that are not wanted: they count where a method asks about the whole model
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        isa: str,
        threads: int,
        executor: PumpExecutor,
        jobs: Mapping[str, Job],
        wanted: Container[str],
    ):
        self.jobs = {name: job for name, job in jobs.items() if name in wanted}
        self.others = [job for name, job in jobs.items() if name not in wanted]
        self.executor = executor
        self._plan, self._sources, self._isa, self._threads = plan, sources, isa, threads

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if an input is not what it was when its header was read."""
        self._sources.refuse_changed()

    def done(self) -> Done:
        """When all jobs are done. Raises what `refuse_changed` does."""
        self.refuse_changed()
        executor = self.executor
        executor.finish()
        written = executor.bytes_written - self._plan.bytes_made
        return Done(
            self.jobs, executor.bytes_read, written, self._threads, self._isa, executor.scratch_bytes, executor.usage()
        )


@contextmanager
def opened(
    plan: Plan,
    sinks: Sinks,
    *,
    threads: int | None,
    max_memory: int,
    progress: Progress | None,
    devices: Sequence[Device] = (),
) -> Iterator[Run]:
    """The plan, ready to be carried out into `sinks`, on `devices` where they can. Files are closed at the end of the
    `with`.

    Raises: UsageError, if the scratch does not fit `max_memory`; StorageError and OutputError, if a file cannot be
    opened.
    """
    isa = cpu_isa()
    window = make_window(plan, cpu_threads(threads), max_memory - _slots(devices, max_memory))
    with ExitStack() as stack:
        every = [s for t in plan.tensors for s in t.stages]
        inputs = (tensor for s in every for tensor in s.inputs)
        sources = Sources(plan.checkpoints, inputs, stack, sinks.files, sinks.scratch)
        sinks.open(stack)
        recipe = plan.recipes[0]
        scratch = _scratch(plan, sources, sinks, stack, sinks.scratch) if len(every) > len(plan.tensors) else None
        options = PumpOptions(
            isa=isa,
            threads=window.threads,
            write_bytes=window.write_bytes,
            read_bytes=window.read_bytes,
            stochastic=recipe.rounding == "stochastic",
            fp8_saturate=recipe.fp8_overflow == "saturate",
            prefetch=not sources.cached(),
            stats_every=STATS_EVERY,
        )
        # As they follow each other in the outputs, which the pump writes in runs.
        order = sorted(plan.tensors, key=lambda t: [at[0] for at in sinks.of.get(t.name, ())])
        jobs = {t.name: _job(plan, t, sources, sinks, scratch) for t in order}
        explained = partial(_explained, {t.name: t for t in plan.tensors}, plan, sources, sinks)
        total = plan.bytes_read + plan.bytes_made + plan.bytes_written
        executor = _executor(
            devices, stack, sources.fds, sinks.handles, options, explained, total, progress, max_memory
        )
        yield Run(plan, sources, isa, window.threads, executor, jobs, sinks.of)


def run(
    plan: Plan,
    sinks: Sinks,
    *,
    threads: int | None,
    max_memory: int,
    progress: Progress | None,
    devices: Sequence[Device] = (),
) -> Done:
    """Carry out the plan.

    Ends all threads before it returns or raises, KeyboardInterrupt included.
    Raises: what `opened` does; CheckpointError, if an input was cut or changed; ShapeError, if tensors that must agree
    differ; StorageError and OutputError, if the operating system cannot read or write; BackendError, if no device is
    left.
    """
    with opened(plan, sinks, threads=threads, max_memory=max_memory, progress=progress, devices=devices) as running:
        run_jobs([*running.jobs.values()], running.executor, running.others)
        return running.done()


def _slots(devices: Sequence[Device], max_memory: int) -> int:
    """Bytes of `max_memory` that are for the devices."""
    if not devices:
        return 0
    from fastinterp.execute.device.executor import device_window

    return device_window(max_memory, len(devices))


def _executor(
    devices: Sequence[Device],
    stack: ExitStack,
    sources: Sequence[Handle],
    sinks: Sequence[Handle],
    options: PumpOptions,
    explained: Callable[[tuple[Any, ...], Sequence[TensorStep]], Exception],
    total: int,
    progress: Progress | None,
    max_memory: int,
) -> PumpExecutor:
    if not devices:
        return PumpExecutor(sources, sinks, options, explained, total, progress, max_memory)
    from fastinterp.execute.device.executor import DeviceExecutor

    executor = DeviceExecutor(devices, sources, sinks, options, explained, total, progress, max_memory)
    stack.callback(executor.close)
    return executor


def _scratch(plan: Plan, sources: Sources, sinks: Sinks, stack: ExitStack, folder: Path | None) -> ScratchFile:
    """The file of what documents above make."""
    import tempfile

    from fastinterp.execute.jobs.chained_job import ScratchFile

    folder = folder or Path(tempfile.gettempdir())
    file = ScratchFile(folder, stack, never_free=any(t.program is not None and t.program.whole for t in plan.tensors))
    label = folder / "a temporary file"
    file.source, file.sink = sources.add(file.fd, label), len(sinks.handles)
    sinks.handles.append(file.fd)
    sinks.paths.append(label)
    return file


def _job(plan: Plan, tensor: PlannedTensor, sources: Sources, sinks: Sinks, scratch: ScratchFile | None) -> Job:
    stochastic = plan.recipes[0].rounding == "stochastic"
    if scratch is None or not tensor.before:
        return _job_at(tensor, stochastic, sources.operand, *_places(sinks, tensor.name))
    from fastinterp.execute.jobs.chained_job import ChainedJob

    def make(stage: PlannedTensor, operand: Callable[[TensorInput], Operand], offset: int | None) -> Job:
        where = _places(sinks, tensor.name) if offset is None else ([scratch.sink], [offset])
        return _job_at(stage, stochastic, operand, *where)

    return ChainedJob(tensor.stages, scratch, sources, make)


def _places(sinks: Sinks, name: str) -> tuple[Sequence[int], Sequence[int]]:
    """None for tensors that are not wanted."""
    return sinks.of.get(name, ((), ()))


def _job_at(
    tensor: PlannedTensor,
    stochastic: bool,
    operand: Callable[[TensorInput], Operand],
    numbers: Sequence[int],
    offsets: Sequence[int],
) -> Job:
    """The job of a tensor whose outputs are to be at these offsets of these sinks."""
    stochastic &= tensor.merged
    io = TensorIO(
        name=tensor.name,
        shape=tensor.shape,
        operands=tuple(operand(entry) for entry in tensor.inputs),
        nbytes=tuple(e.nbytes for e in tensor.inputs),
        out_dtype=tensor.dtype.code or 0,
        out_bytes=(tensor.dtype.nbytes(tensor.numel) or 0) if tensor.merged else tensor.inputs[0].nbytes,
        sinks=tuple(numbers),
        offsets=tuple(offsets),
        keys=tuple(philox_key(seed, _STORE, tensor.name) for seed in tensor.seeds) if stochastic else (),
    )
    if tensor.program is None:
        return Job(io, tensor.rows)
    from fastinterp.execute.jobs.adaptive_job import AdaptiveJob

    return AdaptiveJob(io, tensor.model_count, tensor.program.calls, tensor.program.name, tensor.program.seeds)


def _explained(
    tensors: Mapping[str, PlannedTensor],
    plan: Plan,
    sources: Sources,
    sinks: Sinks,
    error: tuple[Any, ...],
    steps: Sequence[TensorStep],
) -> Exception:
    kind, *rest = error
    if kind == "differs":
        tensor = tensors[steps[rest[0]].name]
        first, other = (plan.checkpoints[tensor.checkpoints[i]].name for i in (0, rest[1]))
        return must_agree(tensor, first, other)
    if kind == "write":
        handle, code, offset, expected, _ = rest
        place = f"writing {expected} bytes at {offset}{remedy(code)}"
        return OutputError(f"{sinks.paths[handle]}: {os.strerror(code)}, {place}")
    return sources.explained(error)
