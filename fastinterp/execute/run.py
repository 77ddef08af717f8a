"""Runs a plan: opens its files, runs the jobs of its tensors, and translates the errors of the pump."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.backends.cpu import Progress, PumpOptions
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.errors import OutputError, StorageError, UsageError
from fastinterp.execute.damaged import refuse_damaged
from fastinterp.execute.jobs.job import Job
from fastinterp.execute.jobs.tensor_io import TensorIO, TensorStep
from fastinterp.execute.reading import maps_all, may_map
from fastinterp.execute.rounds import DeviceUsage, PumpExecutor, run_jobs
from fastinterp.execute.sinks import Sinks
from fastinterp.execute.sources import STREAM_BYTES, Sources, remedy
from fastinterp.execute.streams import blocks_ahead
from fastinterp.execute.window import Window, make_window
from fastinterp.ops.combine import philox_key
from fastinterp.ops.operands import Operand
from fastinterp.plan.inputs import TensorInput
from fastinterp.plan.plan import Plan
from fastinterp.plan.planned import PlannedTensor
from fastinterp.plan.tensors import must_agree, shared

if TYPE_CHECKING:
    from fastinterp.backends.device import Device
    from fastinterp.execute.jobs.chained_job import ScratchFile
    from fastinterp.execute.resume.notes import Notes
    from fastinterp.output.receipt import WeightsFile

STATS_EVERY = 32  # one chunk of 16384 elements in so many is measured, which costs a few percent of the kernel's time
_STORE = 0  # Philox stream of stochastic rounding at the store


@dataclass(frozen=True)
class Done:
    """The result of a run: the job of each output tensor, which has the statistics of every output, and counters.

    files  for each output, what its receipt says of the files of weights, by name; empty for outputs in memory
    """

    jobs: dict[str, Job]
    bytes_read: int
    bytes_written: int
    threads: int
    isa: str
    scratch_bytes: int
    usage: DeviceUsage
    files: Sequence[Mapping[str, WeightsFile]] = ()


class Run:
    """A plan with its files open.

    jobs    the jobs of the tensors that have sinks, by name, in the order of the outputs
    others  the jobs of tensors without: they count in requests about the whole model
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        sinks: Sinks,
        isa: str,
        threads: int,
        executor: PumpExecutor,
        scratch: ScratchFile | None,
    ):
        self.jobs: dict[str, Job] = {}
        self.others: list[Job] = []
        for tensor in sorted(plan.tensors, key=partial(_first_place, sinks)):
            job = _job(plan, tensor, sources, sinks, scratch)
            if _sinks_of(sinks, tensor)[0]:
                self.jobs[tensor.name] = job
            else:
                self.others.append(job)
        self.executor = executor
        self._plan, self._sources, self._sinks, self._isa, self._threads = plan, sources, sinks, isa, threads

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if an input file has changed since its header was read."""
        self._sources.refuse_changed()

    def done(self) -> Done:
        """Complete the outputs, after all jobs are done. Raises: what `refuse_changed` does; OutputError, if a file
        cannot be written.
        """
        self.refuse_changed()
        files = self._sinks.finish(self._threads)
        executor = self.executor
        executor.finish()
        written = executor.bytes_written - self._plan.bytes_made
        return Done(
            self.jobs, executor.bytes_read, written, self._threads, self._isa, executor.scratch_bytes,
            executor.usage(), files,
        )  # fmt: skip


@contextmanager
def opened(
    plan: Plan,
    sinks: Sinks,
    *,
    threads: int | None,
    max_memory: int,
    progress: Progress | None,
    devices: Sequence[Device] = (),
    or_cpu: bool = False,
    read: str = "auto",
) -> Iterator[Run]:
    """Open a plan to run into `sinks`, on `devices` as far as these support its steps. A context manager: closes the
    files at the end.

    or_cpu  the CPU does what the devices leave when all of them failed; else that is an error
    read    how inputs are read: see execute/reading.py
    Raises: UsageError, if the scratch does not fit `max_memory`; StorageError and OutputError, if a file cannot be
    opened.
    """
    isa = cpu_isa()
    refuse_damaged(plan.checkpoints)
    if plan.streamed and devices:
        what = f"{plan.streamed[0]} is read from where it is, into the CPU's memory"
        raise UsageError(
            f"{what}, and that cannot go with an accelerator. Use --device cpu (in Python device='cpu'), or download "
            "it first"
        )
    stream_bytes = _stream_bytes(plan, max_memory)
    window = window_beside(plan, devices, threads, max_memory)
    with ExitStack() as stack:
        inputs = (tensor for stage in plan.stages for tensor in stage.inputs)
        sources = Sources(
            plan.checkpoints, inputs, stack, sinks.files, sinks.scratch, stream_bytes or STREAM_BYTES,
            in_turns=not devices, is_mapped=maps_all(read),
        )  # fmt: skip
        cached = sources.cached()
        if cached and not devices and may_map(read, plan.reads_again):
            sources.map()
        sinks.open(stack, isa)
        recipe = plan.recipes[0]
        scratch = _scratch(plan, sources, sinks, stack, sinks.scratch) if plan.stages is not plan.tensors else None
        options = PumpOptions(
            isa=isa,
            threads=window.threads,
            write_bytes=window.write_bytes,
            read_bytes=window.read_bytes,
            stochastic=recipe.rounding == "stochastic",
            fp8_saturate=recipe.fp8_overflow == "saturate",
            prefetch=not cached,
            **({"ahead": blocks_ahead(window.inputs, stream_bytes)} if stream_bytes else {}),
            stats_every=STATS_EVERY,
        )
        explained = partial(_explained, plan, sources, sinks)
        total = plan.bytes_read + plan.bytes_made + plan.bytes_written
        most = max_memory - stream_bytes
        where = sources.handles, sinks.handles, options, explained, total, sinks.watched(progress), most
        if devices:
            from fastinterp.execute.device.executor import DeviceExecutor

            executor: PumpExecutor = stack.enter_context(closing(DeviceExecutor(devices, *where, or_cpu=or_cpu)))
        else:
            executor = PumpExecutor(*where)
            if sources.in_turns:
                executor.turns = sources.turns
        yield Run(plan, sources, sinks, isa, window.threads, executor, scratch)


def run(
    plan: Plan,
    sinks: Sinks,
    *,
    threads: int | None,
    max_memory: int,
    progress: Progress | None,
    devices: Sequence[Device] = (),
    or_cpu: bool = False,
    notes: Notes | None = None,
    read: str = "auto",
) -> Done:
    """Run a plan. notes: goes on from what is finished, and notes what becomes so

    Ends all threads before it returns or raises, KeyboardInterrupt included.
    Raises: what `opened` does; CheckpointError, if an input was truncated or changed; ShapeError, if tensors that must
    agree differ; StorageError and OutputError, if the operating system cannot read or write; BackendError, if no device
    is left.
    """
    with opened(
        plan, sinks, threads=threads, max_memory=max_memory, progress=progress, devices=devices, or_cpu=or_cpu,
        read=read,
    ) as running:  # fmt: skip
        if notes is None:
            run_jobs([*running.jobs.values()], running.executor, running.others)
            return running.done()
        usage = notes.run(running.jobs, running.others, running.executor, sinks.checksums)
        return replace(running.done(), usage=usage)


def window_beside(plan: Plan, devices: Sequence[Device], threads: int | None, max_memory: int) -> Window:
    """The window of a plan that runs on `devices`, beside the buffers of these and of what is streamed.

    Raises: UsageError, if `max_memory` is too little for all of that.
    """
    count = cpu_threads(threads)
    most = max_memory - _device_bytes(devices, max_memory, count) - _stream_bytes(plan, max_memory)
    return make_window(plan, count, most)


def _stream_bytes(plan: Plan, max_memory: int) -> int:
    """Bytes of `max_memory` for what is read of files elsewhere."""
    return max_memory // 2 if plan.streamed else 0


def _device_bytes(devices: Sequence[Device], max_memory: int, threads: int) -> int:
    """Bytes of `max_memory` for the buffers of the devices."""
    if not devices:
        return 0
    from fastinterp.execute.device.executor import device_window

    return device_window(max_memory, len(devices), threads)


def _scratch(plan: Plan, sources: Sources, sinks: Sinks, stack: ExitStack, folder: Path | None) -> ScratchFile:
    """The temporary file for the tensors of earlier documents."""
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
        return _encoded(tensor, sinks, _job_at(tensor, stochastic, sources.operand, *_sinks_of(sinks, tensor)))
    from fastinterp.execute.jobs.chained_job import ChainedJob

    def make(stage: PlannedTensor, operand: Callable[[TensorInput], Operand], offset: int | None) -> Job:
        if offset is None:
            return _encoded(stage, sinks, _job_at(stage, stochastic, operand, *_sinks_of(sinks, stage)))
        return _job_at(stage, stochastic, operand, [scratch.sink], [offset])

    return ChainedJob(tensor.stages, scratch, sources, make)


def _sinks_of(sinks: Sinks, tensor: PlannedTensor) -> tuple[Sequence[int], Sequence[int]]:
    """The sinks and offsets of a tensor, or of its codes; empty, if it is not wanted."""
    return sinks.of.get(_stored_name(tensor), ((), ()))


def _stored_name(tensor: PlannedTensor) -> str:
    """Its name in the files: that of its codes, if it has any."""
    return tensor.name if tensor.encoding is None else tensor.entries[0][0]


def _first_place(sinks: Sinks, tensor: PlannedTensor) -> tuple[int, int]:
    """Where the first output of a tensor goes: the outputs' order, in which the pump writes in contiguous runs."""
    numbers, offsets = _sinks_of(sinks, tensor)
    return (numbers[0], offsets[0]) if numbers else (-1, 0)


