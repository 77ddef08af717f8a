"""Points on lines and planes, made by fastinterp; and its promises about them, checked from outside."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

import fastinterp
from examples.paper_path import checkpoints

Ends = tuple[Path, Path]


@dataclass(frozen=True)
class Made:
    """Checkpoints by their alpha, and what making them cost."""

    folders: Mapping[float, Path]
    bytes_read: int
    bytes_of_inputs: int
    wall_s: float
    reports: Sequence[fastinterp.Report]

    def as_dict(self) -> dict[str, Any]:
        return {
            "outputs": len(self.folders),
            "bytes_read": self.bytes_read,
            "bytes_of_inputs": self.bytes_of_inputs,
            "wall_s": self.wall_s,
            "device": self.reports[0].device,
        }


def line(
    ends: Ends, alphas: Sequence[float], out: Path, *, dtype: str | None = None, rounding: str | None = None
) -> Made:
    """The checkpoints a + alpha * (b - a), where a and b are the ends."""
    made = fastinterp.sweep(*ends, alphas, out, dtype=dtype, rounding=rounding, seed=0, force=True)
    reports = [point.report for point in made if point.report is not None]
    inputs = sum(map(checkpoints.nbytes, ends))
    folders = {point.at["alpha"]: point.path for point in made if point.path is not None}
    return Made(folders, reports[0].bytes_read, inputs, reports[0].wall_s, reports)


def plane(base: Path, add: Mapping[str, Path], steps: Sequence[float], out: Path) -> dict[tuple[float, ...], Path]:
    """base + the sum of distance * (model - base), for every combination of distances, which name it."""
    made = fastinterp.sweep(base=base, add=add, grid=dict.fromkeys(add, steps), out=out, force=True)
    return {tuple(point.at.values()): point.path for point in made if point.path is not None}


def average(models: Sequence[Path], out: Path) -> Path:
    """Their mean."""
    parts = [{"model": str(model), "parameters": {"weight": 1.0}} for model in models]
    fastinterp.merge({"merge_method": "linear", "models": parts}, out, force=True)
    return out


# --- promises --------------------------------------------------------------------------------------------------------


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same tensors, byte for byte."""
    if {n: (t.dtype, t.shape) for n, t in a.items()} != {n: (t.dtype, t.shape) for n, t in b.items()}:
        return False
    return all(torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in a)


def scalar_line(a: Mapping[str, Tensor], b: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """a + alpha * (b - a) in float32, three roundings in this order: difference, product, sum.

    Of the sum of two terms that the engine computes, that of `a` against itself is zero, and adding a product to +0
    changes only the sign of a product that is -0.
    """
    if alpha in (0.0, 1.0):
        return dict(a if alpha == 0.0 else b)
    weight = np.float32(alpha / ((1.0 - alpha) + alpha))

    def element(x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
        return x + (weight * (y - x) + np.float32(0))

    return {n: torch.from_numpy(element(a[n].numpy(), b[n].numpy())) for n in a}


def promises(ends: Ends, made: Made) -> dict[str, Any]:
    """Which of the outputs have the bits of the ends, and of the reference above."""
    first, second = map(checkpoints.load, ends)
    wrong = [
        alpha
        for alpha, folder in made.folders.items()
        if not same_bits(checkpoints.load(folder), scalar_line(first, second, alpha))
    ]
    return {
        "alpha_0_has_the_bits_of_its_end": same_bits(checkpoints.load(made.folders[0.0]), first),
        "alpha_1_has_the_bits_of_its_end": same_bits(checkpoints.load(made.folders[1.0]), second),
        "outputs_with_other_bits_than_the_reference": wrong,
    }


# --- the staircase ---------------------------------------------------------------------------------------------------

STAIRCASE_ALPHAS = (0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)


def staircase(folder: Path, seed: int, *, numel: int = 1 << 22, spread: float = 1e-5) -> dict[str, Any]:
    """How far towards the end each alpha gets where a fine-tune moved bf16 weights by about one of their spacings.

    Weights are N(0, 0.02) in bf16, the fine-tune adds N(0, spread) and rounds. The effective alpha is the projection of
    what changed on the whole way; `told` is the same as fastinterp reports it, and `warned` whether it spoke up.
    """
    generator = torch.Generator().manual_seed(seed)
    start = (torch.randn(numel, generator=generator) * 0.02).bfloat16()
    end = (start.float() + torch.randn(numel, generator=generator) * spread).bfloat16()
    ends = folder / "start", folder / "end"
    for path, values in zip(ends, (start, end), strict=True):
        path.mkdir(parents=True, exist_ok=True)
        save_file({"weight": values.view(-1, 1024)}, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps({"model_type": "gpt2", "torch_dtype": "bfloat16"}))
    forms = {"nearest": (None, None), "stochastic": (None, "stochastic"), "float32": ("float32", None)}
    way = end.double() - start.double()
    found: dict[str, Any] = {"spread": spread, "numel": numel, "changed": (way != 0).double().mean().item()}
    for form, (dtype, rounding) in forms.items():
        made = line(ends, STAIRCASE_ALPHAS, folder / form, dtype=dtype, rounding=rounding)
        points = []
        for alpha, report in zip(STAIRCASE_ALPHAS, made.reports, strict=True):
            out = checkpoints.load(made.folders[alpha])["weight"].double().flatten()
            arrived = ((out - start.double()) @ way / (way @ way)).item()
            told = None if report.effect.strength is None else report.effect.strength * alpha
            warned = any("% of the change" in w for w in report.warnings)
            points.append({"alpha": alpha, "arrived": arrived, "told": told, "warned": warned})
        found[form] = points
    return found
