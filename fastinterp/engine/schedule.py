"""Runs a plan: opens the files, has its tensors carried out in rounds, and puts the pump's errors into words."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastinterp.compute.backends import cpu_isa, cpu_threads
from fastinterp.compute.ops import philox_key
from fastinterp.compute.pump import Progress
from fastinterp.engine.jobs import Job
from fastinterp.engine.place import Place, Step
from fastinterp.engine.plan import Plan
from fastinterp.engine.rounds import Machine, drive
from fastinterp.engine.sinks import Sinks
from fastinterp.engine.sources import Sources, remedy
from fastinterp.engine.tensors import PlannedTensor
from fastinterp.errors import OutputError, ShapeError, UsageError

STATS_EVERY = 32  # chunks of 16384 elements: one of so many is measured, which costs a few percent of the kernel's time
_STORE = 0  # Philox stream of the store's rounding


@dataclass(frozen=True)
class Window:
    """How much memory the workers use at a time, in bytes.

    Reads are small enough that the inputs are still in the second-level cache when they are combined, and writes take
    no larger pages than `cp` does: docs/performance.md has the measurements.
    """

    threads: int
    write_bytes: int
    read_bytes: int
    inputs: int
    outputs: int

    @property
    def bytes(self) -> int:
        """All workers' scratch; page roundings and slack included."""
        return self.threads * (self.inputs * (self.read_bytes + 4096) + self.outputs * (self.write_bytes + 4096))


