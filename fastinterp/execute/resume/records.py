"""What a run notes of finished tensors in the journal of its output, and the jobs that are made of it again."""

from __future__ import annotations

import binascii
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from msgspec.structs import astuple

from fastinterp.execute.jobs.densities import Density
from fastinterp.execute.jobs.job import Coefficients, Job, Stats
from fastinterp.execute.jobs.tensor_io import TensorStep
from fastinterp.execute.rounds import DeviceUsage
from fastinterp.ops.requests import Selected

_FIELDS = len(Stats.__struct_fields__)


class Effect(msgspec.Struct, frozen=True, array_like=True):
    """What the job of a tensor says of one output beside its statistics: see jobs/job.py."""

    reads: tuple[int, ...]
    copies: bool
    densities: dict[int, Density] = {}
    coefficients: Any = None


class Region(msgspec.Struct, frozen=True, array_like=True):
    """The checksum of a region of a file as far as it goes: see csrc/checksum.h.

    file    number of the file among all files of the plan's outputs
    region  number of the region
    sum     of the hashes of its cells
    hashed  a bit per cell
    """

    file: int
    region: int
    sum: int
    hashed: bytes


class Round(msgspec.Struct, frozen=True, omit_defaults=True):
    """The record of the kind `round`: what one round finished, and what all rounds did so far.

    plan      number of the plan in the run
    tensors   numbers of the tensors in the plan, which are finished
    stats     float64 of each tensor and output: the fields of Stats; little endian, in base64
    effects   of each tensor, one per output
    begun     tensors that are not finished, of which a later round needs what earlier ones measured; and the number of
              these rounds
    answers   to requests about the whole model, those that are new: see Rounds
    regions   the checksums so far, of regions in which the tensors lie
    read, written, scratch   bytes, as executors count them
    usage     of devices
    seconds   that the run took so far, those before it was resumed included
    boot      of the machine, as its system calls it: after another one, all that records before said was verified
    without   tensors that records before call finished, and that are not: their data was lost
    """

    plan: int
    tensors: tuple[int, ...] = ()
    stats: str = ""
    effects: tuple[tuple[Effect, ...], ...] = ()
    begun: tuple[tuple[int, int], ...] = ()
    answers: dict[str, tuple[Selected, ...]] = {}
    regions: tuple[Region, ...] = ()
    read: int = 0
    written: int = 0
    scratch: int = 0
    usage: DeviceUsage = DeviceUsage()
    seconds: float = 0.0
    boot: str = ""
    without: tuple[int, ...] = ()


def packed(stats: Iterable[Sequence[Stats]], outputs: int) -> str:
    """The statistics of tensors, each with its outputs, for Round.stats. Bytes that are copied have none: zeros."""
    none = (Stats(),) * outputs
    values = array("d", (value for tensor in stats for one in tensor or none for value in astuple(one)))
    if sys.byteorder == "big":
        values.byteswap()
    return binascii.b2a_base64(values.tobytes(), newline=False).decode()


def unpacked(text: str, outputs: int) -> list[tuple[Stats, ...]]:
    """The statistics of each tensor, one per output. Raises: ValueError."""
    values = array("d")
    values.frombytes(binascii.a2b_base64(text))
    if sys.byteorder == "big":
        values.byteswap()
    if len(values) % _FIELDS:
        raise ValueError("statistics are cut off")
    rows = [_stats(values[i : i + _FIELDS]) for i in range(0, len(values), _FIELDS)]
    return [tuple(rows[i : i + outputs]) for i in range(0, len(rows), outputs)]


def _stats(values: Sequence[float]) -> Stats:
    sampled, changed, pp, dd, od, *counts = values
    try:
        return Stats(int(sampled), int(changed), pp, dd, od, *map(int, counts))
    except OverflowError:
        raise ValueError("statistics count an infinite number of elements") from None


def effects_of(job: Job, outputs: int) -> tuple[Effect, ...]:
    """What a finished job says of its outputs."""
    return tuple(
        Effect(tuple(job.reads(k)), job.copies(k), dict(job.densities(k)), job.coefficients(k)) for k in range(outputs)
    )


class FinishedJob(Job):
    """The job of a tensor that an earlier process has finished: what it said of its outputs."""

    def __init__(self, stats: Sequence[Stats], effects: Sequence[Effect]):
        self._effects = effects
        self.stats, self.done = stats, True

    def steps(self) -> list[TensorStep]:
        return []

    def reads(self, k: int) -> tuple[int, ...]:
        return self._effects[k].reads

    def copies(self, k: int) -> bool:
        return self._effects[k].copies

    def densities(self, k: int) -> Mapping[int, Density]:
        return self._effects[k].densities

    def coefficients(self, k: int) -> Coefficients | None:
        found: Coefficients | None = self._effects[k].coefficients
        return found
