"""Figures of metrics along a path, and of where two models differ. Needs matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.errors import StorageError, UsageError
from fastinterp.inspect.compare import Comparison, Difference
from fastinterp.messages import fit
from fastinterp.paths.layer_grid import grid
from fastinterp.presence import is_folder

Report = Any  # PathReport, which imports this module
# Okabe and Ito's palette, for any kind of colour vision.
_CURVE, _END, _EFFECTIVE = "#0072B2", "#D55E00", "#009E73"
_TEXT, _GREY, _SHADE = "#1a1a1a", "#6b6b6b", "#eef2f6"
_COLOURS = "viridis"
_STYLE = {
    "figure.dpi": 120,
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "svg.hashsalt": "fastinterp",  # the same figure gives the same file
    "svg.fonttype": "none",  # text stays text
}
_PANELS = 3  # in a row
_MOST_LABELLED = 64  # cells of a heat map with their value in them; more cells stay without
_TICKS = 24  # most labels of layers on an axis


def plot_report(report: Report, file: str | os.PathLike[str] | None, metrics: Sequence[str] | None = None) -> Any:
    """Curves along one direction, heat maps over two, as a figure of matplotlib. See PathReport.plot."""
    chosen = list(report.metrics if metrics is None else metrics)
    for name in chosen:
        report.check_metric(name)
    if not chosen or not 1 <= len(report.varied) <= 2:
        raise UsageError(
            f"one or two directions can be drawn, but the points vary in {len(report.varied)}: "
            f"{', '.join(report.varied) or 'there is one point'}"
        )
    if len(report.varied) == 2:
        return _figure(file, len(chosen), (4.6, 3.9), lambda axes: _maps(report, chosen, axes))
    staircase = any("staircase" in w for w in report.warnings) and report.line and report.base is None
    panels = len(chosen) + staircase
    return _figure(file, panels, (4.4, 3.4), lambda axes: _curves(report, chosen, axes[:panels]))


def plot_difference(comparison: Comparison, file: str | os.PathLike[str], title: str) -> None:
    """The relative change |d| / |a| of each kind of tensor in each layer, on a logarithmic scale.

    Raises: UsageError, if there is no matplotlib or nothing was measured; StorageError.
    """
    if not comparison.tensors:
        raise UsageError("no tensor is in both models with the same shape, so there is no change to draw")
    cells = grid(comparison.tensors)
    changes = {cell: Difference.total(comparison.tensors[n] for n in names) for cell, names in cells.cells.items()}
    values = [[_change(changes.get((kind, layer))) for layer in cells.layers] for kind in cells.kinds]
    width = 3.4 + 0.075 * max(map(len, cells.kinds)) + min(0.3 * len(cells.layers), 11)
    height = 1.5 + 0.26 * len(cells.kinds)
    title = fit(title, int(width * 9))
    _figure(file, 1, (width, height), lambda axes: _change_map(axes[0], values, cells.layers, cells.kinds, title))


def _change(difference: Difference | None) -> float | None:
    """The relative change |d| / |a|; 0: unchanged, NaN: undefined. None: there is no such tensor."""
    if difference is None:
        return None
    if difference.finite and not difference.changed:
        return 0.0
    return math.nan if difference.relative is None or not difference.finite else float(difference.relative)


def check_figure(file: str | os.PathLike[str]) -> tuple[Path, str]:
    """The path of a figure and its format: png, svg or pdf.

    Raises: UsageError, without matplotlib, or if the suffix is another one; StorageError, if there is no such folder.
    """
    _check_matplotlib()
    path = Path(file)
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg", "pdf"):
        raise UsageError(f"{path} must end in .png, .svg or .pdf, which is the format")
    if not is_folder(path.parent):
        raise StorageError(f"{path} cannot be written: No such file or directory: {path.parent}")
    return path, kind


def _check_matplotlib() -> None:
    if find_spec("matplotlib") is None:
        raise UsageError("figures need matplotlib: pip install 'fastinterp[plot]'")


def as_svg(figure: Any) -> str:
    """A figure as the text of an SVG element."""
    import io

    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None}, facecolor="white")
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _figure(
    file: str | os.PathLike[str] | None, panels: int, size: tuple[float, float], draw: Callable[[list[Any]], None]
) -> Any:
    """A figure of so many panels; written, if a file is named."""
    place = None if file is None else check_figure(file)  # first: it says that matplotlib is missing
    _check_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure

    across = min(panels, _PANELS)
    down = -(-panels // across)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(size[0] * across, size[1] * down), layout="constrained")
        axes = list(figure.subplots(down, across, squeeze=False).flat)
        draw(axes)
        for spare in axes[panels:]:
            spare.remove()
        if place is not None:
            path, kind = place
            dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
            try:
                figure.savefig(path, format=kind, metadata=dates.get(kind), facecolor="white")
            except OSError as error:
                raise StorageError(f"{path} cannot be written: {error.strerror}") from None
    return figure


# --- curves


def _curves(report: Report, metrics: Sequence[str], axes: Sequence[Any]) -> None:
    name = report.varied[0]
    for panel, metric in zip(axes, metrics, strict=False):
        xs, points = report.along(metric)
        ys = [y if math.isfinite(y) else math.nan for y in (p.mean(metric) for p in points)]
        errors = [p.se(metric) or 0.0 for p in points]
        _between(panel, xs)
        _chord(panel, dict(zip(xs, ys, strict=True)))
        panel.errorbar(
            xs, ys, yerr=errors if any(errors) else None, color=_CURVE, marker="o", markersize=3.5, linewidth=1.4,
            elinewidth=1, capsize=2, zorder=3,
        )  # fmt: skip
        panel.set_title(metric)
        panel.set_xlabel(name)
        panel.locator_params(axis="x", nbins=7)
        panel.grid(axis="y", color="#e3e3e3", linewidth=0.6)
        panel.set_axisbelow(True)
    panel = axes[0]
    panel.legend(frameon=False, fontsize=9, loc="best")
    if len(axes) > len(metrics):
        _staircase(report, axes[len(metrics)])


def _between(panel: Any, xs: Sequence[float]) -> None:
    if xs[0] < 0 or xs[-1] > 1:
        low, high = max(0.0, xs[0]), min(1.0, xs[-1])
        if low < high:
            panel.axvspan(low, high, color=_SHADE, linewidth=0, zorder=0, label="between the ends")


def _chord(panel: Any, at: Mapping[float, float]) -> None:
    """The straight line between the ends, and the ends themselves."""
    if 0.0 in at and 1.0 in at:
        ends = [at[0.0], at[1.0]]
        panel.plot([0, 1], ends, color=_GREY, linestyle=(0, (4, 3)), linewidth=1.2, zorder=2, label="chord")
    ends = [x for x in (0.0, 1.0) if x in at]
    if ends:
        panel.plot(
            ends, [at[x] for x in ends], linestyle="none", marker="D", markersize=7, markerfacecolor="white",
            markeredgecolor=_END, markeredgewidth=1.8, zorder=4, label="ends",
        )  # fmt: skip


def _staircase(report: Report, panel: Any) -> None:
    xs, points = report.along(report.metrics[0])
    panel.plot([xs[0], xs[-1]], [xs[0], xs[-1]], color=_GREY, linestyle=(0, (4, 3)), linewidth=1.2, label="exact")
    effective = [report.effective_alpha(p) for p in points]
    panel.plot(xs, effective, color=_EFFECTIVE, marker="s", markersize=3.5, linewidth=1.4, label="after rounding")
    panel.set_title("effective alpha")
    panel.set_xlabel(report.varied[0])
    panel.legend(frameon=False, fontsize=9)


# --- heat maps


def _maps(report: Report, metrics: Sequence[str], axes: Sequence[Any]) -> None:
    across, down = report.varied
    xs = sorted({p.at[across] for p in report.points})
    ys = sorted({p.at[down] for p in report.points})
    if len(xs) * len(ys) > 4 * len(report.points):
        raise UsageError(f"the points make no grid of {across} and {down}: a heat map of them would be mostly empty")
    at = {(p.at[across], p.at[down]): p for p in report.points}
    for panel, metric in zip(axes, metrics, strict=False):
        values = [[at[x, y].mean(metric) if (x, y) in at else math.nan for x in xs] for y in ys]
        image = _cells(panel, values, None)
        if len(xs) * len(ys) <= _MOST_LABELLED:
            _write(panel, image, values)
        panel.set_xticks([i + 0.5 for i in range(len(xs))], [f"{x:g}" for x in xs])
        panel.set_yticks([i + 0.5 for i in range(len(ys))], [f"{y:g}" for y in ys])
        panel.set(xlabel=across, ylabel=down)
        panel.set_title(metric)
        panel.figure.colorbar(image, ax=panel).outline.set_visible(False)


def _cells(panel: Any, values: Sequence[Sequence[float]], norm: Any) -> Any:
    image = panel.pcolormesh(np.ma.masked_invalid(np.array(values, dtype=float)), cmap=_COLOURS, norm=norm,
                             edgecolors="white", linewidth=0.6)  # fmt: skip
    for spine in panel.spines.values():
        spine.set_visible(False)
    panel.tick_params(length=0)
    return image


def _write(panel: Any, image: Any, values: Sequence[Sequence[float]]) -> None:
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
                panel.text(j + 0.5, i + 0.5, f"{value:.3g}", ha="center", va="center", fontsize=8,
                           color="black" if light else "white")  # fmt: skip


def _change_map(
    panel: Any, values: Sequence[Sequence[float | None]], layers: Sequence[str], kinds: Sequence[str], title: str
) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Patch, Rectangle

    positive = [v for row in values for v in row if v is not None and v > 0]
    low, high = (min(positive), max(positive)) if positive else (1e-3, 1.0)
    norm = LogNorm(low if low < high else low / 2, high if low < high else high * 2)
    image = _cells(panel, [[v or math.nan for v in row] for row in values], norm)
    marked = [("unchanged", 0.0, "#e0e0e0", ""), ("no number: a is 0, or NaN", math.nan, "white", "xxxx")]
    keys = []
    for label, wanted, face, hatch in marked:
        cells = [
            (j, i) for i, row in enumerate(values) for j, v in enumerate(row)
            if v is not None and (v == wanted or (math.isnan(v) and math.isnan(wanted)))
        ]  # fmt: skip
        style: dict[str, Any] = {
            "facecolor": face,
            "edgecolor": _GREY if hatch else "white",
            "hatch": hatch,
            "linewidth": 0.6,
        }
        for corner in cells:
            panel.add_patch(Rectangle(corner, 1, 1, **style))
        if cells:
            keys.append(Patch(label=label, **style))
    every = -(-len(layers) // _TICKS)
    first = 0 if layers[0] else 1
    shown = [i for i, layer in enumerate(layers) if not layer or (i - first) % every == 0]
    panel.set_xticks([i + 0.5 for i in shown], [layers[i] or "-" for i in shown])
    panel.set_yticks([i + 0.5 for i in range(len(kinds))], kinds)
    panel.invert_yaxis()
    panel.set_xlabel("layer" if layers[0] else "layer (-: in none)")
    # It may be wider than the map, which would shrink to make room for it.
    panel.set_title(title, x=0).set_in_layout(False)
    bar = panel.figure.colorbar(image, ax=panel, label="relative change |d| / |a|")
    bar.outline.set_visible(False)
    if keys:
        panel.legend(handles=keys, frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)
