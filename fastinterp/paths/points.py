"""The points of a sweep as recipes: on the line between two models, or a grid of directions from a base."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.arguments import numbers, path_of
from fastinterp.checkpoint.names import names_file
from fastinterp.errors import UsageError
from fastinterp.execute.report import Report
from fastinterp.messages import clipped, suggestion
from fastinterp.methods import Method, find
from fastinterp.ops.combine import MAX_POINTS
from fastinterp.recipe.load import Recipe, load_recipe
from fastinterp.recipe.references import ModelRef

_LARGEST_ALPHA = 4e7  # without a base; the weights 1 - alpha and alpha are divided by their sum
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")  # of a direction, as part of the name of a folder


@dataclass(frozen=True)
class Point:
    """One point of a sweep.

    name    of its folder or file: `alpha_0.3`, `pos_0.25_formal_-0.5`
    at      direction -> distance: 0 at the base, 1 at the model
    recipe  of the point; `fastinterp.load` and `fastinterp.merge` take it
    path    of the checkpoint or recipe file that was written, else None
    report  of the merge, else None
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
        """The effective distances after the output's rounding, where that was measured.

        Where the change is in several directions, one strength is measured, and holds for all of them.
        """
        strength = None if self.report is None else self.report.effect.strength
        return None if strength is None else {name: distance * strength for name, distance in self.at.items()}


def point_name(alpha: float) -> str:
    """The name of the folder of one point on a line: `alpha_0.3`, `alpha_-0.5`."""
    return f"alpha_{float(alpha):.10g}"


def point_path(out: str, name: str) -> Path:
    """Where a point is written: `OUT/alpha_0.3`; if `out` is `x.safetensors`, `x_alpha_0.3.safetensors`."""
    ending = names_file(out)
    return Path(f"{out.removesuffix(ending)}_{name}{ending}") if ending else Path(out) / name


def point_recipe(
    a: str, b: str, alpha: float, base: str | None, integers: str | None = None, keys: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe of one point on the line from `a` to `b`. The other arguments are those of `interpolate`.

    keys  further keys of the recipe
    """
    return load_recipe({**point_mapping(a, b, alpha, base, integers), **(keys or {})})


def further_keys(
    missing: str | None, channels: str | None, quantize: str | None, tokenizer_source: object
) -> dict[str, str]:
    """The keys of a point's recipe for those arguments that are not None. Raises: UsageError."""
    source = None if tokenizer_source is None else path_of(tokenizer_source, "tokenizer_source")
    keys = {"missing": missing, "channels": channels, "quantize": quantize, "tokenizer_source": source}
    return {key: value for key, value in keys.items() if value is not None}


def point_mapping(a: str, b: str, alpha: float, base: str | None, integers: str | None = None) -> dict[str, Any]:
    """The recipe of a point as a mapping. Raises: UsageError."""
    if not math.isfinite(alpha):
        raise UsageError(f"alpha must be a finite number, got {alpha}")
    # Beyond, 1 - alpha and alpha cancel, or float32 cannot hold them.
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
    recipe: dict[str, Any] = {"merge_method": "linear"}
    if base is not None:
        recipe = {"merge_method": "task_arithmetic", "base_model": base}
    recipe["models"] = models
    if integers is not None:
        recipe["integers"] = integers
    return recipe


def line(
    a: object, b: object, alphas: object, *, base: object, integers: object, method: str | None,
    parameters: Mapping[str, Any], settings: Mapping[str, Any],
) -> list[Point]:  # fmt: skip
    """Points on the line from `a` to `b`; with a method, on its curve.

    settings  further keys of every recipe
    Raises: UsageError, MethodError.
    """
    ends = path_of(a, "a"), path_of(b, "b")
    base_path = None if base is None else path_of(base, "base")
    integers_path = None if integers is None else path_of(integers, "integers")
    points = []
    distances = _numbers(alphas, "alphas")
    _check_count(len(distances))
    for alpha in distances:
        recipe = point_mapping(*ends, alpha, base_path, integers_path)
        if method is not None:
            recipe = _curve(find(method), *ends, alpha, base_path)
            recipe |= {} if integers_path is None else {"integers": integers_path}
        points.append(Point(point_name(alpha), {"alpha": alpha}, _complete(recipe, parameters, settings)))
    return _distinct(points)


def _curve(method: Method, a: str, b: str, alpha: float, base: str | None) -> dict[str, Any]:
    """The recipe of a point from `a` (0) to `b` (1) by a method: its `t`, or its weights, are what changes."""
    parameters = {p.name: p for p in method.parameters}
    recipe: dict[str, Any] = {"merge_method": method.name}
    if "t" in parameters and base is None:
        inner = {"base_model": a} if method.base != "none" else {}
        return recipe | inner | {"models": [{"model": a}, {"model": b}], "parameters": {"t": alpha}}
    if "weight" not in parameters or not parameters["weight"].each:
        if "t" in parameters:
            raise UsageError(f"`{method.name}` leads from A to B without a base: leave --base out (in Python base=...)")
        raise UsageError(f"`{method.name}` has no parameter that leads from A to B: `t`, or a `weight` for each model")
    if method.base == "required" and base is None:
        raise UsageError(f"`{method.name}` needs a base: name it with --base (in Python base=...)")
    weights = [(a, 1.0 - alpha), (b, alpha)]
    recipe["models"] = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights]
    return recipe if base is None else recipe | {"base_model": base}


