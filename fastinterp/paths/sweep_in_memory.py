"""Sweeps in memory: as many models at a time as fit, each passed to a callback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastinterp.backends.cpu import Progress
from fastinterp.backends.device import Device
from fastinterp.errors import UsageError
from fastinterp.execute.reading import reading_device
from fastinterp.execute.to_memory import fill
from fastinterp.in_memory.allocate import maker
from fastinterp.ops.combine import MAX_OUTPUTS
from fastinterp.paths.points import Point
from fastinterp.plan.plan import make_plan
from fastinterp.recipe.load import load_recipe
from fastinterp.system.available_memory import available_memory
from fastinterp.torch_models.load import allocate

_SCRATCH = 512 << 20


def sweep_in_memory(
    points: Sequence[Point],
    callback: Callable[[Point, dict[str, Any]], Any],
    *,
    framework: str,
    devices: Sequence[Device],
    threads: int | None,
    max_memory: int | None,
    progress: Progress | None,
    read: str,
) -> list[Point]:
    """Merge the points and call `callback` for each. Returns the points with their reports and results.

    Raises: what the callback raises, as it is; what merging raises.
    """
    if not callable(callback):
        raise UsageError(f"`in_memory` must be a function of a point and its tensors, got {callback!r}")
    maker(framework)
    recipes = [load_recipe(point.recipe) for point in points]
    one = make_plan(recipes[:1], as_numbers=True)
    reading_device(read, "cpu", one.streamed)
    size = one.bytes_written
    most = available_memory() // 2 if max_memory is None else max_memory
    at_a_time = max(1, min(MAX_OUTPUTS, most // max(1, size)))
    done = []
    for first in range(0, len(points), at_a_time):
        plan = make_plan(recipes[first : first + at_a_time], as_numbers=True)
        allocated = [allocate(plan.tensors, framework) for _ in plan.recipes]
        places = [p for _, p in allocated]
        reports = fill(
            plan, places, threads=threads, max_memory=_SCRATCH, progress=progress, devices=devices, read=read
        )
        models = [tensors for tensors, _ in allocated]
        del allocated
        for k, report in enumerate(reports):
            point = replace(points[first + k], report=report)
            tensors, models[k] = models[k], {}
            done.append(replace(point, result=callback(point, tensors)))
            del tensors
    return done
