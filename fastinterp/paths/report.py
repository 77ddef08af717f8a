"""The report of a path: metrics and rounding at each point, as tables, files and figures."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from fastinterp.arguments import snapped
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.errors import CheckpointError, StorageError, UsageError
from fastinterp.messages import table
from fastinterp.paths import curve

FORMAT = "fastinterp path report"
_VERSION = 1
_LARGEST = 50_000_000  # bytes of a file
_STAIRCASE = 0.05  # a strength that is off by more than this is warned of
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # strings in JSON: it has no such numbers
_HEADER = ["from 0 to 1", "above chord", "below chord", "Spearman", "step up", "down", "kink", "logit slope", "R^2"]
_LEGEND = (
    "above, below chord: the largest distances from the line between the ends; of a loss, above is the barrier",
    "Spearman: rank correlation with alpha; 1 rises at every step, -1 falls",
    "step up, down: the largest rise and the largest fall between neighbouring points",
    "kink: the largest distance of a point from the line between its neighbours, in percent of the metric's range",
)
_LOG_ODDS = ("logit slope, R^2: of the line through log(p / (1 - p)); R^2 near 1 is a logistic curve",)


@dataclass(frozen=True, slots=True)
class PathPoint:
    """One point of a path.

    at       alpha by direction
    samples  of each metric one value per seed
    strength, changed_fraction, relative_change
             as in the report of a merge: the share of the intended change that is left after rounding, the share of
             elements that differ from the pivot (the base, else a), and |change| / |pivot|. None for copies
    """

    at: Mapping[str, float]
    samples: Mapping[str, Sequence[float]]
    strength: float | None = None
    changed_fraction: float | None = None
    relative_change: float | None = None

    def mean(self, metric: str) -> float:
        """Mean of a metric over seeds."""
        return curve.mean(self.samples[metric])

    def se(self, metric: str) -> float | None:
        """Standard error of the mean over seeds; None for one seed."""
        return curve.standard_error(self.samples[metric])


@dataclass(frozen=True)
class PathReport:
    """The metrics of a path at all points and seeds, and what rounding did there. Made by `path(...).evaluate`.

    ends    the models by direction; `a` and `b` of a line
    base    the model that directions start from, or None
    seeds   as they were given to the function
    points  one `PathPoint` for each point, in the order of the alphas
    probabilities   the metrics that are probabilities
    line    whether the path is a line from a to b: then alpha has an effective value
    """

    ends: Mapping[str, str]
    base: str | None
    seeds: tuple[int, ...]
    points: tuple[PathPoint, ...]
    probabilities: tuple[str, ...]
    line: bool

    def __post_init__(self) -> None:
        for name in self.probabilities:
            if name not in self.metrics:
                raise UsageError(
                    f"`probabilities` names {name!r}, which is no metric. Known: {', '.join(self.metrics)}"
                )
            for p in self.points:
                wrong = [v for v in p.samples[name] if v < 0 or v > 1]  # NaN is among `warnings`
                if wrong:
                    raise UsageError(
                        f"`probabilities` names {name!r}, but not all of its values are in 0..1: {wrong[0]:g} at "
                        f"{_position(p)}"
                    )

    def __repr__(self) -> str:
        """One line; print() shows the summary."""
        return f"<PathReport: {len(self.points)} points, {len(self.seeds)} seeds, metrics {', '.join(self.metrics)}>"

    def __str__(self) -> str:
        return self.summary()

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return tuple(self.points[0].samples)

    @property
    def directions(self) -> tuple[str, ...]:
        """The names of the directions: `alpha` alone on a line."""
        return tuple(self.points[0].at)

    @cached_property
    def varied(self) -> tuple[str, ...]:
        """The directions in which not all points are at the same place."""
        return tuple(n for n in self.directions if len({p.at[n] for p in self.points}) > 1)

    def along(self, metric: str) -> tuple[list[float], list[PathPoint]]:
        """Alphas in ascending order and their points. Raises: UsageError, if the points vary in several directions."""
        self.check_metric(metric)
        if len(self.varied) > 1:
            raise UsageError(f"the points vary in {' and '.join(self.varied)}: only along one direction is it a curve")
        name = (self.varied or self.directions)[0]
        ordered = sorted(self.points, key=lambda p: p.at[name])
        return [p.at[name] for p in ordered], ordered

    def shape(self, metric: str) -> curve.Shape:
        """Barrier, monotonicity, log-odds and smoothness between the ends."""
        xs, points = self.along(metric)
        return curve.shape(xs, [p.samples[metric] for p in points], probability=metric in self.probabilities)

    def respace(self, metric: str, count: int | None = None) -> list[float]:
        """Alphas, from the first to the last that were evaluated, between which the metric moves by equal steps.

        count  of alphas, at least 2; None: as many as were evaluated

        Raises: UsageError, if the metric does not move or is NaN or Inf somewhere.
        """
        xs, points = self.along(metric)
        ys = [p.mean(metric) for p in points]
        wanted = len(xs) if count is None else count
        if wanted < 2 or len(xs) < 2 or not all(map(math.isfinite, ys)):
            raise UsageError(f"two points are needed at least, and {metric} finite at all of them")
        try:
            return curve.respaced(xs, ys, wanted)
        except ValueError:
            raise UsageError(f"{metric} is the same at both ends, so no alphas make equal steps of it") from None

    def effective_alpha(self, point: PathPoint) -> float | None:
        """A point's alpha after rounding, on a line from a to b without a base; None elsewhere."""
        if not self.line or self.base is not None:
            return None
        alpha = next(iter(point.at.values()))
        return alpha if point.strength is None else alpha * point.strength

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings where metrics are NaN or Inf, and where rounding changes the effective alpha: a staircase."""
        return (*self._not_finite(), *self._staircase())

    def _not_finite(self) -> list[str]:
        warnings = []
        for metric in self.metrics:
            points = [p for p in self.points if not all(map(math.isfinite, p.samples[metric]))]
            if points:
                value = next(v for v in points[0].samples[metric] if not math.isfinite(v))
                first = f"{len(points)} of {len(self.points)} points, first at " if len(points) > 1 else ""
                warnings.append(f"{metric} is {_name_of(value)} at {first}{_position(points[0])}")
        return warnings

    def _staircase(self) -> tuple[str, ...]:
        off = [p for p in self.points if p.strength is not None and abs(p.strength - 1) > _STAIRCASE]
        if not off:
            return ()
        worst = max(off, key=lambda p: abs((p.strength or 0) - 1))
        effective = self.effective_alpha(worst)
        strength = worst.strength or 0
        more = strength > 1
        what = (
            f"makes its change {strength:.3g} times as large" if more else f"keeps {100 * strength:.3g} % of its change"
        )
        left = what if effective is None else f"acts as {effective:.2g}"
        return (
            f"rounding makes a staircase of the path: at {len(off)} of {len(self.points)} points it keeps 5 % less or "
            f"more of the change, most at {_position(worst)}, which {left}. Use dtype='float32', or "
            "rounding='stochastic'",
        )

    def summary(self) -> str:
        """Tables of the points and of the metrics' shapes, and the warnings, as text."""
        points, shapes = self._tables()
        lines = table(points, ">" * len(points[0]))
        if shapes:
            lines += ["", *table(shapes, "<" + ">" * (len(_HEADER) - 1)), *(f"  {line}" for line in self._legend())]
        return "\n".join([*lines, *(f"  warning: {w}" for w in self.warnings)])

    def _repr_html_(self) -> str:
        """For notebooks: the tables, and the figure if there is matplotlib."""
        from importlib.util import find_spec

        from fastinterp import html

        points, shapes = self._tables()
        parts = [html.table(points[0], points[1:])]
        if shapes:
            parts += [html.table(shapes[0], shapes[1:]), html.notes(self._legend())]
        parts.append(html.notes([f"warning: {w}" for w in self.warnings]))
        if 1 <= len(self.varied) <= 2 and find_spec("matplotlib") is not None:
            from fastinterp.paths.plot import as_svg

            parts.append(as_svg(self.plot()))
        return "".join(parts)

    def _tables(self) -> tuple[list[list[str]], list[list[str]]]:
        """The points, and the shapes of the metrics along one direction; each with its header."""
        names = [*self.directions, *(self._alpha_column()), *self.metrics]
        points = [names, *(self._row(p) for p in self.points)]
        return points, [_HEADER, *(self._shape_row(m) for m in self.metrics)] if len(self.varied) == 1 else []

    def _legend(self) -> list[str]:
        """What the columns of the shapes are."""
        return [*_LEGEND, *(_LOG_ODDS if self.probabilities else ())]

    def _alpha_column(self) -> list[str]:
        return ["acts as"] if any(self._off(p) for p in self.points) else []

    def _off(self, p: PathPoint) -> bool:
        return self.effective_alpha(p) is not None and abs((p.strength or 1) - 1) > _STAIRCASE

    def _row(self, p: PathPoint) -> list[str]:
        alpha = [f"{self.effective_alpha(p) or 0:.3g}" if self._off(p) else ""] if self._alpha_column() else []
        return [*(f"{v:g}" for v in p.at.values()), *alpha, *(_plus_minus(p.mean(m), p.se(m)) for m in self.metrics)]

    def _shape_row(self, metric: str) -> list[str]:
        shape = self.shape(metric)
        gaps = ["" if g is None else _plus_minus(g.value, g.se) for g in (shape.above, shape.below)]
        odds = shape.log_odds
        return [
            metric, *gaps, _or_blank(shape.spearman, ".3f"), f"{shape.step_up:.3g}", f"{shape.step_down:.3g}",
            _or_blank(shape.kink, ".1%"), *(["", ""] if odds is None else [f"{odds.slope:.3g}", f"{odds.r2:.4f}"]),
        ]  # fmt: skip

    # --- files

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in the JSON file."""
        shapes = {m: asdict(self.shape(m)) for m in self.metrics} if len(self.varied) == 1 else {}
        points = [
            {
                "at": dict(p.at), "samples": {m: list(v) for m, v in p.samples.items()},
                "mean": {m: p.mean(m) for m in p.samples}, "se": {m: p.se(m) for m in p.samples},
                "strength": p.strength, "effective_alpha": self.effective_alpha(p),
                "changed_fraction": p.changed_fraction, "relative_change": p.relative_change,
            }
            for p in self.points
        ]  # fmt: skip
        return {
            "format": FORMAT, "version": _VERSION, "ends": dict(self.ends), "base": self.base, "line": self.line,
            "seeds": list(self.seeds), "probabilities": list(self.probabilities),
            "points": points, "shapes": shapes, "warnings": list(self.warnings),
        }  # fmt: skip

    def to_json(self, file: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON text, written to `file` if one is named. NaN and Inf are strings."""
        text = json.dumps(_json(self.as_dict()), indent=1, allow_nan=False) + "\n"
        _write(file, text)
        return text

    @staticmethod
    def from_json(source: str | os.PathLike[str]) -> PathReport:
        """The report in a file, or in text that starts with `{`. Raises: UsageError, StorageError."""
        text = os.fspath(source)
        name = "the text"
        if not text.lstrip().startswith("{"):
            name = text
            try:
                raw = read_regular(name, _LARGEST)
            except CheckpointError as error:
                raise StorageError(f"{name} cannot be read: {error.message}") from None
        else:
            raw = text.encode(errors="replace")
        try:
            document = parse_json(raw, "the report", name)
            if document["format"] != FORMAT or document["version"] != _VERSION:
                raise ValueError
            return _report(document)
        except CheckpointError as error:
            raise UsageError(f"{name} is not a path report: {error.message}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
            why = str(error) if type(error) is ValueError else ""
            raise UsageError(
                f"{name} is not a path report of version {_VERSION}, as PathReport.to_json writes"
                f"{f': {why}' if why else ''}"
            ) from None

    def to_csv(self, file: str | os.PathLike[str] | None = None) -> str:
        """A line per point: alphas, means and standard errors of metrics, and effects of rounding. Empty: no value."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        others = ["seeds", "strength", "effective_alpha", "changed_fraction", "relative_change"]
        writer.writerow([*self.directions, *(f"{m}{end}" for m in self.metrics for end in ("", "_se")), *others])
        for p in self.points:
            values = [v for m in self.metrics for v in (p.mean(m), p.se(m))]
            rounding = [p.strength, self.effective_alpha(p), p.changed_fraction, p.relative_change]
            writer.writerow([*p.at.values(), *values, len(self.seeds), *rounding])
        _write(file, stream.getvalue())
        return stream.getvalue()

    def plot(self, file: str | os.PathLike[str] | None = None, metrics: Sequence[str] | None = None) -> Any:
        """Draw the metrics: curves along one direction, heat maps over two. Returns the figure of matplotlib.

        file     where it is written, as .png, .svg or .pdf; None: it is only returned, as for a notebook
        metrics  those that are drawn; None: all

        Raises: UsageError, if there is no matplotlib or nothing to draw; StorageError.
        """
        from fastinterp.paths.plot import plot_report  # loads numpy

        return plot_report(self, file, metrics)

    def check_metric(self, metric: str) -> None:
        """Does nothing, if there is such a metric. Raises: UsageError, if there is none."""
        if metric not in self.metrics:
            raise UsageError(f"no metric is called {metric!r}. Known: {', '.join(self.metrics)}")


def _or_blank(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def _position(p: PathPoint) -> str:
    """`alpha 0.3`; of several directions those that are not 0, one at least."""
    shown = {name: distance for name, distance in p.at.items() if distance} or p.at
    return ", ".join(f"{name} {distance:g}" for name, distance in shown.items())


def _name_of(value: float) -> str:
    """NaN, Inf or -Inf."""
    return "NaN" if math.isnan(value) else "Inf" if value > 0 else "-Inf"


def _plus_minus(value: float, se: float | None) -> str:
    return f"{value:.4g}" if se is None else f"{value:.4g} +- {se:.1g}"


def _report(document: dict[str, Any]) -> PathReport:
    """A report from its JSON. Raises: ValueError, KeyError, TypeError, AttributeError, IndexError."""
    points = tuple(
        PathPoint(
            {n: snapped(float(v)) for n, v in p["at"].items()},
            {m: tuple(_NOT_FINITE[v] if isinstance(v, str) else float(v) for v in s) for m, s in p["samples"].items()},
            *(p[n] if p[n] is None else float(p[n]) for n in ("strength", "changed_fraction", "relative_change")),
        )
        for p in document["points"]
    )
    seeds, ends = tuple(map(int, document["seeds"])), dict(document["ends"])
    first = points[0]
    base = document["base"]
    if not all(type(text) is str for text in (*ends, *ends.values(), *document["probabilities"], base or "")):
        raise TypeError
    if not first.at:
        raise ValueError("its points have no alpha")
    if not all(math.isfinite(at) for p in points for at in p.at.values()):
        raise ValueError("an alpha is not finite")
    if len({tuple(p.at.values()) for p in points}) < len(points):
        raise ValueError("it has a point twice")
    for p in points:
        if list(p.at) != list(first.at) or list(p.samples) != list(first.samples):
            raise ValueError
        if any(len(s) != len(seeds) for s in p.samples.values()):
            raise ValueError
    probabilities, line = tuple(document["probabilities"]), bool(document["line"])
    return PathReport(ends, base, seeds, points, probabilities, line)


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return next(w for w, v in _NOT_FINITE.items() if v == value or (math.isnan(v) and math.isnan(value)))
    if isinstance(value, dict):
        return {k: _json(v) for k, v in value.items()}
    return [_json(v) for v in value] if isinstance(value, (list, tuple)) else value


def _write(file: str | os.PathLike[str] | None, text: str) -> None:
    if file is None:
        return
    try:
        FilePath(file).write_text(text, "utf-8")
    except OSError as error:
        raise StorageError(f"{os.fspath(file)} cannot be written: {error.strerror}") from None
