"""The points of a sweep: on the line between two models, or a grid of directions from a base. Each is a recipe."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.arguments import numbers, path_of
from fastinterp.errors import UsageError
from fastinterp.execute.report import Report
from fastinterp.methods import Method, clipped, find, suggestion
from fastinterp.ops.combine import MAX_POINTS
from fastinterp.recipe.load import Recipe, load_recipe
from fastinterp.recipe.references import ModelRef

_LARGEST_ALPHA = 4e7  # without a base; the weights 1 - alpha and alpha are divided by their sum
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a direction: it is part of folders' names


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    name    as its folder is called: `alpha_0.3`, `pos_0.25_formal_-0.5`
    at      direction -> how far
    recipe  that makes it; `fastinterp.load` and `fastinterp.merge` take it
    path    of the checkpoint or recipe file that was written, else None
    report  of what was made, else None
    result  what the callback returned, else None
    """

    name: str
    at: Mapping[str, float]
    recipe: Mapping[str, Any]
    path: Path | None = None
    report: Report | None = None
    result: Any = None

    @property
    def acts_as(self) -> dict[str, float] | None:
        """What the output's rounding made of `at`, where that was measured: the effective distances.

        Known for what changes in one direction only; a change in several has one strength for all of them.
        """
        strength = None if self.report is None else self.report.effect.strength
        return None if strength is None else {name: far * strength for name, far in self.at.items()}


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
    if ModelRef.of(a) == ModelRef.of(b):
        raise UsageError(f"A and B are the same checkpoint: {a!r}. Name two")
    if integers is not None and ModelRef.of(integers) not in map(ModelRef.of, (a, b, base or a)):
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


def line(
    a: object, b: object, alphas: object, *, base: object, integers: object, method: str | None,
    parameters: Mapping[str, Any], settings: Mapping[str, Any],
) -> list[Point]:  # fmt: skip
    """Points on the line from `a` to `b`; with a method, on its curve.

    settings  further keys of every recipe
    Raises: UsageError, MethodError.
    """
    ends = path_of(a, "a"), path_of(b, "b")
    origin = None if base is None else path_of(base, "base")
    whose = None if integers is None else path_of(integers, "integers")
    points = []
    walked = _numbers(alphas, "alphas")
    _check_count(len(walked))
    for alpha in walked:
        asked = point_mapping(*ends, alpha, origin, whose)
        if method is not None:
            asked = _curve(find(method), *ends, alpha, origin) | ({} if whose is None else {"integers": whose})
        points.append(Point(point_name(alpha), {"alpha": alpha}, _complete(asked, parameters, settings)))
    return _distinct(points)


def _curve(method: Method, a: str, b: str, alpha: float, base: str | None) -> dict[str, Any]:
    named = {p.name: p for p in method.parameters}
    asked: dict[str, Any] = {"merge_method": method.name}
    if "t" in named and base is None:
        inner = {"base_model": a} if method.base != "none" else {}
        return asked | inner | {"models": [{"model": a}, {"model": b}], "parameters": {"t": alpha}}
    if "weight" not in named or not named["weight"].each:
        raise UsageError(f"`{method.name}` has no parameter that walks from A to B: `t`, or a `weight` for each model")
    if method.base == "required" and base is None:
        raise UsageError(f"`{method.name}` needs a base: name it with --base (in Python base=...)")
    weighed = [(a, 1.0 - alpha), (b, alpha)]
    asked["models"] = [{"model": model, "parameters": {"weight": weight}} for model, weight in weighed]
    return asked if base is None else asked | {"base_model": base}


def grid(
    base: object, add: Mapping[str, Any], steps: Mapping[str, Any], *, integers: object, method: str | None,
    parameters: Mapping[str, Any], settings: Mapping[str, Any],
) -> list[Point]:  # fmt: skip
    """Every combination of distances from `base` towards the models of `add`. The first direction changes slowest.

    add    direction -> model
    steps  direction -> distances: 0 stays at the base, 1 reaches the model. Methods that would divide them by their sum
           are told not to, by normalize: false, unless `parameters` says otherwise
    Raises: UsageError, MethodError.
    """
    origin = path_of(base, "base")
    models = {check_direction(name): path_of(model, name) for name, model in add.items()}
    for name in steps:
        if name not in models:
            raise UsageError(f"unknown direction `{clipped(str(name))}`{suggestion(str(name), list(models))}")
    missing = [name for name in models if name not in steps]
    if missing:
        raise UsageError(f"direction `{missing[0]}` has no points: --grid {missing[0]}=0:1:0.25, say")
    chosen = find(method or "task_arithmetic")
    if chosen.base == "none" or not any(p.name == "weight" and p.each for p in chosen.parameters):
        raise UsageError(f"`{chosen.name}` does not weigh directions from a base, as task_arithmetic or ties do")
    # Divided by their sum, distances would be lost.
    own = {"normalize": False} if any(p.name == "normalize" and p.default for p in chosen.parameters) else {}
    walked = [_numbers(steps[name], name) for name in models]
    _check_count(math.prod(map(len, walked)))
    points = []
    for fars in itertools.product(*walked):
        weighed = [{"model": m, "parameters": {"weight": w}} for m, w in zip(models.values(), fars, strict=True)]
        asked = {"merge_method": chosen.name, "base_model": origin, "models": weighed}
        if integers is not None:
            asked["integers"] = path_of(integers, "integers")
        named = "_".join(f"{name}_{far:.10g}" for name, far in zip(models, fars, strict=True))
        at = dict(zip(models, fars, strict=True))
        points.append(Point(named, at, _complete(asked, {**own, **parameters}, settings)))
    return _distinct(points)


def check_direction(name: object) -> str:
    """Raises: UsageError, if it cannot be part of a folder's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"a direction is named with letters, digits, _ . and -, got {clipped(repr(name))}")
    return name


def _check_count(count: int) -> None:
    if count > MAX_POINTS:
        raise UsageError(f"a sweep has at most {MAX_POINTS} points, got {count}")


def _numbers(given: object, what: str) -> list[float]:
    found = [value + 0.0 for value in numbers(given)]  # -0.0 becomes 0.0
    if not found:
        raise UsageError(f"`{what}` is empty: at least one number is needed")
    for value in found:
        if not math.isfinite(value):
            raise UsageError(f"`{what}` must be finite numbers, got {value}")
    return found


def _complete(asked: Mapping[str, Any], parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    own = asked.get("parameters", {})
    for name in parameters:
        if name in own or any(name in model.get("parameters", {}) for model in asked["models"]):
            raise UsageError(f"the parameter `{name}` is what the sweep changes")
    given = {**own, **parameters}
    return {**asked, **({"parameters": given} if given else {}), **settings}


def _distinct(points: Sequence[Point]) -> list[Point]:
    seen: set[str] = set()
    for point in points:
        if point.name in seen:
            raise UsageError(f"every point may be given once, but {point.name} comes twice")
        seen.add(point.name)
    return list(points)