def make_window(plan: Plan, threads: int, max_memory: int) -> Window:
    """The largest window that suits the caches and fits `max_memory`.

    Raises: UsageError, if even the smallest does not fit.
    """
    inputs, outputs = max(len(t.inputs) for t in plan.tensors), len(plan.recipes)
    read, write = _pages(max(16 << 10, min(64 << 10, (512 << 10) // inputs))), 128 << 10
    while True:
        window = Window(threads, write, read, inputs, outputs)
        if window.bytes <= max_memory:
            return window
        if write <= 4096 and read <= 4096:
            raise UsageError(
                f"{threads} threads with {inputs} inputs and {outputs} outputs need at least {window.bytes} bytes, but "
                f"--max-memory allows {max_memory}. Allow more, or use fewer threads"
            )
        write, read = _pages(write // 2), _pages(read // 2)


def fitting_outputs(plan: Plan, threads: int, max_memory: int) -> int:
    """How many outputs of such a plan one read can make within `max_memory`; at least 1."""
    inputs = max(len(t.inputs) for t in plan.tensors)
    least = Window(threads, 4096, 4096, inputs, 0).bytes, Window(threads, 4096, 4096, 0, 1).bytes
    return max(1, (max_memory - least[0]) // least[1])


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


class Run:
    """A plan whose files are open.

    jobs    one per tensor that has sinks, in the order of the outputs
    others  the tensors that are not wanted: they count where a method asks about the whole model
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sources,
        window: Window,
        isa: str,
        machine: Machine,
        jobs: list[Job],
        others: list[Job],
    ):
        self.jobs, self.others = jobs, others
        self.machine = machine
        self._plan, self._sources, self._window, self._isa = plan, sources, window, isa

    def refuse_changed(self) -> None:
        """Raises: CheckpointError, if an input is not what it was when its header was read."""
        self._sources.refuse_changed()

    def done(self) -> Done:
        """When all jobs are done. Raises what `refuse_changed` does."""
        self.refuse_changed()
        machine, named = self.machine, {job.place.name: job for job in self.jobs}
        machine.finish()
        every = {t.name: named[t.name] for t in self._plan.tensors if t.name in named}
        window = self._window
        return Done(every, machine.bytes_read, machine.bytes_written, window.threads, self._isa, window.bytes)


@contextmanager
def opened(
    plan: Plan, sinks: Sinks, *, threads: int | None, max_memory: int, progress: Progress | None
) -> Iterator[Run]:
    """The plan, ready to be carried out into `sinks`. Files are closed at the end of the `with`.

    Raises: UsageError, if the scratch does not fit `max_memory`; StorageError and OutputError, if a file cannot be
    opened.
    """
    isa = cpu_isa()
    window = make_window(plan, cpu_threads(threads), max_memory)
    with ExitStack() as stack:
        reads = ((i, e) for t in plan.tensors for i, e in zip(t.inputs, t.entries, strict=True))
        sources = Sources(plan.checkpoints, reads, stack, sinks.files, sinks.scratch)
        sinks.open(stack)
        recipe = plan.recipes[0]
        settings = {
            "isa": isa,
            "sources": sources.fds,
            "sinks": sinks.handles,
            "threads": window.threads,
            "write_bytes": window.write_bytes,
            "read_bytes": window.read_bytes,
            "stochastic": recipe.rounding == "stochastic",
            "fp8_saturate": recipe.fp8_overflow == "saturate",
            "prefetch": not sources.cached(),
            "stats_every": STATS_EVERY,
        }
        # As they follow each other in the outputs, which the pump writes in runs.
        wanted = [t for t in plan.tensors if t.name in sinks.of]
        wanted.sort(key=lambda t: (sinks.of[t.name][0][0], sinks.of[t.name][1][0]))
        jobs = [_job(plan, t, sources, sinks) for t in wanted]
        others = [_job(plan, t, sources, sinks) for t in plan.tensors if t.name not in sinks.of]
        explained = partial(_explained, {t.name: t for t in plan.tensors}, plan, sources, sinks)
        machine = Machine(settings, explained, plan.bytes_read + plan.bytes_written, progress)
        yield Run(plan, sources, window, isa, machine, jobs, others)


def run(plan: Plan, sinks: Sinks, *, threads: int | None, max_memory: int, progress: Progress | None) -> Done:
    """Carry out the plan.

    Ends all threads before it returns or raises, KeyboardInterrupt included.
    Raises: what `opened` does; CheckpointError, if an input was cut or changed; ShapeError, if tensors that must agree
    differ; StorageError and OutputError, if the operating system cannot read or write.
    """
    with opened(plan, sinks, threads=threads, max_memory=max_memory, progress=progress) as running:
        drive(running.jobs, running.machine, running.others)
        return running.done()


def _job(plan: Plan, tensor: PlannedTensor, sources: Sources, sinks: Sinks) -> Job:
    numbers, offsets = sinks.of.get(tensor.name, ((), ()))
    stochastic = tensor.merged and plan.recipes[0].rounding == "stochastic"
    place = Place(
        name=tensor.name,
        shape=tensor.shape,
        operands=tuple(sources.operand(i, e) for i, e in zip(tensor.inputs, tensor.entries, strict=True)),
        nbytes=tuple(e.nbytes for e in tensor.entries),
        out_dtype=tensor.dtype.code or 0,
        out_bytes=(tensor.dtype.nbytes(tensor.numel) or 0) if tensor.merged else tensor.entries[0].nbytes,
        sinks=tuple(numbers),
        offsets=tuple(offsets),
        keys=tuple(philox_key(r.seed, _STORE, tensor.name) for r in plan.recipes) if stochastic else (),
        seeds=tuple(r.seed for r in plan.recipes),
    )
    if tensor.program is None:
        return Job(place, tensor.rows)
    from fastinterp.engine.asking import Asking

    return Asking(place, tensor.models, tensor.program.calls)


def _explained(
    tensors: Mapping[str, PlannedTensor],
    plan: Plan,
    sources: Sources,
    sinks: Sinks,
    error: tuple[Any, ...],
    steps: Sequence[Step],
) -> Exception:
    kind, *rest = error
    if kind == "differs":
        tensor = tensors[steps[rest[0]].name]
        first, other = (plan.checkpoints[tensor.inputs[i]].name for i in (0, rest[1]))
        return ShapeError(
            f"{tensor.name} ({tensor.dtype}) is not averaged, and differs between {first} and {other}. "
            "Say whose to take: `integers: MODEL` in the recipe, --integers MODEL of interpolate",
            tensor=tensor.name,
        )
    if kind == "write":
        handle, code, offset, expected, _ = rest
        place = f"writing {expected} bytes at {offset}{remedy(code)}"
        return OutputError(f"{sinks.paths[handle]}: {os.strerror(code)}, {place}")
    return sources.explained(error)
