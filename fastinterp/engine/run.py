"""merge, interpolate and explain: from what the user asks for to files on disk and a report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinterp._version import __version__
from fastinterp.compute.backends import check_device, cpu_isa
from fastinterp.compute.ops import MAX_OUTPUTS, MAX_POINTS
from fastinterp.compute.pump import Progress
from fastinterp.engine.arguments import numbers, overridden, path_of, size_of
from fastinterp.engine.plan import Plan, make_plan
from fastinterp.engine.report import Effect, Findings, Report, warnings_of
from fastinterp.engine.schedule import Done, run
from fastinterp.engine.sinks import FileSinks
from fastinterp.errors import OutputError, UsageError
from fastinterp.files.folder import OutFolder
from fastinterp.files.sidecars import copy_sidecars, model_card
from fastinterp.recipe.load import Recipe, load_recipe, load_recipes, same_model

if TYPE_CHECKING:
    from fastinterp.engine.jobs import Job

_LARGEST_ALPHA = 4e7  # without a base; the weights 1 - alpha and alpha are divided by their sum
Source = str | os.PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]]


def merge(
    recipe: Source,
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    threads: int | None = None,
    max_shard_size: str | int = "5GB",
    max_memory: str | int = "512MB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Merge checkpoints into the folder `out`.

    recipe          path of a YAML file, YAML text, or a mapping: mergekit's schema. Of several documents (or of a list
                    of mappings) the last is written; it may name those before it as models
    device          "auto" or "cpu"
    threads         None: one per CPU, at most 32. The output does not depend on it
    max_shard_size  bytes of tensor data in one file, "5GB" or a number
    max_memory      bound of the workers' scratch memory
    dtype, rounding, seed   take the place of what the recipe says (dtype: of its out_dtype)
    force           replace a checkpoint in `out`; inputs are refused all the same
    durable         fsync before the finish: the output survives a crash of the machine
    progress        called about ten times a second with bytes done and bytes to do

    The output appears when all of it is written, or not at all.
    Raises: RecipeError, CheckpointError, ShapeError, OutputError, StorageError, BackendError, UsageError.
    """
    plan = plan_of(recipe, max_shard_size, dtype, rounding, seed)
    return carry_out(
        [plan], [[path_of(out, "out")]], device=device, threads=threads, max_memory=size_of(max_memory), force=force,
        durable=durable, progress=progress,
    )[0]  # fmt: skip


def interpolate(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    alphas: float | Sequence[float],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    integers: str | os.PathLike[str] | None = None,
    device: str = "auto",
    threads: int | None = None,
    max_shard_size: str | int = "5GB",
    max_memory: str | int = "512MB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    force: bool = False,
    durable: bool = False,
    progress: Progress | None = None,
) -> list[Report]:
    """Walk the line from checkpoint `a` (alpha 0) to `b` (alpha 1), and beyond: out = a + alpha * (b - a).

    alphas   any finite numbers, at most 4096. One: `out` is the output. Several: `out/alpha_0.3` and so on, of one read
             for each 256. What a sum of steps makes of 0 and 1 is 0 and 1
    base     the task-vector form: out = base + (1 - alpha) * (a - base) + alpha * (b - base)
    integers the one of them whose integer tensors are taken; None: they must agree

    Alpha 0 and 1 give the bytes of `a` and `b`. The other arguments and errors are those of `merge`.
    """
    points = numbers(alphas)
    if not points:
        raise UsageError("at least one alpha is needed")
    if len(points) > MAX_POINTS:
        raise UsageError(f"at most {MAX_POINTS} alphas are made at once, got {len(points)}")
    names = [point_name(p) for p in points]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UsageError(f"every alpha may be given once, but {twice} comes twice")
    ends = path_of(a, "a"), path_of(b, "b")
    origin = None if base is None else path_of(base, "base")
    whose = None if integers is None else path_of(integers, "integers")
    recipes = [overridden(point_recipe(*ends, p, origin, whose), dtype, rounding, seed) for p in points]
    groups = [slice(i, i + MAX_OUTPUTS) for i in range(0, len(points), MAX_OUTPUTS)]
    plans = [make_plan(recipes[group], max_shard_size=size_of(max_shard_size)) for group in groups]
    target = path_of(out, "out")
    if not target:
        raise UsageError("the name of the output folder is empty. Give the name of a new folder")
    outs = [Path(target)] if len(points) == 1 else [Path(target) / name for name in names]
    return carry_out(
        plans, [outs[group] for group in groups], device=device, threads=threads, max_memory=size_of(max_memory),
        force=force, durable=durable, progress=progress,
    )  # fmt: skip


