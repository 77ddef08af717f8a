"""Runs a plan: opens the files, has its tensors carried out in rounds, and puts the pump's errors into words."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.compute.backends import cpu_isa, cpu_threads
from fastinterp.compute.ops import philox_key
from fastinterp.compute.pump import Progress, reserve
from fastinterp.engine.jobs import Job
from fastinterp.engine.place import Place, Step
from fastinterp.engine.plan import Plan
from fastinterp.engine.rounds import Machine, drive
from fastinterp.engine.sources import Operand, Sources, remedy, storage
from fastinterp.engine.tensors import MadeEntry, PlannedTensor, must_agree
from fastinterp.errors import OutputError, UsageError
from fastinterp.files.header import Entry

if TYPE_CHECKING:
    from fastinterp.engine.staged import Scratch

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
    inputs, outputs = max(len(s.inputs) for t in plan.tensors for s in (*t.first, t)), len(plan.recipes)
    asks = any(s.program is not None for t in plan.tensors for s in (*t.first, t))
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


def _pages(size: int) -> int:
    """`size` in whole pages, at least one: so writes end at pages of the output, and scratch holds no half pages."""
    return max(4096, size // 4096 * 4096)


@dataclass(frozen=True)
class Done:
    """What was done: per planned tensor its job, which has the statistics of every output."""

    jobs: list[Job]
    bytes_read: int
    bytes_written: int
    threads: int
    isa: str
    scratch_bytes: int


def run(
    plan: Plan, outputs: Sequence[Sequence[Path]], *, threads: int | None, max_memory: int, progress: Progress | None
) -> Done:
    """Carry out the plan into files that exist and are empty: for each output, the path of each file of its layout.

    Ends all threads before it returns or raises, KeyboardInterrupt included.
    Raises: CheckpointError, if an input was cut or changed; ShapeError, if tensors that must agree differ;
    StorageError and OutputError, if the operating system cannot read or write.
    """
    isa, workers = cpu_isa(), cpu_threads(threads)
    window = make_window(plan, workers, max_memory)
    with ExitStack() as stack:
        every = [s for t in plan.tensors for s in (*t.first, t)]
        pairs = (pair for s in every for pair in zip(s.inputs, s.entries, strict=True))
        reads = [(i, e) for i, e in pairs if not isinstance(e, MadeEntry)]
        sources = Sources(plan.checkpoints, reads, stack, sum(map(len, outputs)), outputs[0][0].parent)
        sinks = _Sinks(plan, outputs, stack)
        recipe = plan.recipes[0]
        scratch = (
            _scratch(plan, sources, sinks, stack, outputs[0][0].parent) if len(every) > len(plan.tensors) else None
        )
        settings = {
            "isa": isa,
            "sources": sources.fds,
            "sinks": sinks.fds,
            "threads": workers,
            "write_bytes": window.write_bytes,
            "read_bytes": window.read_bytes,
            "stochastic": recipe.rounding == "stochastic",
            "fp8_saturate": recipe.fp8_overflow == "saturate",
            "prefetch": not sources.cached(),
            "stats_every": STATS_EVERY,
        }
        jobs = {t.name: _job(plan, t, sources, sinks, scratch) for t in sinks.in_file_order(plan)}
        explained = partial(_explained, {t.name: t for t in plan.tensors}, plan, sources, sinks)
        total = plan.bytes_read + plan.bytes_made + plan.bytes_written
        machine = Machine(settings, explained, total, progress, max_memory)
        drive(list(jobs.values()), machine)
        sources.refuse_changed()
        machine.finish()
        done, written = [jobs[t.name] for t in plan.tensors], machine.bytes_written - plan.bytes_made
        return Done(done, machine.bytes_read, written, workers, isa, machine.scratch_bytes)


class _Sinks:
    """The output files, open for writing with their headers in place and their space reserved."""

    def __init__(self, plan: Plan, outputs: Sequence[Sequence[Path]], stack: ExitStack):
        self.paths: list[Path] = []
        self.fds: list[int] = []
        self.of: dict[str, tuple[list[int], list[int]]] = {}  # tensor -> sink and offset per output
        for layout, paths in zip(plan.layouts, outputs, strict=True):
            for file, path in zip(layout.files, paths, strict=True):
                with storage(path.parent / file.name, OutputError):
                    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    stack.callback(os.close, fd)
                    reserve(fd, file.size)
                    _write_first(fd, file.header)
                for name, offset in file.places.items():
                    sinks, offsets = self.of.setdefault(name, ([], []))
                    sinks.append(len(self.fds))
                    offsets.append(offset)
                self.fds.append(fd)
                self.paths.append(path.parent / file.name)

    def in_file_order(self, plan: Plan) -> list[PlannedTensor]:
        """The tensors as they follow each other in the output, which the pump writes in runs."""
        return sorted(plan.tensors, key=lambda t: (self.of[t.name][0][0], self.of[t.name][1][0]))


def _write_first(fd: int, data: bytes) -> None:
    """Write all of `data` at the start of a file; the system may take less at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)


