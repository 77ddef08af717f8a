"""The average of two models in one kind of files against the same in another, as benchmarks of such kinds have it."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastinterp.bench.provenance import provenance
from fastinterp.bench.race import Racer, race
from fastinterp.checkpoint.open import open_checkpoint

MODELS = ("ft1", "ft2")  # of MODELS_DIR


def main(
    benchmark: str,
    description: str | None,
    prepare: Callable[[Path], Mapping[str, Sequence[Path]]],
    checks: Callable[[Path], Callable[[Path], int]],
    header: Callable[[Path, int], float],
    header_of: str,
) -> None:
    """Run the race and print, or write, what it found.

    prepare    makes what is missing of the models in a folder; by kind, the models that are averaged
    checks     of that folder, what compares an output: it returns how many elements, or raises WrongAnswerError
    header     median seconds of reading a header, of so many runs in a folder; header_of: of what, for people
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    models = asked.models.resolve()
    found: dict[str, Any] = {
        "benchmark": benchmark,
        "provenance": provenance(models),
        "average": averages(models, prepare(models), asked.runs, checks(models)),
        "header_s": header(models, asked.runs),
    }
    for name, racer in found["average"].items():
        peak = racer["peak_anon_bytes"] / 1e6
        print(f"{name:12} {racer['median_wall_s']:.3f} s  {peak:.0f} MB  x{1 / racer['ratio']['median']:.2f}")
    print(f"header of {header_of}: {found['header_s']:.3f} s")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def averages(
    models: Path, kinds: Mapping[str, Sequence[Path]], runs: int, check: Callable[[Path], int]
) -> dict[str, Any]:  # fmt: skip
    """The race, in processes of their own, in turn; ratios are over the first kind."""
    files = [f for pair in kinds.values() for model in pair for f in open_checkpoint(str(model)).files]
    with tempfile.TemporaryDirectory(dir=models, prefix=".race-") as scratch:
        out = Path(scratch) / "out"
        racers = [
            Racer(
                kind, [sys.executable, "-m", "fastinterp", "average", *map(str, pair), "-o", str(out), "--quiet"],
                lambda: check(out),
            )
            for kind, pair in kinds.items()
        ]  # fmt: skip
        race(racers, files, Path(scratch), runs=runs, cold=False, say=lambda _: None)
        return {r.name: r.as_dict(racers[0]) for r in racers}


def median_seconds(run: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
