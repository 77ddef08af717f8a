"""Runs the jobs of a plan in rounds: statistics that methods request, then the sums that follow from them.

A round is one run of the pump. It holds the sums of the tensors whose requests are answered and the next requests of
the tensors after them, so that no thread waits for an answer, and so that what is read again was read just before: it
comes from the page cache. Where no method makes requests, all tensors are one round, up to ROUND_TENSORS.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as changed
from typing import TYPE_CHECKING, Any, Protocol

from msgspec.structs import replace

from fastinterp.backends.cpu import Progress, Pump, PumpOptions, SinkHandle, SourceHandle, watch
from fastinterp.errors import UsageError
from fastinterp.execute.jobs.job import Job, Result
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.ops.steps import WritingStep

if TYPE_CHECKING:
    from fastinterp.execute.jobs.adaptive_job import AdaptiveJob
    from fastinterp.ops.requests import Select, Selected

ROUND_BYTES = 256 << 20  # of inputs that a round reads for the first time; at least one tensor
ROUND_TENSORS = 16384  # of a round: their steps and results take memory at the same time, two KB for each
HELD_BYTES = 64 << 20  # of answers that are held at a time
RANK_BYTES = 32_000_000  # of memory for one rank of a request about the whole model: 1 MB of counts in each thread


@dataclass(frozen=True)
class DeviceUsage:
    """The devices that a plan ran on.

    devices  names of the accelerators; empty if the CPU computed everything
    on_cpu   with accelerators, what the CPU computed nevertheless: reason -> number of tensors
    tensors  number of tensors that the CPU computed, samples of magnitudes not counted
    lost     devices that failed, with the reason
    """

    devices: tuple[str, ...] = ()
    on_cpu: Mapping[str, int] = field(default_factory=dict)
    tensors: int = 0
    lost: tuple[str, ...] = ()

    @staticmethod
    def together(every: Sequence[DeviceUsage]) -> DeviceUsage:
        """The usage of several runs, added up."""
        on_cpu: dict[str, int] = {}
        for one in every:
            for why, count in one.on_cpu.items():
                on_cpu[why] = on_cpu.get(why, 0) + count
        return DeviceUsage(
            tuple(dict.fromkeys(device for one in every for device in one.devices)),
            on_cpu,
            sum(one.tensors for one in every),
            tuple(dict.fromkeys(lost for one in every for lost in one.lost)),
        )


Answers = dict[str, "tuple[Selected, ...]"]  # requests about the whole model, as repr tells them -> an answer per rank


class Executor(Protocol):
    """Runs the steps of a round, and returns their results.

    most         bytes of scratch memory and answers that it may hold
    round_bytes  bytes of inputs that a round reads for the first time; at least one tensor
    held_bytes   bytes of answers that are held at a time; at least those for one tensor
    """

    most: int

    @property
    def round_bytes(self) -> int: ...
    @property
    def held_bytes(self) -> int: ...
    def run(self, steps: Sequence[TensorStep]) -> list[Result]: ...


class PumpExecutor:
    """Runs steps on the CPU, one run of the pump a round, and counts bytes, rounds and scratch memory.

    sources, sinks, options  arguments of every Pump. Sources and sinks may be added between runs
    explained  translates the pump's error, with the steps that it ran, into the exception to raise
    total      bytes that all rounds are expected to read and write, for `progress`
    most       bytes of scratch memory and answers that it may hold: it uses fewer threads to stay below
    """

    def __init__(
        self,
        sources: Sequence[SourceHandle],
        sinks: Sequence[SinkHandle],
        options: PumpOptions,
        explained: Callable[[tuple[Any, ...], Sequence[TensorStep]], Exception],
        total: int,
        progress: Progress | None,
        most: int = 512_000_000,
    ):
        self.most = most
        # Groups of steps, each while the files are open that it reads: see Sources.turns.
        self.turns: Callable[[Sequence[TensorStep]], Iterable[Sequence[TensorStep]]] = lambda steps: [steps]
        self._sources, self._sinks, self._options, self._explained = sources, sinks, options, explained
        self._total, self._reported, self._progress = total, 0, progress
        self.bytes_read = self.bytes_written = self.rounds = self.scratch_bytes = 0

    @property
    def round_bytes(self) -> int:
        return ROUND_BYTES

    @property
    def held_bytes(self) -> int:
        return min(HELD_BYTES, self.most // 4)

    def run(self, steps: Sequence[TensorStep]) -> list[Result]:
        """Run steps. Ends all threads before it returns or raises, KeyboardInterrupt included.

        Raises: UsageError, if even one thread needs more memory than is allowed.
        """
        return [result for some in self.turns(steps) for result in self._run(some)]

    def _run(self, steps: Sequence[TensorStep]) -> list[Result]:
        """The same, in one pump."""
        pump = self._pump(steps)
        before = self.bytes_read + self.bytes_written
        watch(pump, sum(step.nbytes for step in steps), self._progress_from(before))
        error = pump.error()
        if error is not None:
            raise self._explained(error, steps)
        self.bytes_read += pump.bytes_read
        self.bytes_written += pump.bytes_written
        self.rounds += 1
        return [Result(answer, stats) for answer, stats in zip(pump.answers(), pump.stats(), strict=True)]

    def _pump(self, steps: Sequence[TensorStep]) -> Pump:
        """A pump with as many threads as fit into memory: those of surveys and masked sums have scratch memory."""
        native, threads = [step.native for step in steps], self._options.threads
        held = sum(step.held for step in steps)
        if held > self.most:  # checked before any of it is allocated
            raise UsageError(
                f"{steps[0].name} needs {held} bytes for statistics or weights, some of them for each row, but "
                f"--max-memory allows {self.most}. Allow more (in Python max_memory=...)"
            )
        pump = Pump(self._sources, self._sinks, native, self._options)
        fitting = (self.most - held) // max(1, pump.scratch_bytes)
        if fitting < threads:
            if fitting < 1:
                raise UsageError(
                    f"one thread needs {held + pump.scratch_bytes} bytes for {steps[0].name}, but --max-memory allows "
                    f"{self.most}. Allow more (in Python max_memory=...)"
                )
            threads = fitting
            pump = Pump(self._sources, self._sinks, native, replace(self._options, threads=threads))
        self.scratch_bytes = max(self.scratch_bytes, held + threads * pump.scratch_bytes)
        return pump

    def _progress_from(self, before: int) -> Progress | None:
        """The progress callback of one run. before: bytes of the runs before it."""
        progress = self._progress
        if progress is None:
            return None

        def report(done: int, _: int) -> None:
            # Answers may lead to more or fewer bytes than planned: the total may grow, the bytes done never shrink.
            self._reported = max(self._reported, before + done)
            self._total = max(self._total, self._reported)
            progress(self._reported, self._total)

        return report

    def usage(self) -> DeviceUsage:
        """The devices that ran the steps."""
        return DeviceUsage()

    def finish(self) -> None:
        """Report the end of the progress, if it differs from the planned one."""
        done = self.bytes_read + self.bytes_written
        if self._progress and not self._reported == self._total == done:
            self._progress(done, done)


def run_jobs(jobs: Sequence[Job], executor: Executor, others: Sequence[Job] = ()) -> None:
    """Run all jobs, in their order: that of the output files.

    others  jobs that are not run, but belong to the whole model, which requests may be about
    """
    for _ in Rounds(jobs, executor, others).finished():
        pass


class Rounds:
    """Jobs, and how far they are.

    others   as run_jobs has them
    most     bytes of inputs in a round even where methods make no requests; None: no limit. It may be changed
    answers  to requests about the whole model. Those that are known are not computed again; others are added
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        executor: Executor,
        others: Sequence[Job] = (),
        most: int | None = None,
        answers: Answers | None = None,
    ):
        self.answers: Answers = {} if answers is None else answers
        self._jobs, self._executor, self._others, self.most = jobs, executor, others, most
        self._waiting = deque(jobs)
        self._running: deque[Job] = deque()
        self._taken: dict[Job, int] = {}  # rounds that a job took part in, while it is not done

    @property
    def begun(self) -> list[tuple[Job, int]]:
        """The jobs of which a later round needs results of earlier ones, each with the number of these rounds."""
        return [(job, self._taken[job]) for job in self._running if self._taken.get(job)]

    def catch_up(self, begun: Sequence[tuple[Job, int]]) -> None:
        """Run the rounds again whose results an earlier run had when it ended: those before the answers that are known,
        and those that `begun` names. The next ones are as they would have been. To be called before `finished`.
        """
        if self.answers:
            while self._waiting or self._running:
                self._next()
            self._next()  # the answers
        left = {job: count - self._taken.get(job, 0) for job, count in begun}
        self._waiting = deque(job for job in self._waiting if job not in left)
        behind = deque(job for job, _ in begun if left[job])
        while behind:
            taken = self._round(behind)
            for job in taken:
                left[job] -= 1
            behind.extend(job for job in taken if left[job])
        self._running.extend(job for job, _ in begun)

    def finished(self) -> Iterator[list[Job]]:
        """Run all jobs, in their order, and yield after every round those that it finished."""
        while (jobs := self._next()) is not None:
            yield jobs

    def _next(self) -> list[Job] | None:
        """Run a round, or answer what all jobs wait for. Returns the jobs that it finished; None, if all were."""
        self._running += _admitted(self._waiting, self._executor.round_bytes, self.most)
        if not self._running:
            waiting = [job for job in self._jobs if not job.done]
            if not waiting:
                return None
            self._answer_whole(waiting)
            self._waiting.extend(waiting)
            return []
        taken = self._round(self._running)
        self._running.extend(job for job in taken if not (job.done or job.whole))
        return [job for job in taken if job.done]

    def _round(self, running: deque[Job]) -> list[Job]:
        taken = _round(running, self._executor)
        for job in taken:
            count = self._taken.pop(job, 0)
            if not job.done:
                self._taken[job] = count + 1
        return taken

    def _answer_whole(self, waiting: Sequence[Job]) -> None:
        """Answer the requests about the whole model, on which all unfinished jobs wait."""
        from fastinterp.execute.jobs.adaptive_job import select_whole

        executor = self._executor
        merged = [job for job in map(_adaptive, (*self._jobs, *self._others)) if job is not None]
        unanswered = [job for job in map(_adaptive, waiting) if job is not None]
        requests = dict.fromkeys(r for job in unanswered for r in job.whole_requests)
        new = [request for request in requests if repr(request) not in self.answers]
        for some in grouped(new, max(1, executor.most // RANK_BYTES)):
            ranks = tuple(dict.fromkeys(rank for request in some for rank in request.ranks))
            selected = select_whole(changed(some[0], ranks=ranks), merged, executor.run, executor.held_bytes)
            found = dict(zip(ranks, selected, strict=True))
            self.answers |= {repr(request): tuple(found[rank] for rank in request.ranks) for request in some}
        for request in requests:
            for job in unanswered:
                job.answer(request, self.answers[repr(request)])


def _admitted(waiting: deque[Job], again: int, most: int | None) -> list[Job]:
    """The jobs that enter a round, at least one if any waits.

    again  bytes of inputs, of all together, that are read again later
    most   bytes of inputs of all together; None: no limit
    """
    taken: list[Job] = []
    cost = nbytes = 0
    while waiting:
        cost += waiting[0].cost
        nbytes += waiting[0].nbytes if most is not None else 0
        if taken and (cost > again or (most is not None and nbytes > most)):
            break
        taken.append(waiting.popleft())
    return taken


def _round(running: deque[Job], executor: Executor) -> list[Job]:
    """Run the next steps of as many jobs as have answers that can be held. Removes these jobs from `running`.

    Steps that write come first, so that tensors which follow each other in a file do so in the pump.
    """
    taken: list[Job] = []
    steps: list[tuple[int, TensorStep]] = []
    held = 0
    while running:
        steps_of_job = running[0].steps()
        held += sum(step.held for step in steps_of_job)
        if taken and (held > executor.held_bytes or len(taken) == ROUND_TENSORS):
            break
        steps += [(len(taken), step) for step in steps_of_job]
        taken.append(running.popleft())
    steps.sort(key=lambda pair: not isinstance(pair[1].native, WritingStep))
    results: list[list[Result]] = [[] for _ in taken]
    if steps:
        for (at, _), result in zip(steps, executor.run([step for _, step in steps]), strict=True):
            results[at].append(result)
    for job, of_job in zip(taken, results, strict=True):
        job.take(of_job)
    return taken


def grouped(requests: Sequence[Select], most: int) -> list[list[Select]]:
    """Groups of requests that one pass can answer together: equal but for their ranks, at most `most` of them in a
    group of several requests.
    """
    groups: list[list[Select]] = []
    for request in requests:
        for group in groups:
            count = len({rank for one in (*group, request) for rank in one.ranks})
            if count <= most and changed(group[0], ranks=request.ranks) == request:
                group.append(request)
                break
        else:
            groups.append([request])
    return groups


def _adaptive(job: Job) -> AdaptiveJob | None:
    from fastinterp.execute.jobs.adaptive_job import AdaptiveJob

    last = job.last
    return last if isinstance(last, AdaptiveJob) else None
