"""One merge by several processes, perhaps on several machines that share a file system.

Each takes output files, the largest first, until none is left; rank 0 creates the folder, writes the files beside the
weights and renames the output into place. Every process plans the whole merge, from headers alone, so that they
exchange only which rank does what. The bytes are the same as those of one process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

import msgspec

from fastinterp.arguments import path_of, size_of
from fastinterp.backends.cpu import Progress
from fastinterp.backends.device import Device
from fastinterp.backends.registry import cpu_isa, cpu_threads
from fastinterp.checkpoint.names import names_file
from fastinterp.errors import RankError, UsageError
from fastinterp.execute.distributed.peers import Peers, Rank
from fastinterp.execute.distributed.unit_notes import kept_bytes, noted
from fastinterp.execute.jobs.densities import Density
from fastinterp.execute.reading import reading_device
from fastinterp.execute.report import OutputRecord, Report, RoundingEffect, kept_line, records_of, report_on
from fastinterp.execute.resume.identity import identity_of
from fastinterp.execute.rounds import DeviceUsage
from fastinterp.execute.run import Done, run
from fastinterp.execute.sinks import FileSinks
from fastinterp.execute.to_files import devices_for, write_card, write_receipts, write_small_files
from fastinterp.messages import counted, tell
from fastinterp.output.folder import OutFolder
from fastinterp.output.receipt import RECEIPT, SmallFile, WeightsFile
from fastinterp.output.several import commit_all
from fastinterp.output.shared_folder import (
    SharedFolder,
    journal_of_file,
    read_note,
    reserved,
    shared_file,
    stands,
    write_note,
)
from fastinterp.plan.plan import Plan, plan_recipe
from fastinterp.recipe.document import Source
from fastinterp.urls import is_url

_KEY = 12  # digits of the key of a merge
_POLL_S = 0.05  # between polls of what the other ranks have finished


@dataclass(frozen=True)
class Unit:
    """A unit of work, done by one rank: the files with these indices, in every output."""

    number: int
    files: tuple[int, ...]


def merge(
    recipe: Source,
    out: str | os.PathLike[str],
    me: Rank,
    *,
    max_shard_size: str | int | None = None,
    max_memory: str | int = "512MB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    missing: str | None = None,
    channels: str | None = None,
    quantize: str | None = None,
    private: bool = False,
    **settings: Any,
) -> Report | None:
    """This process's part of `fastinterp.merge`, whose arguments these are. The report on rank 0, else None."""
    target = path_of(out, "out")
    plan = plan_recipe(
        recipe, max_shard_size, dtype, rounding, seed, missing, channels, quantize, one_file=names_file(target),
        private=private,
    )  # fmt: skip
    if is_url(target) or plan.streamed:
        what = target if is_url(target) else plan.streamed[0]
        raise UsageError(
            f"{what} is an address, and processes of torchrun or srun share folders only. Run it in one process, or "
            "copy it first"
        )
    reports = carry_out(plan, [target], me, max_memory=size_of(max_memory), **settings)
    return reports[0] if reports else None


