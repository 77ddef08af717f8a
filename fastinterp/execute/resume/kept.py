"""What earlier processes of a run have finished of one plan, and which of it the files really hold."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from msgspec.structs import replace

from fastinterp.backends.cpu import CELL_BYTES, REGION_BYTES, FileChecksum
from fastinterp.execute.jobs.job import Job
from fastinterp.execute.resume.records import FinishedJob, Region, Round, unpacked
from fastinterp.execute.rounds import Answers
from fastinterp.output.layout import OutFile
from fastinterp.plan.plan import Plan

_SAMPLED = 16  # regions of one plan's outputs, of 64 MiB each, that are read where only a sample is verified
_CELLS = REGION_BYTES // CELL_BYTES  # of a region


@dataclass
class Kept:
    """The finished tensors of a plan.

    tensors  by number in the plan
    regions  (file, region) -> the checksum of what is finished in it
    last     the last record; None: nothing is finished
    answers  to requests about the whole model: see Rounds
    """

    tensors: dict[int, Job] = field(default_factory=dict)
    regions: dict[tuple[int, int], Region] = field(default_factory=dict)
    last: Round | None = None
    answers: Answers = field(default_factory=dict)

    @staticmethod
    def of(rounds: Iterable[Round], plan: Plan) -> Kept:
        """From the records of a plan. Raises: ValueError, if they are not those of it."""
        kept, outputs = Kept(), len(plan.recipes)
        for one in rounds:
            for number in one.without:
                kept.tensors.pop(number, None)
            every = zip(one.tensors, unpacked(one.stats, outputs), one.effects, strict=True)
            kept.tensors |= {number: FinishedJob(stats, effects) for number, stats, effects in every}
            kept.regions |= {(region.file, region.region): region for region in one.regions}
            kept.answers |= one.answers
            kept.last = one
        files = sum(len(layout.files) for layout in plan.layouts)
        numbers = {*kept.tensors, *(() if kept.last is None else (number for number, _ in kept.last.begun))}
        if not numbers <= {*range(len(plan.tensors))} or not {file for file, _ in kept.regions} <= {*range(files)}:
            raise ValueError("it names tensors or files that the output does not have")
        return kept

    def baseline(self, number: int, without: Sequence[int], boot: str) -> Round:
        """A record that nothing is finished but `tensors`, and that all of these were verified in this boot.

        number   of the plan
        without  tensors that were taken for finished
        """
        assert self.last is not None
        return replace(
            self.last, plan=number, tensors=(), stats="", effects=(), answers={}, regions=(), boot=boot,
            without=tuple(without),
        )  # fmt: skip

    def nbytes(self, plan: Plan) -> int:
        """Bytes of the finished tensors in all outputs."""
        return len(plan.recipes) * sum(plan.tensors[number].nbytes for number in self.tensors)


class Places:
    """Where the tensors of a plan lie in the files of its outputs, which are numbered through: those of the first
    output first.
    """

    def __init__(self, plan: Plan):
        self.files: list[OutFile] = [file for layout in plan.layouts for file in layout.files]
        self._plan = plan

    def of(self, number: int) -> list[tuple[int, int, int]]:
        """(file, begin, end) of each part of a tensor that is not empty, output by output. number: in the plan"""
        parts, first = [], 0
        for layout in self._plan.layouts:
            for name, dtype, shape in self._plan.tensors[number].entries:
                if nbytes := dtype.nbytes(math.prod(shape)) or 0:
                    file, begin = layout.place(name)
                    parts.append((first + file, begin, begin + nbytes))
            first += len(layout.files)
        return parts

    def regions(self, tensors: Iterable[int]) -> list[tuple[int, int]]:
        """The regions that these tensors touch, as (file, region), each once."""
        return list(dict.fromkeys(
            (file, region)
            for number in tensors
            for file, begin, end in self.of(number)
            for region in range(begin // REGION_BYTES, (end - 1) // REGION_BYTES + 1)
        ))  # fmt: skip


def verified(
    plan: Plan, number: int, kept: Kept, paths: Sequence[Path | None], *, every: bool, boot: str
) -> tuple[list[int], Round | None]:
    """Compare what is kept with its checksums, and leave in `kept` what matches.

    number  of the plan in its run
    paths   of all files of all outputs; None: a file that is not looked at
    every   all is read; else a sample, or all, if the machine stopped since it was written
    Returns the tensors that were lost, and the record to note, if there is one.
    """
    if kept.last is None:
        return [], None
    crashed = not boot or kept.last.boot != boot
    lost = unsound(plan, kept, paths, every=every or crashed)
    for tensor in lost:
        del kept.tensors[tensor]
    return lost, kept.baseline(number, lost, boot) if lost or crashed else None


def unsound(plan: Plan, kept: Kept, paths: Sequence[Path | None], *, every: bool) -> list[int]:
    """The tensors of `kept` that the files do not hold as they were written.

    paths    of all files of all outputs; None: a file that is not looked at
    every    all is read, and tensors count as unsound of which not every byte is under a checksum yet; else a sample is
             read, and all if that does not match
    """
    import random  # takes milliseconds: not on the path of a merge that begins

    places = Places(plan)
    regions = [region for region in kept.regions.values() if paths[region.file] is not None]
    some = regions if every or len(regions) <= _SAMPLED else random.sample(regions, _SAMPLED)
    bad = _mismatched(places, some, paths)
    if bad and len(some) < len(regions):
        bad = _mismatched(places, regions, paths)
    hashed = {at: int.from_bytes(region.hashed, "little") for at, region in kept.regions.items()} if every else None
    sizes = [_size(path) for path in paths]

    def sound(number: int) -> bool:
        parts = [part for part in places.of(number) if paths[part[0]] is not None]
        return (
            all(end <= sizes[file] for file, _, end in parts)
            and bad.isdisjoint(places.regions([number]))
            and (hashed is None or _under_checksum(parts, hashed))
        )

    return [number for number in kept.tensors if not sound(number)]


def _size(path: Path | None) -> int:
    try:
        return 0 if path is None else os.stat(path).st_size
    except OSError:
        return 0


def _mismatched(places: Places, regions: Sequence[Region], paths: Sequence[Path | None]) -> set[tuple[int, int]]:
    """Those regions, as (file, region), whose contents do not have their checksum."""
    from concurrent.futures import ThreadPoolExecutor

    def matches(region: Region) -> bool:
        file, path = places.files[region.file], paths[region.file]
        try:
            fd = os.open(path or "", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            checksum = FileChecksum(fd, len(file.header), file.size)
            checksum.restore(region.region, region.sum, region.hashed)
            return checksum.matches(region.region)
        except (OSError, ValueError):  # it ends before that
            return False
        finally:
            os.close(fd)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return {(r.file, r.region) for r, same in zip(regions, pool.map(matches, regions), strict=True) if not same}


def _under_checksum(parts: Iterable[tuple[int, int, int]], hashed: Mapping[tuple[int, int], int]) -> bool:
    """Whether all cells of these parts had been hashed when their round ended: not, where the neighbour was not written
    yet.
    """
    for file, begin, end in parts:
        start, stop = begin // CELL_BYTES, (end - 1) // CELL_BYTES + 1
        for region in range(start // _CELLS, (stop - 1) // _CELLS + 1):
            first, last = max(start, region * _CELLS), min(stop, (region + 1) * _CELLS)
            mask = ((1 << (last - first)) - 1) << (first - region * _CELLS)
            if hashed.get((file, region), 0) & mask != mask:
                return False
    return True
