"""Races the average of two models in GGUF, Q8_0, against the same in BF16 safetensors; times a large header.

    python -m benchmarks.gguf_files MODELS_DIR [--runs 5] [--out FILE.json]

MODELS_DIR holds ft1/ and ft2/, BF16, as `fastinterp bench --models DIR` makes them. They are written again, once, as
ft1-q8_0.gguf: in BF16 by the package gguf, then by a merge of that alone. What comes out is compared with the
average in BF16: it may differ by the rounding of two inputs and of the output.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import gguf
import numpy as np

import fastinterp
from benchmarks.file_races import MODELS, main, median_seconds
from fastinterp.bench.check import WrongAnswerError, read_tensors
from fastinterp.checkpoint.gguf_file import read_gguf

_TOKENS, _MERGES = 128_256, 280_147  # of the header that is timed: those of Llama 3
_COMPARED = 4096  # elements of a tensor, whole blocks


def prepared(models: Path) -> dict[str, list[Path]]:
    for name in MODELS:
        converted(models, name)
    return {"safetensors": [models / m for m in MODELS], "q8_0": [models / f"{m}-q8_0.gguf" for m in MODELS]}


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
        return median_seconds(lambda: read_gguf(path), runs)


if __name__ == "__main__":
    main(
        "gguf_files", __doc__, prepared, lambda models: lambda out: check(out, models), header,
        f"a model with {_TOKENS:,} tokens and {_MERGES:,} merges",
    )  # fmt: skip