def _encoded(tensor: PlannedTensor, sinks: Sinks, job: Job) -> Job:
    """The job that encodes what `job` sums, if the tensor is stored as codes."""
    if tensor.encoding is None or not job.io.sinks:
        return job
    from fastinterp.execute.jobs.encoded_job import EncodedJob

    places = [zip(*sinks.of[name], strict=True) for name, _, _ in tensor.encoding.scales]
    scales = [tuple(of) for of in zip(*places, strict=True)] if places else [()] * len(job.io.sinks)
    return EncodedJob(job, job.io, tensor.encoding, scales)


def _job_at(
    tensor: PlannedTensor,
    stochastic: bool,
    operand: Callable[[TensorInput], Operand],
    numbers: Sequence[int],
    offsets: Sequence[int],
) -> Job:
    """The job of a tensor whose outputs go to these offsets of these sinks."""
    stochastic &= tensor.merged
    io = TensorIO(
        name=tensor.name,
        shape=(*tensor.shape, 2) if tensor.merged and tensor.dtype.is_complex else tensor.shape,
        operands=tuple([operand(entry) for entry in tensor.inputs]),
        nbytes=shared(tuple([e.nbytes for e in tensor.inputs])),
        out_dtype=tensor.dtype.kernel_code,
        out_bytes=tensor.nbytes if tensor.merged else tensor.inputs[0].nbytes,
        sinks=shared(tuple(numbers)),
        offsets=tuple(offsets),
        keys=tuple(philox_key(seed, _STORE, tensor.name) for seed in tensor.seeds) if stochastic else (),
    )
    if tensor.program is None:
        return Job(io, tensor.rows)
    from fastinterp.execute.jobs.adaptive_job import AdaptiveJob

    return AdaptiveJob(io, tensor.model_count, tensor.program.calls, tensor.program.name, tensor.program.seeds)


def _explained(
    plan: Plan,
    sources: Sources,
    sinks: Sinks,
    error: tuple[Any, ...],
    steps: Sequence[TensorStep],
) -> Exception:
    """The exception for an error tuple of the pump (_C.pyi)."""
    kind, *rest = error
    if kind == "differs":
        from fastinterp.execute.chunks import differing_unmerged

        tensor = next(t for t in plan.tensors if t.name == steps[rest[0]].name)
        found = tensor, tensor.checkpoints[0], tensor.checkpoints[rest[1]]
        with suppress(StorageError):  # the others, for one message about all
            differing, _ = differing_unmerged(plan)
            return must_agree([found, *(one for one in differing if one[0] is not tensor)], plan.checkpoints)
        return must_agree([found], plan.checkpoints)
    if kind == "write":
        handle, code, offset, expected, _ = rest
        what = f"writing {expected} bytes at {offset}{remedy(code)}"
        return OutputError(f"{sinks.paths[handle]}: {os.strerror(code)}, {what}")
    return sources.explained(error)
