"""Runs the jobs of a plan so that they can be resumed: after every round the journal says what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from fastinterp.backends.cpu import FileChecksum
from fastinterp.execute.jobs.job import Job
from fastinterp.execute.resume.kept import Kept, Places
from fastinterp.execute.resume.records import Region, Round, effects_of, packed
from fastinterp.execute.rounds import DeviceUsage, PumpExecutor, Rounds
from fastinterp.plan.plan import Plan

# Of inputs between two records, and at least one tensor: so few that a slow run loses little, and as many as a fast one
# reads in so many seconds, since a round ends with threads that wait for the last one.
ROUND_BYTES = 256 << 20
ROUND_S = 0.5


class Notes:
    """The notes of one plan in the journal of its run.

    number  of the plan in the run
    kept    what is finished of it already
    append  adds a record to the journal
    boot    of this machine
    seconds tells how long the run took so far
    """

    def __init__(
        self,
        plan: Plan,
        number: int,
        kept: Kept,
        append: Callable[[Round], None],
        boot: str,
        seconds: Callable[[], float],
    ):
        self._plan, self._number, self._kept, self._append = plan, number, kept, append
        self._boot, self._seconds = boot, seconds
        self._outputs = len(plan.recipes)
        self._places = Places(plan)
        self._numbers = {tensor.name: number for number, tensor in enumerate(plan.tensors)}
        self._whole = any(t.program is not None and t.program.whole for t in plan.tensors)

    def run(
        self, jobs: dict[str, Job], others: Sequence[Job], executor: PumpExecutor, checksums: Mapping[int, FileChecksum]
    ) -> DeviceUsage:
        """Run the jobs that are not finished; the others are replaced in `jobs` by finished ones.

        checksums  of the files that are written, by their numbers among all files of all outputs
        Returns the devices that ran all of them, those of earlier processes included.
        """
        kept = self._kept
        by_number = {self._numbers[name]: job for name, job in jobs.items()}
        left = [job for number, job in by_number.items() if number not in kept.tensors]
        jobs |= {self._plan.tensors[number].name: job for number, job in kept.tensors.items()}
        for (file, region), one in kept.regions.items():
            checksums[file].restore(region, one.sum, one.hashed)
        # Tensors that are finished still belong to the whole model.
        rounds = Rounds(
            left, executor, (*others, *(by_number[number] for number in kept.tensors)), ROUND_BYTES, kept.answers
        )
        before = self._go_on(rounds, executor, by_number)
        number_of = {job: number for number, job in by_number.items()}
        del by_number
        known = set(rounds.answers)
        done: list[Job] = []
        began, read = time.monotonic(), executor.bytes_read
        for some in rounds.finished():
            now = time.monotonic()
            rate = (executor.bytes_read - read) / max(1e-9, now - began)
            rounds.most, began, read = max(ROUND_BYTES, int(rate * ROUND_S)), now, executor.bytes_read
            done += some
            if not done or (self._whole and not rounds.answers):
                continue  # tensors are noted after the answers without which the others cannot go on
            numbers = [number_of[job] for job in done]
            self._append(
                Round(
                    self._number,
                    tuple(numbers),
                    packed((job.stats for job in done), self._outputs),
                    tuple(effects_of(job, self._outputs) for job in done),
                    tuple((number_of[job], count) for job, count in rounds.begun),
                    {request: answer for request, answer in rounds.answers.items() if request not in known},
                    self._regions(numbers, checksums),
                    executor.bytes_read,
                    executor.bytes_written,
                    executor.scratch_bytes,
                    DeviceUsage.together([before, executor.usage()]),
                    self._seconds(),
                    self._boot,
                )
            )
            known |= rounds.answers.keys()
            done = []
        return DeviceUsage.together([before, executor.usage()])

    def _go_on(self, rounds: Rounds, executor: PumpExecutor, jobs: Mapping[int, Job]) -> DeviceUsage:
        """Bring rounds and counters to where the last record has them. Returns the devices up to there."""
        last = self._kept.last
        if last is None:
            return DeviceUsage()
        executor.bytes_read, executor.bytes_written = last.read, last.written
        rounds.catch_up([(jobs[number], count) for number, count in last.begun])
        executor.bytes_read, executor.bytes_written = last.read, last.written
        executor.scratch_bytes = max(executor.scratch_bytes, last.scratch)
        return last.usage

    def _regions(self, numbers: Sequence[int], checksums: Mapping[int, FileChecksum]) -> tuple[Region, ...]:
        touched = self._places.regions(numbers)
        return tuple(Region(file, region, *checksums[file].progress(region)) for file, region in touched)
