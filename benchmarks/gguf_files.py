"""Races the average of two models in GGUF, Q8_0, against the same in BF16 safetensors; times a large header.

    python -m benchmarks.gguf_files MODELS_DIR [--runs 5] [--out FILE.json]

MODELS_DIR holds ft1/ and ft2/, BF16, as `fastinterp bench --models DIR` makes them. They are written again, once, as
ft1-q8_0.gguf: in BF16 by the package gguf, then by a merge of that alone. What comes out is compared with the
average in BF16: it may differ by the rounding of two inputs and of the output.
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

import gguf
import numpy as np

import fastinterp
from fastinterp.bench.check import WrongAnswerError, read_tensors
from fastinterp.bench.provenance import provenance
from fastinterp.bench.race import Racer, race
from fastinterp.checkpoint.gguf_file import read_gguf
from fastinterp.checkpoint.open import open_checkpoint

MODELS = ("ft1", "ft2")
KINDS = ("safetensors", "q8_0")
_TOKENS, _MERGES = 128_256, 280_147  # of the header that is timed: those of Llama 3
_COMPARED = 4096  # elements of a tensor, whole blocks


def main() -> None:
    """Run the race and print, or write, what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    models = asked.models.resolve()
    for name in MODELS:
        converted(models, name)
    found: dict[str, Any] = {"benchmark": "gguf_files", "provenance": provenance(models)}
    found |= {"average": averages(models, asked.runs), "header_s": header(models, asked.runs)}
    for name, racer in found["average"].items():
        peak = racer["peak_anon_bytes"] / 1e6
        print(f"{name:12} {racer['median_wall_s']:.3f} s  {peak:.0f} MB  x{1 / racer['ratio']['median']:.2f}")
    print(f"header with {_TOKENS:,} tokens and {_MERGES:,} merges: {found['header_s']:.3f} s")
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


def converted(models: Path, name: str) -> None:
    """The model in GGUF, in Q8_0; nothing, if that is there. Names of tensors stay: nothing loads it."""
    plain, blocks = models / f"{name}-bf16.gguf", models / f"{name}-q8_0.gguf"
    if not blocks.exists():
        writer = gguf.GGUFWriter(plain, "llama")
        for tensor, place in read_tensors(models / name).items():
            stored = np.memmap(place.file, np.uint8, "r", place.start, (*place.shape[:-1], 2 * place.shape[-1]))
            writer.add_tensor(tensor, stored, raw_dtype=gguf.GGMLQuantizationType.BF16)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        recipe = {"merge_method": "passthrough", "models": [{"model": str(plain)}]}
        fastinterp.merge(recipe, blocks, dtype="q8_0", device="cpu")
        plain.unlink()


def averages(models: Path, runs: int) -> dict[str, Any]:
    """The race. Raises: WrongAnswerError, if an output is wrong."""
    named = {k: [models / (m if k == "safetensors" else f"{m}-{k}.gguf") for m in MODELS] for k in KINDS}
    files = [f for pair in named.values() for model in pair for f in open_checkpoint(str(model)).files]
    with tempfile.TemporaryDirectory(dir=models, prefix=".race-") as scratch:
        work = Path(scratch)
        out = work / "out"
        racers = [
            Racer(
                kind,
                [sys.executable, "-m", "fastinterp", "average", *map(str, pair), "-o", str(out), "--quiet"],
                lambda: check(out, models),
            )
            for kind, pair in named.items()
        ]
        race(racers, files, work, runs=runs, cold=False, say=lambda _: None)
        return {r.name: r.as_dict(racers[0]) for r in racers}


def check(out: Path, models: Path) -> int:
    """Compare the start of every tensor with the mean of the models; returns how many elements.

    The scale d of a block is its largest magnitude over 127. A code is off by at most half of it: the inputs', in the
    mean, and the output's; with the rounding of scales to F16 that is less than 1.1 d. BF16 has 8 bits.
    """
    models_tensors = [read_tensors(models / m) for m in MODELS]
    compared = 0
    path = next(iter(out.glob("*.gguf")), None)
    stored = {} if path is None else {t.name: t for t in gguf.GGUFReader(path).tensors}
    plain = read_tensors(out) if path is None else {}
    for name, tensor in models_tensors[0].items():
        count = min(_COMPARED, math.prod(tensor.shape))
        inputs = [m[name].read(0, count) for m in models_tensors]
        want = (inputs[0] + inputs[1]) / 2
        bound = np.abs(want) * 2.0**-8 + 1e-30
        if path is None:
            got = plain[name].read(0, count)
        else:
            kind = stored[name].tensor_type
            raw = stored[name].data.reshape(-1)[: count // 32 * 34 if kind.name == "Q8_0" else 2 * count]
            got = gguf.quants.dequantize(raw, kind).astype(np.float64)
            if kind.name == "Q8_0":
                largest = np.max([np.abs(x).reshape(-1, 32).max(axis=1) for x in (*inputs, want)], axis=0)
                bound = np.repeat(1.1 * largest / 127, 32)
        if got.size != count or not (np.abs(got - want) <= bound).all():
            raise WrongAnswerError(f"{name} is wrong")
        compared += count
    return compared


def header(folder: Path, runs: int) -> float:
    """Median seconds of reading the header of a model with a large vocabulary."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        path = Path(scratch) / "x.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_token_list([f"token{i}" for i in range(_TOKENS)])
        writer.add_token_types([1] * _TOKENS)
        writer.add_token_merges([f"a{i} b{i}" for i in range(_MERGES)])
        for i in range(291):
            writer.add_tensor(f"blk.{i}.x.weight", np.zeros((4, 32), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            read_gguf(path)
            times.append(time.perf_counter() - start)
        return statistics.median(times)


if __name__ == "__main__":
    main()
