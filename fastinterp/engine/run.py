"""merge, interpolate and explain: from what the user asks for to files on disk and a report."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastinterp._version import __version__
from fastinterp.compute.backends import check_device, cpu_isa
from fastinterp.compute.dtypes import DType, parse_dtype
from fastinterp.compute.pump import Progress
from fastinterp.engine.plan import Plan, make_plan
from fastinterp.engine.report import Effect, Report, warnings_of
from fastinterp.engine.schedule import Done, run
from fastinterp.errors import UsageError
from fastinterp.files.folder import OutFolder
from fastinterp.files.layout import parse_size
from fastinterp.files.sidecars import copy_sidecars, model_card
from fastinterp.recipe.load import Recipe, load_recipe, load_recipes, same_model

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
    plan = _plan(recipe, max_shard_size, dtype, rounding, seed)
    return _carry_out(
        plan, [_path(out, "out")], device=device, threads=threads, max_memory=_size(max_memory), force=force,
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

    alphas   any finite numbers, at most 16. One: `out` is the output. Several: `out/alpha_0.3` and so on, from one read
    base     the task-vector form: out = base + (1 - alpha) * (a - base) + alpha * (b - base)
    integers the one of them whose integer tensors are taken; None: they must agree

    Alpha 0 and 1 give the bytes of `a` and `b`. The other arguments and errors are those of `merge`.
    """
    points = _points(alphas)
    if not points:
        raise UsageError("at least one alpha is needed")
    if len(points) != len({point_name(p) for p in points}):
        raise UsageError(f"every alpha may be given once, got {', '.join(map(str, points))}")
    ends = _path(a, "a"), _path(b, "b")
    origin = None if base is None else _path(base, "base")
    whose = None if integers is None else _path(integers, "integers")
    recipes = [_overridden(point_recipe(*ends, p, origin, whose), dtype, rounding, seed) for p in points]
    plan = make_plan(recipes, max_shard_size=_size(max_shard_size))
    target = _path(out, "out")
    if not target:
        raise UsageError("the name of the output folder is empty. Give the name of a new folder")
    outs = [Path(target)] if len(points) == 1 else [Path(target) / point_name(p) for p in points]
    return _carry_out(
        plan, outs, device=device, threads=threads, max_memory=_size(max_memory), force=force, durable=durable,
        progress=progress,
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

    return Explained(**vars(_plan(recipe, max_shard_size, dtype, rounding, seed)))


def point_name(alpha: float) -> str:
    """The folder of one point on a path: `alpha_0.3`, `alpha_-0.5`."""
    return f"alpha_{float(alpha):.10g}"


def point_recipe(a: str, b: str, alpha: float, base: str | None, integers: str | None = None) -> Recipe:
    """The recipe of one point on the line from `a` to `b`. The other arguments are those of `interpolate`."""
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
    return load_recipe(asked)


def _plan(recipe: Source, max_shard_size: str | int, dtype: object, rounding: object, seed: object) -> Plan:
    *above, last = load_recipes(recipe)
    asked = _overridden(last, dtype, rounding, seed)
    if above:
        # They were stored as the last one is, and are; a seed that all have in common is replaced in all.
        if rounding is not None:
            above = [replace(r, rounding=asked.rounding) if r.rounding == last.rounding else r for r in above]
        above = [replace(r, seed=asked.seed) if r.seed == last.seed else r for r in above]
    return make_plan([asked], max_shard_size=_size(max_shard_size), above=above)


def _overridden(recipe: Recipe, dtype: object, rounding: object, seed: object) -> Recipe:
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["out_dtype"] = _dtype(dtype)
    if rounding is not None:
        if rounding not in ("nearest", "stochastic"):
            raise UsageError(f"rounding must be nearest or stochastic, got {rounding!r}")
        changes["rounding"] = rounding
    if seed is not None:
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise UsageError(f"the seed must be a whole number, got {seed!r}")
        if not 0 <= seed < 2**64:
            raise UsageError(f"the seed must be in 0..2**64-1, got {seed}")
        changes["seed"] = seed
    return replace(recipe, **changes)


def _dtype(text: object) -> DType:
    found = parse_dtype(text) if isinstance(text, str) else None
    if found is None:
        raise UsageError(
            f"unknown dtype {text!r}. Known: float64, float32, float16, bfloat16, float8_e4m3fn, float8_e5m2"
        )
    return found


def _size(given: str | int) -> int:
    return parse_size(str(given))


def _points(alphas: object) -> list[float]:
    given: list[Any] = [alphas]
    if isinstance(alphas, Iterable) and not isinstance(alphas, (str, bytes)) and getattr(alphas, "shape", None) != ():
        given = list(alphas)
    for alpha in given:
        if isinstance(alpha, (bool, str, bytes)) or not hasattr(alpha, "__float__"):
            raise UsageError(f"alpha must be a number, or several in a list, got {alpha!r}")
    try:
        return [float(alpha) for alpha in given]
    except (OverflowError, TypeError, ValueError):
        raise UsageError(f"alpha must be a number, or several in a list, got {given!r}"[:200]) from None


def _path(given: object, name: str) -> str:
    if not isinstance(given, (str, os.PathLike)):
        raise UsageError(f"`{name}` must be a path, got {given!r}")
    return os.fspath(given)


def _carry_out(
    plan: Plan,
    outs: Sequence[str | os.PathLike[str]],
    *,
    device: str,
    threads: int | None,
    max_memory: int,
    force: bool,
    durable: bool,
    progress: Progress | None,
) -> list[Report]:
    start = time.perf_counter()
    check_device(device)
    cpu_isa()  # an unusable FASTINTERP_ISA shows before a folder is made
    with ExitStack() as stack:
        folders: list[OutFolder] = []
        for out, layout in zip(outs, plan.layouts, strict=True):
            # Several outputs on one disk must fit together: the first one checks for all.
            needed = plan.disk_bytes if not folders else layout.disk_bytes
            folders.append(
                stack.enter_context(OutFolder(out, plan.inputs, force=force, durable=durable, needed=needed))
            )
        for folder, recipe, layout in zip(folders, plan.recipes, plan.layouts, strict=True):
            _write_small_files(folder, plan, recipe, layout.index, layout.index_name)
        paths = [[f.temp(file.name) for file in layout.files] for f, layout in zip(folders, plan.layouts, strict=True)]
        done = run(plan, paths, threads=threads, max_memory=max_memory, progress=progress)
        for folder in folders:
            folder.commit()
    wall = time.perf_counter() - start
    return [_report(plan, k, folder, done, wall) for k, folder in enumerate(folders)]


def _write_small_files(folder: OutFolder, plan: Plan, recipe: Recipe, index: bytes | None, index_name: str) -> None:
    copied = copy_sidecars(plan.origin, recipe.out_dtype or recipe.dtype)
    for name, content in plan.fitted.sidecars(copied).items():
        folder.write(name, content)
    folder.write("README.md", model_card(recipe.text, plan.models, recipe.method.name, __version__).encode())
    if index is not None:
        folder.write(index_name, index)


def _report(plan: Plan, k: int, folder: OutFolder, done: Done, wall_s: float) -> Report:
    effects, copied = {}, []
    models: set[int] = set()
    for tensor, job in zip(plan.tensors, done.jobs, strict=True):
        if tensor.merged:
            models |= tensor.origins(job.reads(k))
        if job.copies(k):
            copied.append(tensor.name)
        else:
            effects[tensor.name] = Effect.of(tensor.numel, job.stats[k])
    dtypes = sorted({str(t.dtype) for t in plan.tensors if t.merged})
    return Report(
        output=folder.name,
        files=tuple(f.name for f in plan.layouts[k].files),
        tensors=effects,
        copied=tuple(copied),
        bytes_read=done.bytes_read,
        bytes_written=done.bytes_written,
        outputs=len(plan.recipes),
        wall_s=wall_s,
        device=f"cpu {done.isa}",
        threads=done.threads,
        inputs=len(models),
        removed=folder.removed,
        warnings=(*warnings_of(effects, ", ".join(dtypes)), *plan.warnings),
    )
