"""Races the average of two models in files of torch.save against the same in safetensors; times the header of many.

    python -m benchmarks.pytorch_files MODELS_DIR [--runs 5] [--out FILE.json]

MODELS_DIR holds ft1/ and ft2/, BF16, as `fastinterp bench --models DIR` makes them. They are written again, once, by
torch.save, in as many files, as ft1-torch/ and ft2-torch/. Both averages must have the same tensors.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fastinterp.bench.check import WrongAnswerError, read_tensors, weight_files
from fastinterp.bench.provenance import provenance
from fastinterp.bench.race import Racer, race
from fastinterp.checkpoint.open import open_checkpoint

MODELS = ("ft1", "ft2")
_TENSORS = 10_000  # of the file whose header is timed
_COMPARED = 10_000  # elements of a tensor


def main() -> None:
    """Run the race and print, or write, what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    models = asked.models.resolve()
    for name in MODELS:
        pickled(models / name, models / f"{name}-torch")
    found: dict[str, Any] = {"benchmark": "pytorch_files", "provenance": provenance(models)}
    found |= {"average": averages(models, asked.runs), "header_s": header(models, asked.runs)}
    for name, racer in found["average"].items():
        peak = racer["peak_anon_bytes"] / 1e6
        print(f"{name:12} {racer['median_wall_s']:.3f} s  {peak:.0f} MB  x{1 / racer['ratio']['median']:.2f}")
    print(f"header of a file of {_TENSORS:,} tensors: {found['header_s']:.3f} s")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def pickled(source: Path, target: Path) -> None:
    """The model in `source` written by torch.save, a file for each of its files; nothing, if that is there."""
    import torch
    from safetensors.torch import load_file

    if target.exists():
        return
    target.mkdir()
    weight_map: dict[str, str] = {}
    for file in weight_files(source):
        name = file.name.replace("model", "pytorch_model").replace(".safetensors", ".bin")
        state = load_file(file)
        torch.save(state, target / name)
        weight_map |= dict.fromkeys(state, name)
    if len(set(weight_map.values())) > 1:
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def averages(models: Path, runs: int) -> dict[str, Any]:
    """The race. Raises: WrongAnswerError, if the outputs differ."""
    folders = {"safetensors": [models / m for m in MODELS], "torch.save": [models / f"{m}-torch" for m in MODELS]}
    files = [f for pair in folders.values() for folder in pair for f in open_checkpoint(str(folder)).files]
    with tempfile.TemporaryDirectory(dir=models, prefix=".race-") as scratch:
        work = Path(scratch)
        out = work / "out"
        want: dict[str, bytes] = {}  # of the first output

        def check() -> int:
            stored = read_tensors(out)
            counts = {name: min(_COMPARED, math.prod(t.shape)) for name, t in stored.items()}
            got = {name: t.read(0, counts[name]).tobytes() for name, t in stored.items()}
            want.update(got if not want else {})
            if got != want:
                raise WrongAnswerError("the outputs differ")
            return sum(counts.values())

        racers = [
            Racer(
                name, [sys.executable, "-m", "fastinterp", "average", *map(str, pair), "-o", str(out), "--quiet"], check
            )
            for name, pair in folders.items()
        ]
        race(racers, files, work, runs=runs, cold=False, say=lambda _: None)
        return {r.name: r.as_dict(racers[0]) for r in racers}


def header(folder: Path, runs: int) -> float:
    """Median seconds of opening a file of torch.save with many small tensors, as those of many experts."""
    import torch

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "x.pt"
        names = (f"model.layers.{i // 128}.mlp.experts.{i % 128}.up_proj.weight" for i in range(_TENSORS))
        torch.save({name: torch.zeros(4, 4, dtype=torch.bfloat16) for name in names}, path)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            open_checkpoint(str(path))
            times.append(time.perf_counter() - start)
        return statistics.median(times)


if __name__ == "__main__":
    main()
