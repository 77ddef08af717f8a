"""Compares an output with an independent computation in float64, with numpy and a safetensors reader of its own.

It uses no part of fastinterp that is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.errors import CheckpointError, FastinterpError

# Bits of the stored significand, and the exponent of the smallest normal number.
_FORMATS = {"F32": (23, -126), "F16": (10, -14), "BF16": (7, -126), "F8_E4M3": (3, -6)}
_READ_AS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_RUN = 4096  # elements; three runs of every tensor are compared


class WrongAnswerError(FastinterpError):
    """The output of a program is wrong, so its time is not reported."""


@dataclass(frozen=True)
class Job:
    """The merge to compute: sum_i weights[i] * x_i, or with a base b + sum_i weights[i] * (x_i - b)."""

    models: tuple[Path, ...]  # folders
    weights: tuple[float, ...]
    base: Path | None = None

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The checkpoints that are read."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def method(self) -> str:
        return "linear" if self.base is None else "task_arithmetic"

    def recipe(self) -> dict[str, Any]:
        """The recipe for fastinterp and mergekit."""
        # A name with @ or + in it would be parsed, a path is not.
        name = [{"model": {"path": str(m)}} for m in self.inputs]
        models = [
            {"model": n, "parameters": {"weight": w}}
            for n, w in zip(name[-len(self.models) :], self.weights, strict=True)
        ]
        recipe: dict[str, Any] = {"merge_method": self.method, "models": models}
        return recipe if self.base is None else recipe | {"base_model": name[0]}


@dataclass(frozen=True, slots=True)
class Tensor:
    """The place of a tensor: `start` in bytes from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    def read(self, first: int, count: int) -> NDArray[np.float64]:
        """Elements first .. first + count - 1, without rounding."""
        kind = np.dtype(_READ_AS[self.dtype])
        with open(self.file, "rb") as stream:
            stream.seek(self.start + first * kind.itemsize)
            raw: NDArray[Any] = np.frombuffer(stream.read(count * kind.itemsize), kind)
        if self.dtype == "BF16":
            raw = (raw.astype(np.uint32) << 16).view(np.float32)
        return raw.astype(np.float64)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in the order of their names."""
    return sorted(folder.glob("*.safetensors"))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by name."""
    tensors = {}
    for file in weight_files(folder):
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            table = json.loads(stream.read(length))
        table.pop("__metadata__", None)
        for name, entry in table.items():
            tensors[name] = Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
    return tensors


def allowed_error(
    truth: NDArray[np.float64], largest: NDArray[np.float64], weights: Sequence[float], dtype: str, coarse: bool
) -> NDArray[np.float64]:
    """The largest error of a correct result, given the exact weighted sum `truth`: f64, elementwise.

    With M the largest magnitude among an element's inputs (`largest`), no intermediate result is larger than
    M * (1 + 2 * sum |w|). So r roundings to a unit roundoff u cannot move the sum by more than
    e = r * u * M * (1 + 2 * sum |w|), and the store adds half of the last place of a number that is at most e from the
    truth. r = 2n + 2 covers a product and a sum for each of n models, the weights, and a division. u is that of
    float32, or with `coarse` that of the dtype that is stored, for programs that compute in it.
    """
    mantissa, smallest = _FORMATS[dtype]
    unit = 2.0 ** -(mantissa + 1) if coarse else 2.0**-24
    at_zero = 2.0 ** (smallest - mantissa) if coarse else 2.0**-149  # the spacing of subnormal intermediate results
    error = (2 * len(weights) + 2) * (unit * largest * (1 + 2 * math.fsum(map(abs, weights))) + at_zero)
    exponent = np.frexp(np.abs(truth) + error)[1] - 1
    allowed: NDArray[np.float64] = error + np.ldexp(0.5, np.maximum(exponent, smallest) - mantissa)
    return allowed


def check(out: Path, job: Job, *, coarse: bool = False) -> int:
    """Compare three runs of 4096 elements of every tensor of the checkpoint in `out`. Returns the number compared.

    coarse  allow the error of a program that computes in the stored dtype, see allowed_error
    Raises: WrongAnswerError, with the first element that is wrong; CheckpointError, for dtypes that are not supported.
    """
    expected = read_tensors(job.models[0])
    got = read_tensors(out)
    inputs = [read_tensors(folder) for folder in job.inputs]
    if expected.keys() != got.keys():
        name = sorted(expected.keys() ^ got.keys())[0]
        raise WrongAnswerError(
            f"the tensors of the output are not those of {job.models[0].name}: first difference {name}"
        )
    compared = 0
    for name, tensor in expected.items():
        if tensor.dtype not in _READ_AS:
            raise CheckpointError(
                f"{tensor.dtype} is not supported here: checkpoints must be F32, F16 or BF16",
                file=str(tensor.file),
                tensor=name,
            )
        if (got[name].dtype, got[name].shape) != (tensor.dtype, tensor.shape):
            raise WrongAnswerError(
                f"{name} should be {tensor.dtype} {list(tensor.shape)}, got {got[name].dtype} {list(got[name].shape)}"
            )
        numel = math.prod(tensor.shape)
        for first in sorted({0, max(0, numel // 2 - _RUN // 2), max(0, numel - _RUN)}):
            count = min(_RUN, numel - first)
            x = [model[name].read(first, count) for model in inputs]
            _compare(got[name].read(first, count), x, job, tensor.dtype, coarse, f"{name}, from element {first}")
            compared += count
    return compared


def _compare(
    got: NDArray[np.float64], x: Sequence[NDArray[np.float64]], job: Job, dtype: str, coarse: bool, what: str
) -> None:
    base = np.zeros_like(got) if job.base is None else x[0]
    truth = base.copy()
    for weight, values in zip(job.weights, x[-len(job.weights) :], strict=True):
        truth += weight * (values - base)
    allowed = allowed_error(truth, np.max(np.abs(x), axis=0), job.weights, dtype, coarse)
    with np.errstate(invalid="ignore"):
        right = (np.abs(got - truth) <= allowed) | (got == truth) | (np.isnan(got) & np.isnan(truth))
    if not right.all():
        at = int(np.flatnonzero(~right)[0])
        raise WrongAnswerError(
            f"{what}: {int((~right).sum())} of {right.size} elements wrong, first number {at}: expected {truth[at]} "
            f"within {allowed[at]:.2g}, got {got[at]}"
        )
