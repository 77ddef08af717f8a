"""The data that the page shows besides text, as JSON: sliders, metrics, and how much each layer changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastinterp.inspect.compare import Deltas
from fastinterp.paths.explore.sliders import Sliders
from fastinterp.paths.layer_grid import grid
from fastinterp.paths.report import PathReport


def facts(
    sliders: Sliders,
    changes: Mapping[str, Deltas],
    report: PathReport | None,
    *,
    prompt: str,
    low: float,
    high: float,
    most_tokens: int,
    chat: bool = False,
) -> dict[str, Any]:
    """What the page loads once, as plain values for JSON, without NaN and Inf.

    changes  of each tensor the squared norm of the base, and the Gram matrix of the deltas
    low, high  range of the sliders
    chat     prompts are messages of a conversation
    """
    return {
        "most_tokens": most_tokens,
        "chat": chat,
        "base": sliders.base,
        "sliders": [
            {"name": name, "model": model, "start": sliders.start[name], "low": low, "high": high}
            for name, model in sliders.models.items()
        ],
        "prompt": prompt,
        "change": _change(changes, len(sliders.models)),
        "report": None if report is None else _curves(report),
    }


def _change(changes: Mapping[str, Deltas], k: int) -> dict[str, Any]:
    """For each cell of the grid |base|^2 and the Gram matrix of the deltas, which the page combines for any setting."""
    layout = grid(changes)
    cells = []
    for (kind, layer), names in layout.cells.items():
        aa = math.fsum(changes[n].aa for n in names)
        gram = [[math.fsum(changes[n].gram[i][j] for n in names) for j in range(k)] for i in range(k)]
        finite = math.isfinite(aa) and all(math.isfinite(v) for row in gram for v in row)
        position = {"kind": layout.kinds.index(kind), "layer": layout.layers.index(layer)}
        cells.append({**position, "aa": aa if finite else None, "gram": gram if finite else None})
    return {"layers": layout.layers, "kinds": layout.kinds, "cells": cells}


def _curves(report: PathReport) -> dict[str, Any]:
    def finite(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    points = [
        {
            "at": dict(p.at),
            "mean": {m: finite(p.mean(m)) for m in report.metrics},
            "se": {m: finite(p.se(m)) for m in report.metrics},
        }
        for p in report.points
    ]
    return {"metrics": list(report.metrics), "varied": list(report.varied), "points": points}
