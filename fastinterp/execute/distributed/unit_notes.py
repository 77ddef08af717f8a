"""What a rank has finished of the files that it writes, noted beside them: who takes them over goes on from there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from fastinterp.checkpoint.journal_file import Begin, parsed_all
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.errors import CheckpointError
from fastinterp.execute.resume.kept import Kept, verified
from fastinterp.execute.resume.notes import Notes
from fastinterp.execute.resume.records import Round
from fastinterp.execute.resume.session import ROUND, about_lost
from fastinterp.messages import tell
from fastinterp.output.journal import Busy, begin, boot, take_over
from fastinterp.plan.plan import Plan


@contextmanager
def noted(
    plan: Plan, paths: Sequence[Path | None], place: Path, unit: Sequence[int], every: bool
) -> Iterator[Notes | None]:
    """Context manager: the notes of the files that one rank writes.

    paths  of all files of all outputs; None: others write it
    place  of the journal
    unit   indices of the files in each output: units depend on the number of ranks
    every  all that is kept is verified; else a sample
    None, if a process that is taken for dead has the journal: nothing is noted then.
    """
    start, system, merge = time.monotonic(), boot(), _text(unit)
    try:
        journal = take_over(place) or begin(place, merge)
    except Busy:
        yield None
        return
    try:
        if journal.begun.merge != merge:
            journal.begin(merge)
        kept = Kept.of(journal.read(ROUND, Round), plan)
        lost, record = verified(plan, 0, kept, paths, every=every, boot=system)
        if lost:
            tell(f"warning: {about_lost(plan, lost)}")
        if record is not None:
            journal.append(ROUND, record)
        before = kept.last.seconds if kept.last else 0.0
        yield Notes(
            plan, 0, kept, lambda round_: journal.append(ROUND, round_), system,
            lambda: before + time.monotonic() - start,
        )  # fmt: skip
        journal.remove()
    finally:
        journal.close()


def kept_bytes(plan: Plan, place: Path, unit: Sequence[int]) -> int:
    """Bytes of the tensors of a unit that are finished, as its journal says. Nothing is verified or locked."""
    try:
        records = [record for record, _ in parsed_all(read_regular(str(place)))]
        if not records or msgspec.json.decode(records[0].value, type=Begin).merge != _text(unit):
            return 0
        rounds = [msgspec.json.decode(r.value, type=Round) for r in records if r.kind == ROUND]
        return Kept.of(rounds, plan).nbytes(plan)
    except (CheckpointError, ValueError):
        return 0


def _text(unit: Sequence[int]) -> str:
    return " ".join(map(str, unit))
