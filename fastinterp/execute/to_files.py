"""Runs plans into output folders: files are reserved, written under temporary names, and renamed at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastinterp.backends.cpu import Progress
from fastinterp.backends.registry import cpu_isa, cpu_threads, device_spec, find_devices, maybe_devices
from fastinterp.errors import BackendError, OutputError
from fastinterp.execute.kept import acting_lines, asked_of, kept
from fastinterp.execute.report import OutputRecord, Report, RoundingEffect, record_of, report_of
from fastinterp.execute.run import Done, run
from fastinterp.execute.sinks import FileSinks
from fastinterp.output.folder import OutFolder
from fastinterp.output.model_card import CARD
from fastinterp.plan.plan import Plan
from fastinterp.recipe.load import Recipe

if TYPE_CHECKING:
    from fastinterp.backends.device import Device

EditFiles = Callable[[Recipe, dict[str, bytes | Path]], None]  # changes the small files of an output, by name


def write_outputs(
    plans: Sequence[Plan],
    outs: Sequence[Sequence[str | os.PathLike[str]]],
    *,
    device: str,
    threads: int | None,
    max_memory: int,
    force: bool,
    durable: bool,
    progress: Progress | None,
    edit_files: EditFiles | None = None,
) -> list[Report]:
    """Write the outputs of several plans. All of them are renamed into place at the end, one after the other.

    outs        a folder, or a file (`x.safetensors`), for each output of each plan
    edit_files  what is called with the small files of each output, contents or files to copy, before they are written
    Raises: what `merge` does; OutputError names the outputs that were finished before it.
    """
    start = time.perf_counter()
    cpu_isa()  # an unusable FASTINTERP_ISA shows before a folder is made
    devices, chosen = devices_for(device, plans, threads, max_memory)
    every: list[Done] = []
    with ExitStack() as stack:
        folders, small = _opened_folders(plans, outs, stack, edit_files, force=force, durable=durable)
        total = sum(plan.bytes_read + plan.bytes_written for plan in plans)
        for plan, of_plan in zip(plans, folders, strict=True):
            pairs = zip(of_plan, plan.layouts, strict=True)
            sinks = FileSinks(plan, [[folder.temp(file.name) for file in layout.files] for folder, layout in pairs])
            before = sum(d.bytes_read + d.bytes_written for d in every)
            shown = progress if len(plans) == 1 else _part(progress, before, total)
            every.append(run(plan, sinks, threads=threads, max_memory=max_memory, progress=shown, devices=devices))
        for plan in plans:
            plan.refuse_changed_files()
        for plan, done, of_plan, of_files in zip(plans, every, folders, small, strict=True):
            for k, folder in enumerate(of_plan):
                if CARD in of_files[k]:
                    write_card(folder, plan, k, record_of(plan, done.jobs, k))
        finish([folder for of_plan in folders for folder in of_plan])
    wall = time.perf_counter() - start
    read, written = sum(d.bytes_read for d in every), sum(d.bytes_written for d in every)
    reports = []
    for plan, done, of_plan in zip(plans, every, folders, strict=True):
        whole = replace(done, bytes_read=read, bytes_written=written)
        of_outputs = [report_of(plan, whole, wall, k, folder) for k, folder in enumerate(of_plan)]
        reports += [replace(report, outputs=sum(map(len, outs)), chosen=chosen) for report in of_outputs]
    return reports


def devices_for(
    device: str, plans: Sequence[Plan], threads: int | None, max_memory: int, local: int = 0
) -> tuple[Sequence[Device], str]:
    """The accelerators that `--device` stands for, none for the CPU; and the reason for the choice of `auto`.

    local  index of this process among those of this machine, which share its accelerators
    """
    spec = device_spec(device)
    if spec.kind != "auto":
        return find_devices(spec, local), ""
    if not maybe_devices():
        return (), ""
    from fastinterp.execute.device_choice import choose

    choice = choose(plans, cpu_threads(threads), max_memory)
    if choice.device == "cpu":
        return (), choice.why
    try:
        return find_devices(device_spec(choice.device), local), choice.why
    except BackendError as error:
        return (), f"{choice.why}; but {error}"


def _opened_folders(
    plans: Sequence[Plan],
    outs: Sequence[Sequence[str | os.PathLike[str]]],
    stack: ExitStack,
    edit_files: EditFiles | None,
    **how: bool,
) -> tuple[list[list[OutFolder]], list[list[set[str]]]]:
    """The output folders of all plans, with their small files written, all or none; and the names of these files."""
    needed = sum(plan.disk_bytes for plan in plans)  # outputs on one disk must fit together: the first checks for all
    folders: list[list[OutFolder]] = []
    small: list[list[set[str]]] = []
    for plan, of_plan in zip(plans, outs, strict=True):
        folders.append([])
        for out, layout in zip(of_plan, plan.layouts, strict=True):
            names = [*(file.name for file in layout.files), *plan.files.copied]
            folder = OutFolder(out, plan.inputs, needed=needed or layout.disk_bytes, names=names, **how)
            folders[-1].append(stack.enter_context(folder))
            needed = 0
        small.append([write_small_files(folder, plan, k, edit_files) for k, folder in enumerate(folders[-1])])
    return folders, small


def finish(folders: Sequence[OutFolder]) -> None:
    """Rename all outputs to their final names, one folder after the other."""
    for i, folder in enumerate(folders):
        try:
            folder.commit()
        except OutputError as error:
            finished = ", ".join(f.name for f in folders[:i])
            raise OutputError(f"{error}; finished before that: {finished}" if finished else str(error)) from error


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress callback of one of several runs. before: bytes of the runs before it."""
    if progress is None:
        return None
    return lambda done, of_run: progress(before + done, max(total, before + of_run))


def write_small_files(folder: OutFolder, plan: Plan, k: int, edit_files: EditFiles | None = None) -> set[str]:
    """Write everything beside the weights of output k: copied files, the model card, indexes. Nothing, if the output is
    one file. Returns the names of what was written.
    """
    files = {} if folder.file else plan.small_files(k)
    if edit_files is not None and files:
        edit_files(plan.recipes[k], files)
    for name, content in files.items():
        folder.write(name, content)
    return set(files)


def write_card(folder: OutFolder, plan: Plan, k: int, record: OutputRecord) -> None:
    """Write the model card of output k anew, with how much of the change rounding kept."""
    total = RoundingEffect.total(record.effects.values())
    if total.strength is not None:
        asked = {} if plan.above else asked_of(plan.recipes[k])
        how_much = f"{kept(total.strength, total.sampled < total.numel)}: effective strength {total.strength:.3g}"
        folder.write(CARD, plan.card(k, [how_much, *acting_lines(asked, total.strength)]))
