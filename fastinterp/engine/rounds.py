"""Drives the tensors of a plan through the pump, in rounds: what they ask, and then what they write.

A round is one run of the pump. It holds the sums of the tensors whose answers are in and the next requests of the
tensors after them, so that no thread waits for an answer, and so that what is read again was read just before: it comes
from the page cache. Where no tensor asks anything, all of them are one round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastinterp.compute.pump import Progress, Pump, watch
from fastinterp.engine.jobs import Job, Result
from fastinterp.engine.place import Step

if TYPE_CHECKING:
    from fastinterp.engine.asking import Asking

ROUND_BYTES = 256 << 20  # of inputs that a round reads for the first time; one tensor at least
HELD_BYTES = 64 << 20  # of answers at a time; those to one tensor at least


class Machine:
    """Runs steps, a round at a time, and counts what they cost.

    settings   of every Pump: isa, sources, sinks, threads and so on
    explained  the pump's error and the steps that it ran, as the exception to raise
    total      bytes that all rounds are expected to read and write, for `progress`
    """

    def __init__(
        self,
        settings: dict[str, Any],
        explained: Callable[[tuple[Any, ...], Sequence[Step]], Exception],
        total: int,
        progress: Progress | None,
    ):
        self._settings, self._explained = settings, explained
        self._total, self._told, self._progress = total, 0, progress
        self.bytes_read = self.bytes_written = self.rounds = self.scratch_bytes = 0

    def run(self, steps: Sequence[Step]) -> list[Result]:
        """Ends all threads before it returns or raises, KeyboardInterrupt included."""
        pump = Pump(steps=[step.native for step in steps], **self._settings)
        before = self.bytes_read + self.bytes_written
        watch(pump, sum(step.nbytes for step in steps), self._shown(before))
        error = pump.error()
        if error is not None:
            raise self._explained(error, steps)
        self.bytes_read += pump.bytes_read
        self.bytes_written += pump.bytes_written
        self.scratch_bytes = max(self.scratch_bytes, pump.scratch_bytes)
        self.rounds += 1
        return [Result(answer, stats) for answer, stats in zip(pump.answers(), pump.stats(), strict=True)]

    def _shown(self, before: int) -> Progress | None:
        progress = self._progress
        if progress is None:
            return None

        def shown(done: int, _: int) -> None:
            # Answers may lead to more or less than was foreseen: the total may grow, what is done never shrinks.
            self._told = max(self._told, before + done)
            self._total = max(self._total, self._told)
            progress(self._told, self._total)

        return shown

    def finish(self) -> None:
        """Tell the end, where it is another one than foreseen."""
        done = self.bytes_read + self.bytes_written
        if self._progress and not self._told == self._total == done:
            self._progress(done, done)


def drive(jobs: Sequence[Job], machine: Machine) -> None:
    """Carry out all jobs, in their order: that of the output files."""
    waiting = deque(jobs)
    running: deque[Job] = deque()
    while True:
        running += _admitted(waiting)
        if running:
            running.extend(job for job in _round(running, machine) if not (job.done or job.whole))
            continue
        resting = [job for job in jobs if not job.done]
        if not resting:
            return
        _ask_all(resting, jobs, machine)
        waiting.extend(resting)


def _admitted(waiting: deque[Job]) -> list[Job]:
    """The jobs that enter a round: as many as have ROUND_BYTES of inputs together, at least one if any waits."""
    taken: list[Job] = []
    nbytes = 0
    while waiting and (not taken or nbytes + waiting[0].cost <= ROUND_BYTES):
        taken.append(waiting.popleft())
        nbytes += taken[-1].cost
    return taken


def _round(running: deque[Job], machine: Machine) -> list[Job]:
    """Take the next steps of each job, as long as their answers can be held; those jobs leave `running`.

    Steps that write come first, so that neighbours in a file are neighbours here.
    """
    taken: list[Job] = []
    steps: list[tuple[int, Step]] = []
    held = 0
    while running:
        own = running[0].steps()
        held += sum(step.held for step in own)
        if taken and held > HELD_BYTES:
            break
        steps += [(len(taken), step) for step in own]
        taken.append(running.popleft())
    steps.sort(key=lambda pair: "sinks" not in pair[1].native)
    found: list[list[Result]] = [[] for _ in taken]
    if steps:
        for (at, _), result in zip(steps, machine.run([step for _, step in steps]), strict=True):
            found[at].append(result)
    for job, results in zip(taken, found, strict=True):
        job.take(results)
    return taken


def _ask_all(resting: Sequence[Job], jobs: Sequence[Job], machine: Machine) -> None:
    """Answer what is asked about the whole model, when all tensors that do not ask are at their end."""
    from fastinterp.engine.asking import asked_of_all

    merged = [job for job in map(_asking, jobs) if job is not None]
    waits = [job for job in map(_asking, resting) if job is not None]
    for request in dict.fromkeys(r for job in waits for r in job.whole_requests):
        answer = asked_of_all(request, merged, machine.run, HELD_BYTES)
        for job in waits:
            job.answer(request, answer)


def _asking(job: Job) -> Asking | None:
    from fastinterp.engine.asking import Asking

    last = job.last
    return last if isinstance(last, Asking) else None
