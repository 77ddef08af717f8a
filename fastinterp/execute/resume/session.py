"""A run over its plans: what earlier processes have finished of it, and what this one notes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from fastinterp.errors import CheckpointError, UsageError
from fastinterp.execute.resume.identity import Identity
from fastinterp.execute.resume.kept import Kept, unsound
from fastinterp.execute.resume.notes import Notes
from fastinterp.execute.resume.records import Round
from fastinterp.messages import counted
from fastinterp.output.folder import OutFolder
from fastinterp.output.journal import Journal, boot
from fastinterp.plan.plan import Plan

IDENTITY, ROUND = "identity", "round"  # kinds of records
KEPT_S = 10.0  # seconds of work, from which on an interrupted run leaves its output to be resumed


class Session:
    """The notes of a run, in the journal of its first output.

    plans     which the run carries out one after the other
    first     the first output, open
    identity  of the run; None: it cannot be resumed
    kept      of each plan, what is finished already
    """

    def __init__(self, plans: Sequence[Plan], first: OutFolder, identity: Identity | None):
        self._plans, self._identity = plans, identity
        self._journal: Journal | None = first.journal
        self._boot, self._noted = boot(), False
        rounds: list[Round] = []
        if identity is not None and self._journal is not None and (first.resumed or first.finished):
            rounds = self._journal.read(ROUND, Round)
        self._noted = bool(rounds)
        self._seconds = rounds[-1].seconds if rounds else 0.0
        self._start = time.monotonic()
        self.kept = [
            Kept.of((one for one in rounds if one.plan == number), len(plan.recipes))
            for number, plan in enumerate(plans)
        ]

    @property
    def seconds(self) -> float:
        """That the run took so far, in all processes; of those that were killed, up to their last record."""
        return self._seconds + time.monotonic() - self._start

    @property
    def complete(self) -> bool:
        """Whether all tensors are finished."""
        return all(len(kept.tensors) == len(plan.tensors) for kept, plan in zip(self.kept, self._plans, strict=True))

    @property
    def share(self) -> float | None:
        """How much of the bytes of all outputs is finished already, 0 to 1; None, if nothing is."""
        total = sum(plan.bytes_written for plan in self._plans)
        finished = sum(kept.nbytes(plan) for kept, plan in zip(self.kept, self._plans, strict=True))
        return finished / max(1, total) if any(kept.tensors for kept in self.kept) else None

    def forget(self) -> None:
        """Keep nothing: the outputs are written anew."""
        self.kept = [Kept() for _ in self.kept]
        self._seconds = 0.0

    def verify(self, files: Sequence[Sequence[Path | None]], every: bool) -> list[str]:
        """Compare what is kept with its checksums; what does not match is to be computed again.

        files  of each plan the temporary files, those of the first output first; None: a file that is in place already
        every  all of it; else a sample, or all, if the machine stopped since it was written
        Returns warnings.
        """
        warnings = []
        for number, (plan, kept, paths) in enumerate(zip(self._plans, self.kept, files, strict=True)):
            if kept.last is None:
                continue
            crashed = not self._boot or kept.last.boot != self._boot
            lost = unsound(plan, kept, paths, every=every, crashed=crashed)
            for tensor in lost:
                del kept.tensors[tensor]
            if lost:
                first = plan.tensors[lost[0]].name
                warnings.append(
                    f"{counted(len(lost), 'tensor')} of what was kept {'is' if len(lost) == 1 else 'are'} not as it was "
                    f"written, first {first}: computed again"
                )
            if lost or crashed:
                self._append(kept.baseline(number, lost, self._boot))
        return warnings

    def notes(self, number: int) -> Notes | None:
        """The notes of a plan; None, if the run cannot be resumed."""
        if self._identity is None:
            return None
        return Notes(self._plans[number], number, self.kept[number], self._append, self._boot, lambda: self.seconds)

    def worth(self, error: BaseException) -> bool:
        """Whether so much work would be lost by the error that the outputs are left to be resumed. Not, if they cannot
        be: inputs have changed, say.
        """
        return self._noted and self.seconds >= KEPT_S and not isinstance(error, (CheckpointError, UsageError))

    def _append(self, record: Round) -> None:
        assert self._journal is not None
        if not self._noted:
            self._journal.append(IDENTITY, self._identity)
            self._noted = True
        self._journal.append(ROUND, record)


def difference(journal: Journal, identity: Identity) -> str:
    """How the run that a journal is of differs from the one that `identity` is of; empty, if that is unknown."""
    before = journal.read(IDENTITY, Identity)
    return before[-1].difference(identity) if before else ""
