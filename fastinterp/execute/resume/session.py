"""A run over its plans: what earlier processes have finished of it, and what this one notes."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from fastinterp.errors import CheckpointError, OutputError, UsageError
from fastinterp.execute.report import kept_line
from fastinterp.execute.resume.identity import Identity
from fastinterp.execute.resume.kept import Kept, verified
from fastinterp.execute.resume.notes import Notes
from fastinterp.execute.resume.records import Round
from fastinterp.execute.run import Done
from fastinterp.messages import counted, listed, tell
from fastinterp.output.folder import OutFolder
from fastinterp.output.journal import Journal, boot
from fastinterp.plan.plan import Plan

IDENTITY, ROUND = "identity", "round"  # kinds of records
_NAMED = 4  # paths of a folder that are named one by one
GO_ON = ": run the same command again to go on"
KEPT_S = 10.0  # seconds of work, from which on an interrupted run leaves its output to be resumed


class Session:
    """The notes of a run, in the journal of its first output.

    plans     which the run carries out one after the other
    first     the first output, open
    identity  of the run; one that is not sure cannot be resumed

    before    seconds of earlier processes
    share     of the bytes of all outputs that these have finished, 0 to 1; None: they noted nothing
    warnings  about what was lost of it
    """

    def __init__(self, plans: Sequence[Plan], first: OutFolder, identity: Identity):
        self._plans, self._first, self._identity = plans, first, identity
        self._boot = boot()
        rounds: list[Round] = []
        journal = first.ended if first.finished else first.journal
        if identity.sure and journal is not None and (first.resumed or first.finished):
            rounds = journal.read(ROUND, Round)
        try:
            self._kept = [
                Kept.of((one for one in rounds if one.plan == number), plan) for number, plan in enumerate(plans)
            ]
        except ValueError as error:
            raise OutputError(
                f"{first.name}: what a run noted of it does not fit it: {error}. To throw it away: "
                f"`rm -r {removal(first.left())}`"
            ) from None
        self._noted = self._earlier = bool(rounds)
        self.before = rounds[-1].seconds if rounds else 0.0
        self._start = time.monotonic()
        self.warnings: list[str] = []
        self._count()

    def _count(self) -> None:
        self._total = max(1, sum(plan.bytes_written for plan in self._plans))
        self._finished = sum(kept.nbytes(plan) for kept, plan in zip(self._kept, self._plans, strict=True))
        self.share = self._finished / self._total if self._noted else None

    def forget(self) -> None:
        """Keep nothing: the outputs are written anew."""
        self._kept = [Kept() for _ in self._plans]
        self.before, self._noted, self._earlier = 0.0, False, False
        self._count()

    def verify(self, files: Sequence[Sequence[Path]], every: bool) -> None:
        """Compare what is kept with its checksums; what does not match is to be computed again, with a warning.

        files  of each plan the temporary files, those of the first output first
        every  all of it; else a sample, or all, if the machine stopped since it was written
        """
        for number, (plan, kept, paths) in enumerate(zip(self._plans, self._kept, files, strict=True)):
            lost, record = verified(plan, number, kept, paths, every=every, boot=self._boot)
            if lost:
                self.warnings.append(about_lost(plan, lost))
            if record is not None:
                self._append(record)
        self._count()

    def tell(self) -> None:
        """Say what is kept, and what was lost."""
        if self.share is not None:
            tell(kept_line(self.share))
        for warning in self.warnings:
            tell(f"warning: {warning}")

    def notes(self, number: int) -> Notes | None:
        """The notes of a plan; None, if the run cannot be resumed."""
        if not self._identity.sure:
            return None
        return Notes(self._plans[number], number, self._kept[number], self._append, self._boot, self._seconds)

    def dones(self, isa: str, threads: int) -> list[Done]:
        """The results of all plans, where earlier processes have finished all of them."""
        results = []
        for plan, kept in zip(self._plans, self._kept, strict=True):
            jobs = {plan.tensors[number].name: job for number, job in kept.tensors.items()}
            last = kept.last or Round(0)
            made = plan.bytes_made if kept.last else 0
            results.append(Done(jobs, last.read, last.written - made, threads, isa, last.scratch, last.usage))
        return results

    def leave(self, folders: Sequence[OutFolder], error: BaseException) -> None:
        """Leave the outputs to be resumed after an error, if enough work would be lost otherwise, or an earlier process
        had left any, and note that in the error. Not, if they cannot be resumed: inputs have changed, say.
        """
        if not self._noted or isinstance(error, CheckpointError):
            return
        wrong = isinstance(error, UsageError)  # options, which the same command would have again
        if not self._earlier and (wrong or self._seconds() < KEPT_S):
            return
        for folder in folders:
            folder.leave()
        remove = removal([path for folder in folders for path in folder.left()])
        error.outcome = (  # type: ignore[attr-defined]
            f"{int(100 * self._finished / self._total)} % is kept{'' if wrong else GO_ON}. To throw it away: "
            f"rm -r {remove}"
        )

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self._start

    def _append(self, record: Round) -> None:
        journal = self._first.journal
        assert journal is not None  # it is open
        if not self._noted:
            journal.append(IDENTITY, self._identity)
            self._noted = True
        journal.append(ROUND, record)
        plan = self._plans[record.plan]
        self._finished += len(plan.recipes) * sum(plan.tensors[number].nbytes for number in record.tensors)


def removal(paths: Sequence[str]) -> str:
    """These paths as arguments of `rm -r`: many of one folder as a pattern, if it matches nothing else there."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(path), []).append(os.path.basename(path))
    words: list[str] = []
    for folder, names in folders.items():
        start, there = os.path.commonprefix(names), []  # noqa: RUF071 - of names, not of paths
        if len(names) > _NAMED and start.strip("."):  # `.*` would be the folder itself, and the one above
            with suppress(OSError):
                there = [name for name in os.listdir(folder or ".") if name.startswith(start)]
        if {*there} == {*names}:
            words.append(shlex.quote(os.path.join(folder, start)) + "*")
        else:
            words += [shlex.quote(os.path.join(folder, name)) for name in names]
    return " ".join(words)


def about_lost(plan: Plan, lost: Sequence[int]) -> str:
    """The warning about tensors that were kept, but are not as they were written."""
    names = listed((plan.tensors[number].name for number in lost), 2)
    are = "is" if len(lost) == 1 else "are"
    return f"{counted(len(lost), 'tensor')} of what was kept {are} not there as written, and computed again: {names}"


def difference(identity: Identity, journal: Journal) -> str:
    """How the run that a journal is of differs from the one that `identity` is of; empty, if that is unknown."""
    if journal.begun.merge == journal.run:
        return "several processes began it, with torchrun or srun, and go on with it"
    before = journal.read(IDENTITY, Identity)
    return before[-1].difference(identity) if before else ""