def carry_out(
    plan: Plan,
    outs: Sequence[str | os.PathLike[str]],
    me: Rank,
    *,
    device: str,
    threads: int | None,
    max_memory: int,
    force: bool,
    durable: bool,
    progress: Progress | None,
    verify_kept: bool = False,
    read: str = "auto",
) -> list[Report] | None:
    """This process's part of writing the outputs of a plan: all ranks call it with the same arguments.

    outs      a folder for each output, on a file system that all ranks see
    device    "cuda" is a different device for each process of a machine, as far as there are enough
    threads   number of threads of this process. None: its share of the machine's CPUs
    progress  called on rank 0, for all ranks together
    read      how inputs are read: see execute/reading.py

    Returns the reports on rank 0 and None on the others, when the outputs are in place. If it ends before that, what is
    finished is kept under temporary names, and the same merge resumes from it.
    Raises: what `write_outputs` does; RankError, if another rank failed, or cannot be reached.
    """
    start = time.perf_counter()
    cpu_isa()
    if threads is None:
        threads = max(1, cpu_threads() // me.local_world)
    devices, chosen = devices_for(reading_device(read, device), [plan], threads, max_memory, me.local)
    key, units, share = identity_of([plan]).key[:_KEY], _units(plan, me.world), None
    with Peers(me, "0") as peers, ExitStack() as stack:
        if me.rank == 0:
            folders, small = _open(plan, outs, key, stack, force=force, durable=durable)
            share = _share(plan, outs, units, key) if folders[0].resumed else None
            if share is not None:
                tell(kept_line(share))
            peers.put("key", key)
        elif (theirs := peers.await_("key", "open the output folder")) != key:
            raise RankError(
                f"rank {me.rank} plans another merge than rank 0: recipe, options, version, or the sizes or times of "
                f"the models' files differ between the two ({key} and {theirs}). All ranks must see the same files"
            )
        work = _RankWork(
            plan, outs, key, peers, threads=threads, max_memory=max_memory, progress=progress, devices=devices,
            or_cpu=bool(chosen), verify_kept=verify_kept, read=read,
        )  # fmt: skip
        records = work.run(units)
        if me.rank != 0:
            peers.await_("finished", "finish the output")
            return None
        plan.refuse_changed_files()
        for k, folder in enumerate(folders):
            small[k] |= write_card(folder, plan, k, _together(plan, records, k), small[k])
        weights = [_weights(records, k) for k in range(len(folders))]
        sums = [_together(plan, records, k).coefficients for k in range(len(folders))]
        write_receipts(plan, folders, weights, small, sums)
        commit_all(folders)
        peers.put("finished", "")
    wall = time.perf_counter() - start
    if progress is not None:
        total = plan.bytes_read + plan.bytes_made + plan.bytes_written
        progress(total, total)
    return [
        replace(report, chosen=chosen, resumed=share) for report in _reports(plan, records, folders, wall, me.world)
    ]


def _open(
    plan: Plan, outs: Sequence[str | os.PathLike[str]], key: str, stack: ExitStack, *, force: bool, durable: bool
) -> tuple[list[OutFolder], list[dict[str, SmallFile]]]:
    # The first checks for all, and takes off what it has itself.
    needed = max(0, plan.disk_bytes - sum(reserved(out, key) for out in outs[1:]))
    folders: list[OutFolder] = []
    small = []
    for k, (out, layout) in enumerate(zip(outs, plan.layouts, strict=True)):
        names = [*(file.name for file in layout.files), *plan.files.copied, RECEIPT]
        folder = SharedFolder(out, plan.inputs, key, force=force, durable=durable, needed=needed, names=names)
        folders.append(stack.enter_context(folder))
        needed = 0
        small.append(write_small_files(folder, plan, k))
        for file in layout.files:
            folder.temp(file.name)
    return folders, small


def _units(plan: Plan, world: int) -> list[Unit]:
    """A unit per file, the largest first; one unit per rank where a method makes requests about the whole model, since
    every unit answers them anew."""
    files = plan.layouts[0].files
    order = sorted(range(len(files)), key=lambda f: -files[f].size)
    if not any(t.program is not None and t.program.whole for t in plan.tensors):
        return [Unit(i, (f,)) for i, f in enumerate(order)]
    shares: list[list[int]] = [[] for _ in range(min(world, len(files)))]
    for f in order:
        min(shares, key=lambda share: sum(files[i].size for i in share)).append(f)
    return [Unit(i, tuple(share)) for i, share in enumerate(shares)]


def _name(plan: Plan, unit: Unit) -> str:
    """The name of the file beside which the notes of a unit are: its last file."""
    return plan.layouts[0].files[unit.files[-1]].name


def _share(plan: Plan, outs: Sequence[str | os.PathLike[str]], units: Sequence[Unit], key: str) -> float:
    """How much of the bytes of all outputs is finished already."""
    finished = 0
    for unit in units:
        note = read_note(outs[0], _name(plan, unit), key)
        if _parsed(unit, None if note is None else note.decode()) is None:
            finished += kept_bytes(plan, journal_of_file(outs[0], _name(plan, unit), key), unit.files)
        else:
            finished += sum(
                f.size - len(f.header) for layout in plan.layouts for f in map(layout.files.__getitem__, unit.files)
            )
    return min(1.0, finished / max(1, plan.bytes_written))


class _RankWork:
    """Claims and runs the units of one rank, and collects the records of all."""

    def __init__(
        self, plan: Plan, outs: Sequence[str | os.PathLike[str]], key: str, peers: Peers, *, threads: int,
        max_memory: int, progress: Progress | None, devices: Sequence[Device], or_cpu: bool, verify_kept: bool,
        read: str,
    ):  # fmt: skip
        self._plan, self._outs, self._key, self._peers = plan, outs, key, peers
        self._threads, self._max_memory, self._progress = threads, max_memory, progress
        self._devices, self._or_cpu, self._verify_kept, self._read = devices, or_cpu, verify_kept, read
        self._total = plan.bytes_read + plan.bytes_made + plan.bytes_written

    def run(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """Run units until all ranks together have done all of them. Returns the records of all units, in order."""
        records: dict[int, dict[str, Any]] = {}
        while len(records) < len(units):
            before = len(records)
            for unit in units:
                if unit.number in records:
                    continue
                self._peers.refuse_failed()
                record = self._finished(unit)
                if record is None and self._peers.takes(unit.number):
                    # Checked again: rank 0 announces the end before it finishes the folder and deletes the journals.
                    record = self._finished(unit) or self._merge(unit)
                if record is not None:
                    records[unit.number] = record
            self._report(0)
            if len(records) == before:
                time.sleep(_POLL_S)
        return [records[i] for i in sorted(records)]

    def _finished(self, unit: Unit) -> dict[str, Any] | None:
        """The record of a finished unit, or None. From the store first: a network file system may show files late."""
        record = _parsed(unit, self._peers.get(f"done/{unit.number}"))
        if record is None and self._complete(unit):
            journal = read_note(self._outs[0], _name(self._plan, unit), self._key)
            record = _parsed(unit, None if journal is None else journal.decode())
            if record is not None:
                self._peers.put(f"done/{unit.number}", json.dumps(record))
        return record

    def _complete(self, unit: Unit) -> bool:
        """Whether the unit's files exist with their final size: a journal may outlive its file."""
        return all(
            stands(out, layout.files[f].name, self._key, layout.files[f].size)
            for out, layout in zip(self._outs, self._plan.layouts, strict=True)
            for f in unit.files
        )

    def _merge(self, unit: Unit) -> dict[str, Any]:
        plan = self._plan
        paths = [
            [shared_file(out, file.name, self._key) if f in unit.files else None for f, file in enumerate(layout.files)]
            for out, layout in zip(self._outs, plan.layouts, strict=True)
        ]
        before = self._peers.bytes_done
        flat = [path for of_output in paths for path in of_output]
        place = journal_of_file(self._outs[0], _name(plan, unit), self._key)
        with noted(plan, flat, place, unit.files, self._verify_kept) as notes:
            done = run(
                plan, FileSinks(plan, paths, synced=True), threads=self._threads, max_memory=self._max_memory,
                progress=lambda of_unit, _: self._report(before + of_unit - self._peers.bytes_done),
                devices=self._devices, or_cpu=self._or_cpu, notes=notes, read=self._read,
            )  # fmt: skip
            self._peers.bytes_done = before + done.bytes_read + done.bytes_written
            record = {"files": list(unit.files), **_record(plan, done)}
            text = json.dumps(record)
            pairs = zip(self._outs[::-1], plan.layouts[::-1], strict=True)
            for out, layout in pairs:  # the first output's notes last
                for f in unit.files:
                    write_note(out, layout.files[f].name, self._key, text.encode())
        self._peers.put(f"done/{unit.number}", text)
        return record

    def _report(self, more: int) -> None:
        self._peers.bytes_done += more
        if self._progress is not None and self._peers.me.rank == 0:
            done = self._peers.bytes_of_all()
            self._progress(min(done, self._total), self._total)


# ---- records --------------------------------------------------------------------------------------------------------


def _parsed(unit: Unit, text: str | None) -> dict[str, Any] | None:
    """The record of this unit from its JSON. None, if it is of other files: units depend on the number of ranks."""
    record: dict[str, Any] | None = None if text is None else json.loads(text)
    return record if record is not None and record["files"] == list(unit.files) else None


def _record(plan: Plan, done: Done) -> dict[str, Any]:
    """The record of a unit, as plain values: counters, devices, and the records of its outputs."""
    records = records_of(plan, done.jobs)
    return {
        "bytes_read": done.bytes_read, "bytes_written": done.bytes_written, "threads": done.threads, "isa": done.isa,
        "scratch_bytes": done.scratch_bytes, "usage": asdict(done.usage),
        "outputs": [
            {
                "effects": {name: astuple(effect) for name, effect in record.effects.items()},
                "copied": record.copied,
                "models": sorted(record.models),
                "densities": {
                    model: {tensor: astuple(density) for tensor, density in by_tensor.items()}
                    for model, by_tensor in record.densities.items()
                },
                "coefficients": record.coefficients,
                "weights": {name: msgspec.to_builtins(file) for name, file in files.items()},
            }
            for record, files in zip(records, done.files, strict=True)
        ],
    }  # fmt: skip


def _weights(records: Sequence[dict[str, Any]], k: int) -> dict[str, WeightsFile]:
    """What the receipt of output k says of its files, over all units."""
    files = {name: file for record in records for name, file in record["outputs"][k]["weights"].items()}
    return msgspec.convert(files, dict[str, WeightsFile])


def _together(plan: Plan, records: Sequence[dict[str, Any]], k: int) -> OutputRecord:
    """The record of output k over all units, in the order of the plan's tensors."""
    record = OutputRecord()
    order = {t.name: i for i, t in enumerate(plan.tensors)}

    def ordered(items: dict[str, Any], make: Callable[..., Any]) -> dict[str, Any]:
        return {name: make(*items[name]) for name in sorted(items, key=order.__getitem__)}

    outputs = [record["outputs"][k] for record in records]
    record.effects = ordered({n: e for o in outputs for n, e in o["effects"].items()}, RoundingEffect)
    record.copied = sorted((n for o in outputs for n in o["copied"]), key=order.__getitem__)
    record.models = {m for o in outputs for m in o["models"]}
    sums = {n: c for o in outputs for n, c in o["coefficients"].items()}
    record.coefficients = {name: sums[name] for name in sorted(sums, key=order.__getitem__)}
    for model in dict.fromkeys(m for o in outputs for m in o["densities"]):
        record.densities[model] = ordered(
            {t: d for o in outputs for t, d in o["densities"].get(model, {}).items()}, Density
        )
    return record


def _reports(
    plan: Plan, records: Sequence[dict[str, Any]], folders: Sequence[OutFolder], wall: float, world: int
) -> list[Report]:
    usage = DeviceUsage.together([DeviceUsage(**n["usage"]) for n in records])
    done = Done(
        {}, sum(n["bytes_read"] for n in records), sum(n["bytes_written"] for n in records), records[0]["threads"],
        records[0]["isa"], max(n["scratch_bytes"] for n in records), usage,
    )  # fmt: skip
    reports = [report_on(plan, done, wall, k, _together(plan, records, k), folder) for k, folder in enumerate(folders)]
    files = len(plan.layouts[0].files)
    idle = (
        f"only {counted(files, 'output file')} for {world} ranks: each file is written by one rank, so that "
        f"{world - files} had no work. --max-shard-size makes smaller ones"
    )
    more = [idle] if files < world else []
    return [
        replace(report, device=f"{report.device}, {world} ranks", remarks=(*report.remarks, *more))
        for report in reports
    ]