def explain(
    recipe: Source,
    *,
    max_shard_size: str | int = "5GB",
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
) -> Plan:
    """What `merge` would do, from headers alone; print() shows it. Arguments and errors as there."""
    from fastinterp.engine.explain import Explained

    return Explained(**vars(plan_of(recipe, max_shard_size, dtype, rounding, seed)))


def point_name(alpha: float) -> str:
    """The folder of one point on a path: `alpha_0.3`, `alpha_-0.5`."""
    return f"alpha_{float(alpha):.10g}"


def point_recipe(a: str, b: str, alpha: float, base: str | None, integers: str | None = None) -> Recipe:
    """The recipe of one point on the line from `a` to `b`. The other arguments are those of `interpolate`."""
    return load_recipe(point_mapping(a, b, alpha, base, integers))


def point_mapping(a: str, b: str, alpha: float, base: str | None, integers: str | None = None) -> dict[str, Any]:
    """The same, as a recipe has it."""
    if not math.isfinite(alpha):
        raise UsageError(f"alpha must be a finite number, got {alpha}")
    # Far out 1 - alpha and alpha cancel, or float32 cannot hold them.
    limit = _LARGEST_ALPHA if base is None else 3.4e38
    if max(abs(alpha), abs(1.0 - alpha)) > limit:
        raise UsageError(f"alpha must be in -{limit:.1e}..{limit:.1e}, got {alpha:g}")
    if same_model(a, b):
        raise UsageError(f"A and B are the same checkpoint: {a!r}. Name two")
    if integers is not None and not any(same_model(integers, m) for m in (a, b, base or a)):
        raise UsageError(f"`integers` must be one of the checkpoints that are read, got {integers!r}")
    models = [
        {"model": a, "parameters": {"weight": 1.0 - alpha}},
        {"model": b, "parameters": {"weight": float(alpha)}},
    ]
    asked: dict[str, Any] = {"merge_method": "linear"}
    if base is not None:
        asked = {"merge_method": "task_arithmetic", "base_model": base}
    asked["models"] = models
    if integers is not None:
        asked["integers"] = integers
    return asked


def plan_of(recipe: Source, max_shard_size: str | int, dtype: object, rounding: object, seed: object) -> Plan:
    """The plan of one recipe, of one or more documents. Arguments and errors as of `merge`."""
    *above, last = load_recipes(recipe)
    asked = overridden(last, dtype, rounding, seed)
    if above:
        # They were stored as the last one is, and are; a seed that all have in common is replaced in all.
        if rounding is not None:
            above = [replace(r, rounding=asked.rounding) if r.rounding == last.rounding else r for r in above]
        above = [replace(r, seed=asked.seed) if r.seed == last.seed else r for r in above]
    return make_plan([asked], max_shard_size=size_of(max_shard_size), above=above)


def carry_out(
    plans: Sequence[Plan],
    outs: Sequence[Sequence[str | os.PathLike[str]]],
    *,
    device: str,
    threads: int | None,
    max_memory: int,
    force: bool,
    durable: bool,
    progress: Progress | None,
) -> list[Report]:
    """Write the outputs of several plans. All of them appear at the end, one after the other.

    outs  a folder for each output of each plan
    Raises: what `merge` does; OutputError names the outputs that were finished before it.
    """
    start = time.perf_counter()
    check_device(device)
    cpu_isa()  # an unusable FASTINTERP_ISA shows before a folder is made
    every: list[Done] = []
    with ExitStack() as stack:
        folders = _opened_folders(plans, outs, stack, force=force, durable=durable)
        total = sum(plan.bytes_read + plan.bytes_written for plan in plans)
        for plan, own in zip(plans, folders, strict=True):
            pairs = zip(own, plan.layouts, strict=True)
            sinks = FileSinks(plan, [[folder.temp(file.name) for file in layout.files] for folder, layout in pairs])
            before = sum(d.bytes_read + d.bytes_written for d in every)
            shown = progress if len(plans) == 1 else _part(progress, before, total)
            every.append(run(plan, sinks, threads=threads, max_memory=max_memory, progress=shown))
        finish([folder for own in folders for folder in own])
    wall = time.perf_counter() - start
    read, written = sum(d.bytes_read for d in every), sum(d.bytes_written for d in every)
    reports = []
    for plan, done, own in zip(plans, every, folders, strict=True):
        whole = replace(done, bytes_read=read, bytes_written=written)
        found = [report_of(plan, whole, wall, k, folder) for k, folder in enumerate(own)]
        reports += [replace(report, outputs=sum(map(len, outs))) for report in found]
    return reports