def _scratch(plan: Plan, sources: Sources, sinks: _Sinks, stack: ExitStack, folder: Path) -> Scratch:
    """The file of what documents above make."""
    from fastinterp.engine.staged import Scratch

    file = Scratch(folder, stack, keeps=any(t.program is not None and t.program.whole for t in plan.tensors))
    label = folder / "a temporary file"
    file.source, file.sink = sources.add(file.fd, label), len(sinks.fds)
    sinks.fds.append(file.fd)
    sinks.paths.append(label)
    return file


def _job(plan: Plan, tensor: PlannedTensor, sources: Sources, sinks: _Sinks, scratch: Scratch | None) -> Job:
    stochastic = plan.recipes[0].rounding == "stochastic"
    if scratch is None or not tensor.first:
        return _job_at(tensor, stochastic, sources.operand, *sinks.of[tensor.name])
    from fastinterp.engine.staged import Staged

    def make(stage: PlannedTensor, operand: Callable[[int, Entry], Operand], offset: int | None) -> Job:
        where = sinks.of[tensor.name] if offset is None else ([scratch.sink], [offset])
        return _job_at(stage, stochastic, operand, *where)

    return Staged((*tensor.first, tensor), scratch, sources.operand, make)


def _job_at(
    tensor: PlannedTensor,
    stochastic: bool,
    operand: Callable[[int, Entry], Operand],
    numbers: Sequence[int],
    offsets: Sequence[int],
) -> Job:
    """The job of a tensor whose outputs are to be at these offsets of these sinks."""
    stochastic &= tensor.merged
    place = Place(
        name=tensor.name,
        shape=tensor.shape,
        operands=tuple(operand(i, e) for i, e in zip(tensor.inputs, tensor.entries, strict=True)),
        nbytes=tuple(e.nbytes for e in tensor.entries),
        out_dtype=tensor.dtype.code or 0,
        out_bytes=(tensor.dtype.nbytes(tensor.numel) or 0) if tensor.merged else tensor.entries[0].nbytes,
        sinks=tuple(numbers),
        offsets=tuple(offsets),
        keys=tuple(philox_key(seed, _STORE, tensor.name) for seed in tensor.seeds) if stochastic else (),
    )
    if tensor.program is None:
        return Job(place, tensor.rows)
    from fastinterp.engine.asking import Asking

    return Asking(place, tensor.models, tensor.program.calls, tensor.program.name, tensor.program.seeds)


def _explained(
    tensors: Mapping[str, PlannedTensor],
    plan: Plan,
    sources: Sources,
    sinks: _Sinks,
    error: tuple[Any, ...],
    steps: Sequence[Step],
) -> Exception:
    kind, *rest = error
    if kind == "differs":
        tensor = tensors[steps[rest[0]].name]
        first, other = (plan.checkpoints[tensor.inputs[i]].name for i in (0, rest[1]))
        return must_agree(tensor, first, other)
    if kind == "write":
        handle, code, offset, expected, _ = rest
        place = f"writing {expected} bytes at {offset}{remedy(code)}"
        return OutputError(f"{sinks.paths[handle]}: {os.strerror(code)}, {place}")
    return sources.explained(error)
