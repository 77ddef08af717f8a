"""Runs plans into output folders: files are reserved, written under temporary names, and renamed at the end."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp.backends.cpu import Progress
from fastinterp.backends.registry import cpu_isa, cpu_threads, device_spec, find_devices, maybe_devices
from fastinterp.checkpoint.regular_file import pieces_of
from fastinterp.errors import BackendError, FastinterpError, UsageError
from fastinterp.execute.checksums import receipt_content, small_file
from fastinterp.execute.input_files import input_files
from fastinterp.execute.kept import acting_lines, asked_of, kept
from fastinterp.execute.reading import reading_device
from fastinterp.execute.report import OutputRecord, Report, RoundingEffect, records_of, report_on
from fastinterp.execute.resume.identity import Identity, identity_of
from fastinterp.execute.resume.session import Session, difference
from fastinterp.execute.run import Done, run, window_beside
from fastinterp.execute.sinks import FileSinks
from fastinterp.output.earlier import Earlier, earlier, held
from fastinterp.output.folder import OutFolder
from fastinterp.output.layout import Layout
from fastinterp.output.model_card import CARD
from fastinterp.output.receipt import RECEIPT, SmallFile, WeightsFile
from fastinterp.output.several import commit_all
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
    verify_kept: bool = False,
    read: str = "auto",
) -> list[Report]:
    """Write the outputs of several plans. All of them are renamed into place at the end, one after the other.

    outs         a folder, or a file (`x.safetensors`), for each output of each plan
    edit_files   what is called with the small files of each output, contents or files to copy, before they are written
    verify_kept  where a run is resumed: compare all that it had written with its checksums, not a sample
    read         how inputs are read: see execute/reading.py
    Raises: what `merge` does; OutputError names the outputs that were finished before it. If much work was done, it is
    left to be resumed, and the exception has an attribute `outcome`, which says so.
    """
    start = time.perf_counter()
    cpu_isa()  # an unusable FASTINTERP_ISA shows before a folder is made
    device = reading_device(read, device, (name for plan in plans for name in plan.streamed))
    devices, chosen = devices_for(device, plans, threads, max_memory)
    or_cpu = bool(chosen)
    with ExitStack() as stack:
        folders, session = _opened_folders(plans, outs, stack, identity_of(plans), force=force, durable=durable)
        try:
            if all(folder.finished for of_plan in folders for folder in of_plan):
                session.tell()
                every = session.dones(cpu_isa(), cpu_threads(threads))
                records = [records_of(plan, done.jobs) for plan, done in zip(plans, every, strict=True)]
            else:
                work = partial(run, threads=threads, max_memory=max_memory, devices=devices, or_cpu=or_cpu, read=read)
                synced = durable or force
                every, records = _written(plans, folders, session, work, progress, edit_files, verify_kept, synced)
        except BaseException as error:
            session.leave([folder for of_plan in folders for folder in of_plan], error)
            raise
    wall = session.before + time.perf_counter() - start
    bytes_read, written = sum(d.bytes_read for d in every), sum(d.bytes_written for d in every)
    reports = []
    try:
        for plan, done, recorded, of_plan in zip(plans, every, records, folders, strict=True):
            whole = replace(done, bytes_read=bytes_read, bytes_written=written)
            pairs = zip(recorded, of_plan, strict=True)
            reports += [report_on(plan, whole, wall, k, record, folder) for k, (record, folder) in enumerate(pairs)]
    except FastinterpError as error:  # it looks at configurations of the inputs once more
        error.outcome = "the output is complete, but its report is not"  # type: ignore[attr-defined]
        raise
    return [
        replace(
            report, outputs=sum(map(len, outs)), chosen=chosen, resumed=session.share,
            warnings=(*report.warnings, *session.warnings),
        )
        for report in reports
    ]  # fmt: skip


def _written(
    plans: Sequence[Plan],
    folders: Sequence[Sequence[OutFolder]],
    session: Session,
    work: Callable[..., Done],
    progress: Progress | None,
    edit_files: EditFiles | None,
    verify_kept: bool,
    synced: bool,
) -> tuple[list[Done], list[list[OutputRecord]]]:
    """Write the outputs, except for what is finished already, and put them in place. synced: they are before that.

    Returns what was done, and what was recorded about each output, of every plan.
    """
    flat = [folder for of_plan in folders for folder in of_plan]
    if any(folder.finished for folder in flat):  # others are gone
        session.forget()
        for folder in (folder for folder in flat if folder.finished):
            folder.anew()
    small = [
        [write_small_files(folder, plan, k, edit_files) for k, folder in enumerate(of_plan)]
        for plan, of_plan in zip(plans, folders, strict=True)
    ]
    files = [
        [[folder.temp(f.name) for f in layout.files] for folder, layout in zip(of_plan, plan.layouts, strict=True)]
        for plan, of_plan in zip(plans, folders, strict=True)
    ]
    session.verify([[path for of_output in of_plan for path in of_output] for of_plan in files], verify_kept)
    session.tell()
    every: list[Done] = []
    total = sum(plan.bytes_read + plan.bytes_written for plan in plans)
    for number, (plan, of_plan) in enumerate(zip(plans, files, strict=True)):
        before = sum(d.bytes_read + d.bytes_written for d in every)
        shown = progress if len(plans) == 1 else _part(progress, before, total)
        every.append(work(plan, FileSinks(plan, of_plan, synced=synced), progress=shown, notes=session.notes(number)))
    for plan in plans:
        plan.refuse_changed_files()
    records = [records_of(plan, done.jobs) for plan, done in zip(plans, every, strict=True)]
    for plan, done, recorded, of_outputs, of_files in zip(plans, every, records, folders, small, strict=True):
        for k, folder in enumerate(of_outputs):
            of_files[k] |= write_card(folder, plan, k, recorded[k], of_files[k])
        write_receipts(plan, of_outputs, done.files, of_files, [record.coefficients for record in recorded])
    commit_all([*flat[1:], flat[0]])  # the first has the notes about all of them
    return every, records


def devices_for(
    device: str, plans: Sequence[Plan], threads: int | None, max_memory: int, local: int = 0
) -> tuple[Sequence[Device], str]:
    """The accelerators that `--device` stands for, none for the CPU; and the reason for the choice of `auto`, empty for
    all others. What `auto` chooses may fail where the CPU would not: then the CPU does it.

    local  index of this process among those of this machine, which share its accelerators
    """
    spec = device_spec(device)
    streamed = next((name for plan in plans for name in plan.streamed), None)
    if streamed is not None and spec.kind == "auto":
        return (), ""
    if spec.kind != "auto":
        return find_devices(spec, local), ""
    if not maybe_devices():
        return (), ""
    from fastinterp.execute.device_choice import choose

    choice = choose(plans, cpu_threads(threads), max_memory)
    if choice.device == "cpu":
        return (), choice.why
    try:
        found = find_devices(device_spec(choice.device), local)
        for plan in plans:
            window_beside(plan, found, threads, max_memory)
    except (BackendError, UsageError) as error:
        return (), f"{choice.why}; but {error}"
    return found, choice.why


def _opened_folders(
    plans: Sequence[Plan],
    outs: Sequence[Sequence[str | os.PathLike[str]]],
    stack: ExitStack,
    identity: Identity,
    *,
    force: bool,
    durable: bool,
) -> tuple[list[list[OutFolder]], Session]:
    """The output folders of all plans, all or none; and what is finished of them."""
    merge = identity.key if identity.sure else ""
    before = earlier([out for of_plan in outs for out in of_plan], merge) if merge else Earlier.NONE
    every = [
        (out, _names(plan, layout))
        for plan, of_plan in zip(plans, outs, strict=True)
        for out, layout in zip(of_plan, plan.layouts, strict=True)
    ]
    # Outputs on one disk must fit together: the first checks for all, and takes off what it has itself.
    needed = max(0, sum(plan.disk_bytes for plan in plans) - (held(every[1:], merge) if merge else 0))
    folders: list[list[OutFolder]] = []
    try:
        for plan, of_plan in zip(plans, outs, strict=True):
            folders.append([])
            for out, layout in zip(of_plan, plan.layouts, strict=True):
                folder = OutFolder(
                    out, plan.inputs, force=force, durable=durable, needed=needed or layout.disk_bytes,
                    names=_names(plan, layout), merge=merge, differs=partial(difference, identity), earlier=before,
                )  # fmt: skip
                folders[-1].append(stack.enter_context(folder))
                needed = 0
        return folders, Session(plans, folders[0][0], identity)
    except BaseException:
        for folder in (folder for of_plan in folders for folder in of_plan if folder.resumed):
            folder.leave()
        raise


def _names(plan: Plan, layout: Layout) -> list[str]:
    """The files of an output that are known before it is written."""
    return [*(file.name for file in layout.files), *plan.files.copied, RECEIPT]


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """The progress callback of one of several runs. before: bytes of the runs before it."""
    if progress is None:
        return None
    return lambda done, of_run: progress(before + done, max(total, before + of_run))


def write_small_files(
    folder: OutFolder, plan: Plan, k: int, edit_files: EditFiles | None = None
) -> dict[str, SmallFile]:
    """Write everything beside the weights of output k: copied files, the model card, indexes. Nothing, if the output is
    one file. Returns what the receipt says of them.
    """
    files = {} if folder.file else plan.small_files(k)
    if edit_files is not None and files:
        edit_files(plan.recipes[k], files)
    small = {}
    for name, content in files.items():
        folder.write(name, content)
        small[name] = small_file(pieces_of(str(folder.temp(name))) if isinstance(content, Path) else (content,))
    return small


def write_receipts(
    plan: Plan,
    folders: Sequence[OutFolder],
    weights: Sequence[Mapping[str, WeightsFile]],
    small: Sequence[Mapping[str, SmallFile]],
    coefficients: Sequence[Mapping[str, Any]],
) -> None:
    """Write the receipt into every output that is a folder.

    coefficients  those of each that came from the data
    """
    if all(folder.file for folder in folders):
        return
    inputs = input_files(plan)
    for k, folder in enumerate(folders):
        if not folder.file:
            folder.write(RECEIPT, receipt_content(plan, k, weights[k], small[k], inputs, coefficients[k]))


def write_card(
    folder: OutFolder, plan: Plan, k: int, record: OutputRecord, small: Mapping[str, SmallFile]
) -> dict[str, SmallFile]:
    """Write the model card of output k anew, with how much of the change rounding kept. Returns what the receipt says
    of it: nothing, if there is no card, or no change.

    small  the files beside the weights
    """
    total = RoundingEffect.total(record.effects.values())
    if total.strength is None or CARD not in small:
        return {}
    asked = {} if plan.above else asked_of(plan.recipes[k], plan.shown.model)
    how_much = f"{kept(total.strength, total.sampled < total.numel)}: effective strength {total.strength:.3g}"
    content = plan.card(k, [how_much, *acting_lines(asked, total.strength)])
    folder.write(CARD, content)
    return {CARD: small_file([content])}
