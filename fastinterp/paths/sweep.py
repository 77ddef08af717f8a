"""Sweeps: many points of a path from one read of the models, as checkpoints, in memory or as recipes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from fastinterp.arguments import Checkpoint, dtype_named, optional_size, path_of, size_of, without_recipe
from fastinterp.backends.registry import cpu_isa, cpu_threads, device_spec, find_devices
from fastinterp.checkpoint.names import names_file
from fastinterp.errors import OutputError, UsageError
from fastinterp.execute.reading import reading_device
from fastinterp.execute.to_files import write_outputs
from fastinterp.execute.window import fitting_outputs
from fastinterp.ops.combine import MAX_OUTPUTS
from fastinterp.output.address import uploads
from fastinterp.paths.points import Point, further_keys, grid, line, point_path
from fastinterp.plan.plan import Plan, make_plan
from fastinterp.presence import exists, is_there
from fastinterp.progress import Progress, callback_of
from fastinterp.recipe.load import load_recipe

PointCallback = Annotated[
    Callable[[Point, dict[str, Any]], Any],
    """A function that `sweep(..., in_memory=...)` calls for every point: fn(point, tensors).

    point    a `Point`: its place on the path
    tensors  the merged model, name -> tensor, as `framework` says: of torch on the CPU, or of numpy

    What it returns becomes `point.result`. The tensors are its own, and may be kept.
    """,
]
_MEMORY = "512MB"


@without_recipe
@uploads
def sweep(
    a: Checkpoint | None = None,
    b: Checkpoint | None = None,
    alphas: Iterable[float] | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    base: Checkpoint | None = None,
    add: Mapping[str, Checkpoint] | None = None,
    grid: Mapping[str, Iterable[float]] | None = None,
    method: str | None = None,
    parameters: Mapping[str, Any] | None = None,
    integers: Checkpoint | None = None,
    tokenizer_source: str | os.PathLike[str] | None = None,
    missing: str | None = None,
    channels: str | None = None,
    quantize: str | None = None,
    virtual: bool = False,
    in_memory: PointCallback | None = None,
    framework: str = "torch",
    device: str = "auto",
    threads: int | None = None,
    max_shard_size: str | int | None = None,
    max_memory: str | int | None = None,
    dtype: str | None = None,
    rounding: str | None = None,
    seed: int | None = None,
    force: bool = False,
    durable: bool = False,
    private: bool = False,
    read: str = "auto",
    verify_kept: bool = False,
    progress: Progress | bool | None = None,
) -> list[Point]:
    """Compute many points of a path from one read of its models.

    sweep(a, b, alphas, out)                 on the line from checkpoint `a` (0) to `b` (1), and beyond
    sweep(base=..., add={"formal": f, "kind": k}, grid={"formal": [-1, 0, 1], "kind": [0, 0.5, 1]}, out=...)
                                             every combination of distances from `base` towards other checkpoints

    a, b        the ends of a line
    alphas      the points on it: numbers, 0 at `a`, 1 at `b`
    base        with a and b: the task-vector form, as of `interpolate`; else where the directions start
    add         directions: a name for each checkpoint
    grid        for each of these names the distances, 0 at `base`, 1 at the checkpoint: all combinations are points
    method      another than the straight line: slerp, ties, ... What it measures is measured once for all points. Its
                `t`, or its `weight` of each model, is what changes
    parameters  further parameters of the method, the same for all points
    integers    the model whose integer tensors are taken where models differ
    tokenizer_source, missing, channels, quantize   as of `interpolate`
    out         the folder of the outputs: `out/alpha_0.3`, `out/formal_-1_kind_0.5`; or a file `x.safetensors`, which
                stands for `x_alpha_0.3.safetensors` and so on
    virtual     write a recipe for every point, `out/alpha_0.3.yml`, instead of a checkpoint: for `fastinterp.load`
    in_memory   called for every point as in_memory(point, tensors), `out` left out. See `PointCallback`
    framework   of its tensors: "torch" or "numpy"
    max_memory  in_memory: bound of the models that are held at a time, one at least; half of what is free, if it is
                None. Else bound of the workers' scratch memory: 512MB, if it is None

    The other arguments are those of `merge`. Points of `in_memory` that do not fit take further reads. Checkpoints
    appear when all of them are written; space for all is seen to before any is.
    Returns the points, in their order.
    Raises: what `merge` does, and what the callback raises; OutputError names what was finished before it.
    """
    settings = _settings(dtype, rounding, seed) | further_keys(missing, channels, quantize, tokenizer_source)
    points = _points(
        a, b, alphas, add, grid, base=base, integers=integers, method=method, parameters=parameters or {},
        settings=settings,
    )  # fmt: skip
    device = reading_device(read, device)
    spec, shown = device_spec(device), callback_of(progress)
    if in_memory is not None:
        if out is not None or virtual:
            raise UsageError("`in_memory` writes nothing: leave `out` and `virtual` out")
        if quantize == "same":
            raise UsageError("weights in memory are numbers: leave `quantize: same` (--quantize same) out")
        from fastinterp.paths.sweep_in_memory import sweep_in_memory  # loads numpy: a sweep to disk does without

        most = None if max_memory is None else size_of(max_memory)
        return sweep_in_memory(
            points, in_memory, framework=framework, devices=find_devices(spec), threads=threads, max_memory=most,
            progress=shown, read=read,
        )  # fmt: skip
    target = path_of("" if out is None else out, "out")
    if not target:
        raise UsageError("the name of the output folder is missing. Give -o DIR (in Python out=...), a new folder")
    shard, most = optional_size(max_shard_size), size_of(_MEMORY if max_memory is None else max_memory)
    if virtual:
        if names_file(target):
            raise UsageError(f"recipes are written into a folder, but {target} is the name of a weights file")
        recipes = [load_recipe(point.recipe) for point in points]
        make_plan(recipes[:1], max_shard_size=shard)  # whether the models are there, and fit
        return _recipes(points, Path(target), force)
    plans = _plans(points, shard, threads, most, names_file(target), private)
    paths = [point_path(target, point.name) for point in points]
    starts = [sum(len(p.recipes) for p in plans[:i]) for i in range(len(plans))]
    outs = [paths[at : at + len(p.recipes)] for at, p in zip(starts, plans, strict=True)]
    reports = write_outputs(
        plans, outs, device=device, threads=threads, max_memory=most, force=force, durable=durable,
        verify_kept=verify_kept, read=read, progress=shown,
    )  # fmt: skip
    done = zip(points, paths, reports, strict=True)
    return [replace(point, path=path, report=report) for point, path, report in done]


def _settings(dtype: str | None, rounding: str | None, seed: int | None) -> dict[str, Any]:
    """Keys of a recipe, of the arguments that are not None."""
    keys = {"out_dtype": None if dtype is None else dtype_named(dtype).name, "rounding": rounding, "seed": seed}
    return {key: value for key, value in keys.items() if value is not None}


def _points(
    a: object, b: object, alphas: object, add: object, steps: object, *, base: object, integers: object,
    method: str | None, parameters: object, settings: Mapping[str, Any],
) -> list[Point]:  # fmt: skip
    """The points of a sweep. settings: further keys of every recipe. Raises: UsageError, MethodError."""
    if not isinstance(parameters, Mapping):
        raise UsageError(f"`parameters` must be a mapping of names to values, got {parameters!r}")
    if add or steps:
        if a is not None or b is not None or alphas is not None:
            raise UsageError("give either A, B and alphas, or a base with directions (add) and their points (grid)")
        if base is None:
            raise UsageError("directions start from a base: name it with --base (in Python base=...)")
        if not isinstance(add, Mapping) or not isinstance(steps, Mapping):
            raise UsageError(
                "`add` (direction to model) and `grid` (direction to numbers) must both be given, as mappings"
            )
        return grid(base, add, steps, integers=integers, method=method, parameters=parameters, settings=settings)
    if a is None or b is None or alphas is None:
        raise UsageError("a sweep needs A, B and alphas, or a base with directions (add) and their points (grid)")
    return line(a, b, alphas, base=base, integers=integers, method=method, parameters=parameters, settings=settings)


def _plans(
    points: Sequence[Point], max_shard_size: int | None, threads: int | None, max_memory: int, one_file: str,
    private: bool,
) -> list[Plan]:  # fmt: skip
    """One plan for as many points as fit into one read of the models; nearly always all of them."""
    cpu_isa()
    recipes = [replace(load_recipe(point.recipe), private=private) for point in points]
    first = make_plan(recipes[:MAX_OUTPUTS], max_shard_size=max_shard_size, one_file=one_file)
    most = min(MAX_OUTPUTS, fitting_outputs(first, cpu_threads(threads), max_memory))
    if len(recipes) <= most:
        return [first]
    parts = [recipes[i : i + most] for i in range(0, len(recipes), most)]
    return [make_plan(part, max_shard_size=max_shard_size, one_file=one_file) for part in parts]


def _recipes(points: Sequence[Point], folder: Path, force: bool) -> list[Point]:
    """Write a recipe file for every point. Paths of models become absolute. Raises: OutputError."""
    import yaml

    paths = [folder / f"{point.name}.yml" for point in points]
    existing = [path for path in paths if is_there(path)]
    if existing and not force:
        raise OutputError(f"{existing[0]} exists already. Add --force (in Python force=True) to replace it")
    done: list[Point] = []
    for point, path in zip(points, paths, strict=True):
        recipe = _with_absolute_paths(point.recipe)
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        partial = path.with_name(f".{path.name}.partial")  # what a run that died left has the same name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            partial.unlink(missing_ok=True)
            with open(partial, "x", encoding="utf-8") as stream:
                stream.write(text)
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"{path}: {error.strerror}; {len(done)} of {len(paths)} recipes were written") from None
        done.append(replace(point, recipe=recipe, path=path))
    return done


def _with_absolute_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with absolute paths for models on this disk, so that it means the same from every folder."""
    keys = ("base_model", "integers", "tokenizer_source")
    changed = {key: _absolute(recipe[key]) for key in keys if key in recipe}
    models = [{**model, "model": _absolute(model["model"])} for model in recipe["models"]]
    return {**recipe, **changed, "models": models}


def _absolute(model: str) -> str:
    """The path of a model from the root of this disk; other names, Hub ids say, as they are."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if exists(path) else model
