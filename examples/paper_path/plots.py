"""The figures of the report, as SVG. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from examples.paper_path.acceptance import at, fit_log_odds

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "fastinterp"  # the same results give the same file
mpl.rcParams["svg.fonttype"] = "none"  # text stays text: small files that can be searched
mpl.rcParams["font.size"] = 9

OWN, SECOND, THIRD, GREY = "#1f6f8b", "#c8553d", "#588157", "#8a8a8a"
Points = Sequence[Mapping[str, Any]]
T = TypeVar("T")


def write(results: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """All of them; their names."""
    drawn: dict[str, Callable[[Sequence[Mapping[str, Any]]], Figure]] = {
        "path.svg": path,
        "plane.svg": plane,
        "controls.svg": controls,
        "staircase.svg": staircase,
    }
    return save(drawn, results, folder)


def save(drawn: Mapping[str, Callable[[T], Figure]], results: T, folder: Path) -> list[str]:
    """Draw figures of results into files; their names."""
    for name, draw in drawn.items():
        draw(results).savefig(folder / name, metadata={"Date": None})
    return list(drawn)


def curve(axes: Any, walks: Sequence[Points], key: str, colour: str, label: str) -> None:
    """The mean over the seeds, one standard error of it to each side, and every seed as a thin line."""
    x = np.array([p["alpha"] for p in walks[0]])
    y = np.array([[np.nan if p[key] is None else p[key] for p in walk] for walk in walks], float)
    mean = y.mean(0)
    for row in y if len(y) > 1 else ():
        axes.plot(x, row, color=colour, linewidth=0.6, alpha=0.5)
    if len(y) > 1:
        error = y.std(0, ddof=1) / len(y) ** 0.5
        axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.25, linewidth=0)
    axes.plot(x, mean, color=colour, linewidth=1.6, marker=".", markersize=4, label=label)


def chord(axes: Any, walks: Sequence[Points], key: str) -> None:
    """The straight line between the ends, which are marked."""
    ends = [float(np.mean([at(walk, alpha=a)[key] for walk in walks])) for a in (0, 1)]
    axes.plot((0, 1), ends, color=GREY, linestyle="--", linewidth=1, label="chord")
    axes.plot((0, 1), ends, "o", color="black", markersize=5)


def inside(axes: Any) -> None:
    axes.axvspan(0, 1, color="#eeeeee", zorder=0)
    axes.set_xlabel("alpha: 0 is neg, 1 is pos")


def path(results: Sequence[Mapping[str, Any]]) -> Figure:
    """From neg to pos and beyond: attribute, its log-odds, likelihood, grammar."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flat
    lines = [r["line"] for r in results]
    curve(axes[0], lines, "positive", OWN, "P(positive)")
    curve(axes[0], lines, "formal", THIRD, "P(formal), not touched")
    axes[0].set_title("share of positive words, counted")
    curve(axes[1], lines, "positive_log_odds", OWN, "log-odds")
    slope, intercept, fit = np.mean([fit_log_odds(r) for r in results], 0)
    axes[1].plot((0, 1), (intercept, intercept + slope), color=SECOND, label=f"slope {slope:.1f}, R² {fit:.3f}")
    axes[1].set_title("log-odds of positive words")
    curve(axes[2], lines, "nll_mixed", OWN, "mixed text")
    curve(axes[2], lines, "nll_pos", THIRD, "positive text")
    curve(axes[2], lines, "nll_neg", SECOND, "negative text")
    chord(axes[2], lines, "nll_mixed")
    axes[2].set_title("negative log-likelihood of held-out text, nats per byte")
    curve(axes[3], lines, "grammatical", OWN, "grammatical")
    chord(axes[3], lines, "grammatical")
    if all("base" in r for r in results):
        for n, key in ((2, "nll_mixed"), (3, "grammatical")):
            axes[n].axhline(np.mean([r["base"][key] for r in results]), color=GREY, linestyle=":", label="base")
    axes[3].set_title("share of grammatical sentences, parsed")
    for a in axes:
        inside(a)
        a.legend(fontsize=8)
    return figure


def plane(results: Sequence[Mapping[str, Any]]) -> Figure:
    """base + a (pos - base) + b (formal - base), means over the seeds."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    titles = {"positive": "P(positive)", "formal": "P(formal)", "grammatical": "grammatical"}
    sides = sorted({p["towards_pos"] for p in results[0]["plane"]})
    for axes, (key, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        rows = [[[at(r["plane"], towards_pos=a, towards_formal=b)[key] for r in results] for a in sides] for b in sides]
        cells = np.array(rows).mean(-1)
        axes.imshow(cells, origin="lower", vmin=0, vmax=1, cmap="viridis")
        for (row, column), value in np.ndenumerate(cells):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.6 else "black")
        ticks = [f"{s:g}" for s in sides]
        axes.set(title=title, xlabel="towards pos", xticks=range(len(sides)), yticks=range(len(sides)))
        axes.set(xticklabels=ticks, yticklabels=ticks, ylabel="towards formal")
    return figure


def controls(results: Sequence[Mapping[str, Any]]) -> Figure:
    """What must not work: other initialisations, and other directions."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    curve(left, [r["independent"] for r in results], "nll_mixed", SECOND, "two bases, initialised independently")
    line = [[p for p in r["line"] if 0 <= p["alpha"] <= 1] for r in results]
    curve(left, line, "nll_mixed", OWN, "two fine-tunes of one base")
    left.set(title="NLL of mixed text, nats per byte", xlabel="alpha")
    left.set_ylim(0, left.get_ylim()[1] * 1.3)  # room for the legend over the peak
    curve(right, [[{"alpha": 0.0, **r["base"]}, *r["random"]] for r in results], "positive", SECOND, "random direction")
    anchored = [sorted([{"alpha": 0.0, **r["base"]}, *r["anchored"]], key=lambda p: float(p["alpha"])) for r in results]
    curve(right, anchored, "positive", OWN, "pos - base")
    curve(right, anchored, "grammatical", THIRD, "pos - base: grammatical")
    right.set(title="base + alpha * direction: P(positive)", xlabel="alpha")
    for axes in (left, right):
        axes.legend(fontsize=8)
    return figure


def staircase(results: Sequence[Mapping[str, Any]]) -> Figure:
    """What arrives of alpha where a fine-tune moved bf16 weights by about one spacing."""
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    forms = {"float32": GREY, "nearest": SECOND, "stochastic": THIRD}
    for form, colour in forms.items():
        points = results[0]["staircase"][form]
        y = [np.mean([r["staircase"][form][i]["arrived"] for r in results]) for i in range(len(points))]
        label = form if form == "float32" else f"bf16, {form}"
        width = 5 if form == "float32" else 1.5  # stochastic rounding lies on top of it
        axes.plot([p["alpha"] for p in points], y, color=colour, marker=".", linewidth=width, label=label)
    axes.set(title="alpha as it acts on small changes", xlabel="alpha asked for", ylabel="alpha that arrived")
    axes.legend(fontsize=8)
    return figure
