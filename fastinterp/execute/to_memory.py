"""Runs plans into memory: the bytes of the outputs are the same as in files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from fastinterp.backends.cpu import Progress
from fastinterp.backends.device import Device
from fastinterp.execute.report import Report, records_of, report_on
from fastinterp.execute.rounds import Rounds
from fastinterp.execute.run import opened, run
from fastinterp.execute.sinks import MemorySinks
from fastinterp.plan.plan import Plan

# Tensor -> (address, bytes), of its planned dtype and shape. Tensors that are not named are not computed.
Addresses = Mapping[str, tuple[int, int]]


def fill(
    plan: Plan,
    outputs: Sequence[Addresses],
    *,
    threads: int | None,
    max_memory: int,
    progress: Progress | None = None,
    devices: Sequence[Device] = (),
    read: str = "auto",
) -> list[Report]:
    """Run the plan into memory, which its owner keeps alive meanwhile. Returns a report for each output.

    Raises: what run.run does.
    """
    start = time.perf_counter()
    done = run(
        plan, MemorySinks(outputs), threads=threads, max_memory=max_memory, progress=progress, devices=devices,
        read=read,
    )  # fmt: skip
    wall = time.perf_counter() - start
    return [report_on(plan, done, wall, k, record) for k, record in enumerate(records_of(plan, done.jobs))]


def filling(plan: Plan, output: Addresses, *, threads: int | None, max_memory: int) -> Iterator[list[str]]:
    """Run the plan for one output, some hundred megabytes at a time: yields the names of the tensors that are complete.

    Nothing runs between two steps of the iterator. Files are closed when it ends, or is closed.
    """
    with opened(plan, MemorySinks([output]), threads=threads, max_memory=max_memory, progress=None) as running:
        names = {id(job): name for name, job in running.jobs.items()}
        executor = running.executor
        rounds = Rounds([*running.jobs.values()], executor, running.others, executor.round_bytes)
        for jobs in rounds.finished():
            running.refuse_changed()
            yield [names[id(job)] for job in jobs]
        running.done()
