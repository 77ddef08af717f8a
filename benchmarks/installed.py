"""Races mergekit's `run_merge` as it is with itself after `fastinterp.integrations.mergekit.install()`.

    python -m benchmarks.installed MODELS_DIR [--only linear,ties] [--runs 3] [--out FILE.json]

By a Python that has mergekit and this package. MODELS_DIR holds base/, ft1/ and ft2/, BF16, as `fastinterp bench
--models DIR` makes them. Every merge has a process of its own, in turn; timed is the call of `run_merge`, without
imports. Before that, the two outputs are compared: an answer that is not the same ends the race.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastinterp.bench.check import read_tensors
from fastinterp.bench.provenance import provenance

THIN = {"weight": 0.5, "density": 0.5}
# method -> (its models, parameters of each but the base, parameters of the merge)
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "linear": (("ft1", "ft2"), {"weight": 0.5}, {}),
    "slerp": (("ft1", "ft2"), {}, {"t": 0.3}),
    "ties": (("base", "ft1", "ft2"), THIN, {}),
    "dare_ties": (("base", "ft1", "ft2"), THIN, {}),
}
ENGINES = ("mergekit", "installed")
_RANDOM = ("dare_ties",)  # their masks differ; lengths of the change do not
_STEP = 2.0**-7  # of bfloat16, relative
# Elements that may differ by more than a rounding. Deltas of bfloat16 models have few magnitudes, and of those that
# equal the threshold of ties mergekit keeps arbitrary ones, where all stay here.
_FEW = {"ties": 0.05}
_FEWEST = 1e-3


def recipe(method: str, models: Path) -> dict[str, Any]:
    names, each, once = CASES[method]
    found: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16", "parameters": once}
    based = method != "linear"
    found |= {"base_model": str(models / names[0])} if based else {}
    found["models"] = [{"model": str(models / name), "parameters": each} for name in (names[1:] if based else names)]
    return found


def once(engine: str, method: str, models: Path, out: Path) -> dict[str, float]:
    """Merge in this process: seconds of the call, those of all processors, and the most memory that the process had."""
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from fastinterp.integrations import mergekit

    config = MergeConfiguration.model_validate(recipe(method, models))
    if engine == "installed":
        mergekit.install()
    from mergekit.merge import run_merge

    options = MergeOptions(quiet=True, copy_tokenizer=False)
    wall, cpu = time.perf_counter(), time.process_time()
    run_merge(config, str(out), options=options)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall_s": wall, "cpu_s": cpu, "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def apart(engine: str, method: str, models: Path, out: Path) -> dict[str, float]:
    """`once` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.installed", str(models), "--once", engine, method, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or "by mergekit, not by fastinterp" in done.stderr:
        raise SystemExit(f"{engine} {method} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(method: str, models: Path, ours: Path, theirs: Path) -> dict[str, float]:
    """How the two outputs differ. Raises: SystemExit, if that is more than rounding."""
    mine, other, base = (read_tensors(folder) for folder in (ours, theirs, models / CASES[method][0][0]))
    if sorted(mine) != sorted(other):
        raise SystemExit(f"{method}: the tensors differ")
    count = wrong = 0
    lengths = np.zeros(2)
    for name, tensor in mine.items():
        numel = int(np.prod(tensor.shape))
        for first in range(0, numel, 1 << 24):
            size = min(1 << 24, numel - first)
            x, y, b = (t[name].read(first, size) for t in (mine, other, base))
            wrong += int(np.count_nonzero(np.abs(x - y) > _STEP * np.maximum(np.abs(x), np.abs(y)) + 1e-30))
            lengths += [np.sum((x - b) ** 2), np.sum((y - b) ** 2)]
        count += numel
    differing, ratio = wrong / count, float(np.sqrt(lengths[0] / lengths[1]))
    same = abs(ratio - 1.0) < 0.01 if method in _RANDOM else differing < _FEW.get(method, _FEWEST)
    if not same:
        raise SystemExit(f"{method}: {differing:.2%} of the elements differ, lengths of the change by {ratio:.4f}")
    return {"elements": count, "differing": differing, "length_ratio": ratio}


def measured(method: str, models: Path, runs: int) -> dict[str, Any]:
    walls: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    cpus: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir=models, prefix=".installed-") as work:
        outs = {engine: Path(work) / engine for engine in ENGINES}
        for engine in ENGINES:  # not timed: files come into the page cache
            peaks[engine] = apart(engine, method, models, outs[engine])["peak_rss_bytes"]
        answer = compared(method, models, outs["installed"], outs["mergekit"])
        for _ in range(runs):
            for engine in ENGINES:
                for file in outs[engine].glob("*"):
                    file.unlink()
                found = apart(engine, method, models, outs[engine])
                walls[engine].append(found["wall_s"])
                cpus[engine].append(found["cpu_s"])
    return {
        "same": True, "answer": answer, "wall_s": walls, "cpu_s": cpus, "peak_rss_bytes": peaks,
        "median_wall_s": {engine: statistics.median(w) for engine, w in walls.items()},
        "ratio": _ratio(walls), "cpu_ratio": _ratio(cpus),
    }  # fmt: skip


def _ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    """mergekit's over those with the engine installed, round by round."""
    ratios = [theirs / ours for theirs, ours in zip(seconds["mergekit"], seconds["installed"], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--only", default=",".join(CASES), help="methods, separated by commas")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="file for the results, as JSON")
    parser.add_argument("--once", nargs=3, metavar=("ENGINE", "METHOD", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.once:
        print(json.dumps(once(given.once[0], given.once[1], given.models, Path(given.once[2]))))
        return
    from importlib.metadata import version

    from benchmarks.tools import HEAD, row

    size = sum(file.stat().st_size for file in (given.models / "ft1").glob("*.safetensors"))
    results = {}
    print("\n".join(HEAD), flush=True)
    for method in given.only.split(","):
        found = results[method] = measured(method, given.models, given.runs)
        times = {
            racer: {clock: found[clock][engine] for clock in ("wall_s", "cpu_s")}
            for racer, engine in (("theirs", "mergekit"), ("ours", "installed"))
        }
        differing = found["answer"]["differing"]
        same = "lengths of the changes" if method in _RANDOM else f"{1 - differing:.2%} of the elements, to a rounding"
        print(row(f"mergekit {method}, models of {size / 1e9:.2f} GB", times, same), flush=True)
    values = {"benchmark": "installed", "model_bytes": size, "runs": given.runs, "mergekit": version("mergekit")}
    values |= {"provenance": provenance(given.models), "methods": results}
    if given.out:
        given.out.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
