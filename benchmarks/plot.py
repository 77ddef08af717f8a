"""Draws benchmarks/results/ as one picture: whole merges on the left, kernels on the right. Needs matplotlib.

python -m benchmarks.plot [OUT.svg]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.table import RIVALS, load
from fastinterp.messages import size

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "fastinterp"  # the same results give the same file

OWN, OTHER = "#1f6f8b", "#b8b8b8"
RESULTS = Path(__file__).resolve().parent / "results"


def races(axes: Any, found: list[dict[str, Any]]) -> None:
    """The largest warm race with most rivals: seconds, on a logarithmic scale."""
    race = max(found, key=lambda r: (r["cache"] == "warm", len(r["racers"]), r["model_bytes"]))
    names = list(race["racers"])[::-1]
    seconds = [race["racers"][name]["median_wall_s"] for name in names]
    bars = axes.barh(
        [RIVALS.get(n, n) for n in names], seconds, color=[OWN if n == "fastinterp" else OTHER for n in names]
    )
    axes.bar_label(bars, [f" {s:.2f} s" for s in seconds])
    axes.set(xscale="log", xlabel="wall time, s (logarithmic)", xlim=(min(seconds) / 3, max(seconds) * 5))
    what = f"{race['recipe']} of {race['inputs']} checkpoints of {size(race['model_bytes'])}"
    axes.set_title(f"{what}\n{race['cache']} page cache, process start included", fontsize=10)


def kernels(axes: Any, benchmarks: list[dict[str, Any]]) -> None:
    """In memory, all threads, one output: the percentage of a copy's speed that fastinterp and the best rival reach."""
    every = [b["extra_info"] for b in benchmarks]
    threads = max(e["threads"] for e in every)
    mine = [e for e in every if (e["rival"], e["place"], e["threads"], e["k"]) == ("fastinterp", "memory", threads, 1)]
    for y, e in enumerate(mine):
        same = [o for o in every if all(o[f] == e[f] for f in ("dtype", "n", "k", "place", "threads"))]
        rivals = [o["percent_of_copy"] for o in same if o["rival"] != "fastinterp"]
        axes.barh(y + 0.2, e["percent_of_copy"], 0.4, color=OWN, label="fastinterp" if y == 0 else None)
        if rivals:
            axes.barh(y - 0.2, max(rivals), 0.4, color=OTHER, label="best other" if y == 0 else None)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks(range(len(mine)), [f"{e['dtype']}, {e['n']} inputs" for e in mine])
    axes.set_xlabel("% of the speed of a copy of as many bytes")
    axes.set_title(f"kernels in memory, {threads} threads", fontsize=10)
    axes.legend()


def main() -> None:
    from matplotlib import pyplot as plt

    found, timed = load(RESULTS)
    figure, axes = plt.subplots(1, 2 if timed else 1, figsize=(11 if timed else 6, 4.5), squeeze=False)
    races(axes[0][0], found)
    if timed:
        kernels(axes[0][1], timed["benchmarks"])
    where = found[0]["provenance"]
    figure.suptitle(f"{where['cpu']}, {where['cores']} cores, {where['file_system']}; fastinterp {where['fastinterp']}")
    figure.tight_layout()
    figure.savefig(sys.argv[1] if len(sys.argv) > 1 else RESULTS / "results.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