def _opened_folders(
    plans: Sequence[Plan], outs: Sequence[Sequence[str | os.PathLike[str]]], stack: ExitStack, **how: bool
) -> list[list[OutFolder]]:
    """The folders of every plan's outputs, with their small files; all or none."""
    needed = sum(plan.disk_bytes for plan in plans)  # outputs on one disk must fit together: the first checks for all
    folders: list[list[OutFolder]] = []
    for plan, own in zip(plans, outs, strict=True):
        folders.append([])
        for out, layout in zip(own, plan.layouts, strict=True):
            folder = OutFolder(out, plan.inputs, needed=needed or layout.disk_bytes, **how)
            folders[-1].append(stack.enter_context(folder))
            needed = 0
        for folder, recipe, layout in zip(folders[-1], plan.recipes, plan.layouts, strict=True):
            write_small_files(folder, plan, recipe, layout.index, layout.index_name)
    return folders


def finish(folders: Sequence[OutFolder]) -> None:
    """Let all outputs appear, one after the other."""
    for i, folder in enumerate(folders):
        try:
            folder.commit()
        except OutputError as error:
            finished = ", ".join(f.name for f in folders[:i])
            raise OutputError(f"{error}; finished before that: {finished}" if finished else str(error)) from error


def _part(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of one run of several. `before`: bytes of those before it."""
    if progress is None:
        return None
    return lambda done, own: progress(before + done, max(total, before + own))


def write_small_files(folder: OutFolder, plan: Plan, recipe: Recipe, index: bytes | None, index_name: str) -> None:
    """Everything beside the weights."""
    copied = copy_sidecars(plan.origin, recipe.out_dtype or recipe.dtype)
    for name, content in plan.fitted.sidecars(copied).items():
        folder.write(name, content)
    folder.write("README.md", model_card(recipe.text, plan.models, recipe.method.name, __version__).encode())
    if index is not None:
        folder.write(index_name, index)


def report_of(plan: Plan, done: Done, wall_s: float, k: int, folder: OutFolder | None = None) -> Report:
    """Of output k. folder: where it was written; None: it is in memory."""
    return report_on(plan, done, wall_s, k, findings_of(plan, done.jobs, k), folder)


def findings_of(plan: Plan, jobs: Mapping[str, Job], k: int) -> Findings:
    """What the jobs found, of output k."""
    found = Findings()
    for tensor in (t for t in plan.tensors if t.name in jobs):
        job = jobs[tensor.name]
        if tensor.merged:
            found.models |= tensor.origins(job.reads(k))
        for i, density in job.densities(k).items():
            found.densities.setdefault(plan.checkpoints[tensor.inputs[i]].name, {})[tensor.name] = density
        if job.copies(k):
            found.copied.append(tensor.name)
        else:
            found.effects[tensor.name] = Effect.of(tensor.numel, job.stats[k])
    return found


def report_on(
    plan: Plan, done: Done, wall_s: float, k: int, found: Findings, folder: OutFolder | None = None
) -> Report:
    """The report of output k, from what was found."""
    made = {*found.copied, *found.effects}
    dtypes = sorted({str(t.dtype) for t in plan.tensors if t.merged and t.name in made})
    return Report(
        output="memory" if folder is None else folder.name,
        files=() if folder is None else tuple(f.name for f in plan.layouts[k].files),
        tensors=found.effects,
        copied=tuple(found.copied),
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        outputs=len(plan.recipes),
        wall_s=wall_s,
        device=f"cpu {done.isa}",
        threads=done.threads,
        inputs=len(found.models),
        densities=found.densities,
        merged=sum(t.numel for t in plan.tensors if t.merged),
        removed=() if folder is None else folder.removed,
        warnings=(
            *warnings_of(found.effects, ", ".join(dtypes), plan.recipes[k].rounding == "stochastic"),
            *_importances(plan),
            *plan.warnings,
        ),
    )


def _importances(plan: Plan) -> list[str]:
    if not any(recipe.sidecars for recipe in plan.recipes) and not any(t.first for t in plan.tensors):
        return []
    from fastinterp.engine.samples import negative_importances

    return negative_importances(plan)
