"""The figures of the report, as SVG. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.paper_path.plots import GREY, OWN, SECOND, THIRD, save  # and its settings of matplotlib
from examples.real_path.margins import Results, at, of_the_way, preference

Value = Callable[[Results], float]


def write(results: Sequence[Results], folder: Path) -> list[str]:
    """All of them; their names."""
    drawn: dict[str, Callable[[Sequence[Results]], Figure]] = {
        "path.svg": path,
        "staircase.svg": staircase,
        "plane.svg": plane,
    }
    return save(drawn, results, folder)


def key(name: str) -> Value:
    return lambda p: float(p[name])


def curve(axes: Any, walks: Sequence[Sequence[Results]], value: Value, colour: str, label: str,
          error: Value | None = None, **style: Any) -> None:  # fmt: skip
    """The mean over the training seeds, every seed as a thin line.

    error  of a point: the standard error over its generation seeds; bars show that of the mean of the seeds
    """
    x = np.array([p["alpha"] for p in walks[0]])
    y = np.array([[value(p) for p in walk] for walk in walks])
    for row in y if len(y) > 1 else ():
        axes.plot(x, row, color=colour, linewidth=0.5, alpha=0.45)
    bars = None
    if error is not None:
        squares = np.array([[error(p) ** 2 for p in walk] for walk in walks])
        bars = np.sqrt(squares.sum(0)) / len(walks)
    axes.errorbar(x, y.mean(0), bars, color=colour, linewidth=1.5, marker=".", markersize=4, capsize=2, label=label,
                  **style)  # fmt: skip


def path(results: Sequence[Results]) -> Figure:
    """From neg to pos and beyond: sentiment, shares, likelihood, fluency."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    axes = list(figure.subplots(2, 2).flat)
    lines = [r["line"] for r in results]

    def error(name: str) -> Value:
        return lambda p: float(p["errors"][name])

    curve(axes[0], lines, key("sentiment"), OWN, "full fine-tunes", error("sentiment"))
    if all(r.get("lora") for r in results):
        curve(axes[0], [r["lora"] for r in results], key("sentiment"), SECOND, "LoRA", error("sentiment"))
    axes[0].set_title("sentiment of generated text (VADER's compound)")
    curve(axes[1], lines, key("positive"), THIRD, "positive", error("positive"))
    curve(axes[1], lines, key("negative"), SECOND, "negative", error("negative"))
    axes[1].set_title("share of generated texts")
    for name, colour in (("nll", OWN), ("nll_positive", THIRD), ("nll_negative", SECOND)):
        label = "all" if name == "nll" else name.removeprefix("nll_")
        curve(axes[2], lines, key(name), colour, label)
    ends = [np.mean([at(line, alpha=a)["nll"] for line in lines]) for a in (0, 1)]
    axes[2].plot((0, 1), ends, color=GREY, linestyle="--", linewidth=1, label="chord")
    axes[2].set_title("NLL of held-out snippets, nats per token")
    curve(axes[3], lines, key("distinct_2"), OWN, "distinct pairs of words")
    curve(axes[3], lines, key("repetition"), SECOND, "repeated threes of words", error("repetition"))
    axes[3].set_title("fluency")
    for a in axes:
        a.axvspan(0, 1, color="#eeeeee", zorder=0)
        a.set_xlabel("alpha: 0 is neg, 1 is pos")
        a.legend(fontsize=8)
    return figure


def staircase(results: Sequence[Results]) -> Figure:
    """What the same alphas do in float32, in bf16 rounded to nearest, and stochastically: in weights, in behaviour."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    styles = {"float32": (OWN, "-"), "nearest": (SECOND, "-"), "stochastic": (THIRD, "--")}
    names = {"nearest": "bf16, nearest", "stochastic": "bf16, stochastic", "float32": "float32"}
    ways = [{id(p): of_the_way(r, p) for w in ("line", "nearest", "stochastic") for p in r[w]} for r in results]
    way = {k: v for one in ways for k, v in one.items()}
    for form, (colour, dashes) in styles.items():
        stairs = [r["weights"][form] for r in results]
        curve(axes[0], stairs, key("arrived"), colour, names[form], linestyle=dashes)
        walks = [[p for p in r["line"] if 0 <= p["alpha"] <= 1] if form == "float32" else r[form] for r in results]
        curve(axes[1], walks, lambda p: way[id(p)], colour, names[form], linestyle=dashes)
        curve(axes[2], walks, key("sentiment"), colour, names[form], linestyle=dashes)
    axes[0].set_title("alpha that arrives in the weights")
    axes[1].set_title("preference for positive text, of its way")
    axes[2].set_title("sentiment of generated text")
    for a in axes:
        a.set_xlabel("alpha")
        a.legend(fontsize=8)
    return figure


def plane(results: Sequence[Results]) -> Figure:
    """base + a (pos - base) + b (short - base), means over the training seeds."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    shown: dict[str, Value] = {
        "sentiment": key("sentiment"),
        "preference for positive text": preference,
        "share of texts that ended": key("ended"),
    }
    for axes, (title, value) in zip(figure.subplots(1, 3), shown.items(), strict=True):
        points = results[0]["plane"]
        xs, ys = sorted({p["pos"] for p in points}), sorted({p["short"] for p in points})
        grid = np.array([[np.mean([value(at(r["plane"], pos=x, short=y)) for r in results]) for x in xs] for y in ys])
        axes.imshow(grid, origin="lower", cmap="viridis")
        for i, j in np.ndindex(grid.shape):
            axes.text(j, i, f"{grid[i, j]:.2f}", ha="center", va="center", color="white", fontweight="bold")
        axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
        axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
        axes.set_xlabel("towards pos")
        axes.set_ylabel("towards short")
        axes.set_title(title)
    return figure