def grid(
    base: object, add: Mapping[str, Any], steps: Mapping[str, Any], *, integers: object, method: str | None,
    parameters: Mapping[str, Any], settings: Mapping[str, Any],
) -> list[Point]:  # fmt: skip
    """Every combination of distances from `base` towards the models of `add`. The first direction changes slowest.

    add    direction -> model
    steps  direction -> distances: 0 at the base, 1 at the model. Methods that would divide them by their sum get
           normalize: false, unless `parameters` says otherwise
    Raises: UsageError, MethodError.
    """
    base_path = path_of(base, "base")
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
    defaults = {"normalize": False} if any(p.name == "normalize" and p.default for p in chosen.parameters) else {}
    axes = [_numbers(steps[name], name) for name in models]
    _check_count(math.prod(map(len, axes)))
    points = []
    for distances in itertools.product(*axes):
        at = dict(zip(models, distances, strict=True))
        sources = [{"model": model, "parameters": {"weight": at[name]}} for name, model in models.items()]
        recipe = {"merge_method": chosen.name, "base_model": base_path, "models": sources}
        if integers is not None:
            recipe["integers"] = path_of(integers, "integers")
        folder = "_".join(f"{name}_{distance:.10g}" for name, distance in at.items())
        points.append(Point(folder, at, _complete(recipe, {**defaults, **parameters}, settings)))
    return _distinct(points)


def check_direction(name: object) -> str:
    """The name of a direction. Raises: UsageError, if it cannot be part of a folder's name."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise UsageError(f"a direction is named with letters, digits, _ . and -, got {clipped(repr(name))}")
    return name


def _check_count(count: int) -> None:
    if count > MAX_POINTS:
        raise UsageError(f"a sweep has at most {MAX_POINTS} points, got {count}")


def _numbers(values: object, what: str) -> list[float]:
    distances = [value + 0.0 for value in numbers(values)]  # -0.0 becomes 0.0
    if not distances:
        raise UsageError(f"`{what}` is empty: at least one number is needed")
    for distance in distances:
        if not math.isfinite(distance):
            raise UsageError(f"`{what}` must be finite numbers, got {distance}")
    return distances


def _complete(recipe: Mapping[str, Any], parameters: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with further parameters and keys. Raises: UsageError, if the sweep itself sets a parameter."""
    swept = recipe.get("parameters", {})
    for name in parameters:
        if name in swept or any(name in model.get("parameters", {}) for model in recipe["models"]):
            raise UsageError(f"the parameter `{name}` is what the sweep changes")
    every = {**swept, **parameters}
    return {**recipe, **({"parameters": every} if every else {}), **settings}


def _distinct(points: Sequence[Point]) -> list[Point]:
    seen: set[str] = set()
    for point in points:
        if point.name in seen:
            raise UsageError(f"every point may be given once, but {point.name} comes twice")
        seen.add(point.name)
    return list(points)
