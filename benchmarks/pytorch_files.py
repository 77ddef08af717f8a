"""Races the average of two models in files of torch.save against the same in safetensors; times the header of many.

    python -m benchmarks.pytorch_files MODELS_DIR [--runs 5] [--out FILE.json]

MODELS_DIR holds ft1/ and ft2/, BF16, as `fastinterp bench --models DIR` makes them. They are written again, once, by
torch.save, in as many files, as ft1-torch/ and ft2-torch/. Both averages must have the same tensors.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.file_races import MODELS, main, median_seconds
from fastinterp.bench.check import WrongAnswerError, read_tensors, weight_files
from fastinterp.checkpoint.open import open_checkpoint

_TENSORS = 10_000  # of the file whose header is timed
_COMPARED = 10_000  # elements of a tensor


def prepared(models: Path) -> dict[str, list[Path]]:
    for name in MODELS:
        pickled(models / name, models / f"{name}-torch")
    return {"safetensors": [models / m for m in MODELS], "torch.save": [models / f"{m}-torch" for m in MODELS]}


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


def checks(_: Path) -> Callable[[Path], int]:
    """Compares the start of every tensor of an output with that of the first output."""
    want: dict[str, bytes] = {}

    def check(out: Path) -> int:
        stored = read_tensors(out)
        counts = {name: min(_COMPARED, math.prod(t.shape)) for name, t in stored.items()}
        got = {name: t.read(0, counts[name]).tobytes() for name, t in stored.items()}
        want.update(got if not want else {})
        if got != want:
            raise WrongAnswerError("the outputs differ")
        return sum(counts.values())

    return check


def header(folder: Path, runs: int) -> float:
    """Median seconds of opening a file of torch.save with many small tensors, as those of many experts."""
    import torch

    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "x.pt"
        names = (f"model.layers.{i // 128}.mlp.experts.{i % 128}.up_proj.weight" for i in range(_TENSORS))
        torch.save({name: torch.zeros(4, 4, dtype=torch.bfloat16) for name in names}, path)
        return median_seconds(lambda: open_checkpoint(str(path)), runs)


if __name__ == "__main__":
    main("pytorch_files", __doc__, prepared, checks, header, f"a file of {_TENSORS:,} tensors")
