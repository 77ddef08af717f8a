"""A direction that means nothing, and how far rounding lets an alpha get."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastinterp
from examples.real_path.design import STAIRS

FORMS: dict[str, dict[str, str]] = {
    "nearest": {"dtype": "bfloat16"},
    "stochastic": {"dtype": "bfloat16", "rounding": "stochastic"},
    "float32": {"dtype": "float32"},
}


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model's one file, as they are stored."""
    return load_file(folder / "model.safetensors")


def random_end(neg: Path, pos: Path, target: Path, seed: int) -> None:
    """A checkpoint: `neg`, each tensor moved in a random direction as far as it is from `neg` to `pos`."""
    generator = torch.Generator().manual_seed(seed)
    a, b = weights(neg), weights(pos)
    moved = {}
    for name, start in a.items():
        direction = torch.randn(start.shape, generator=generator)
        way = (b[name].float() - start.float()).norm()
        moved[name] = (start.float() + direction * (way / direction.norm())).to(start.dtype)
    target.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "generation_config.json"):
        shutil.copy(neg / file, target / file)
    save_file(moved, target / "model.safetensors", metadata={"format": "pt"})


def arrived(start: Mapping[str, Tensor], end: Mapping[str, Tensor], point: Mapping[str, Tensor]) -> float:
    """The projection of what changed from `start` on the whole way to `end`: the alpha that a point acts as."""
    along = whole = 0.0
    for name, a in start.items():
        way = end[name].float() - a.float()
        change = point[name].float() - a.float()
        along += (change * way).sum(dtype=torch.float64).item()
        whole += (way * way).sum(dtype=torch.float64).item()
    return along / whole


def staircase(neg: Path, pos: Path, alphas: tuple[float, ...] = STAIRS) -> dict[str, Any]:
    """For each form of storage: the alpha that arrives in the weights, and the one that fastinterp reports."""
    a, b = weights(neg), weights(pos)
    same = sum(torch.sum(a[n] == b[n]).item() for n in a) / sum(t.numel() for t in a.values())
    way = sum(torch.dist(a[n].float(), b[n].float()).item() ** 2 for n in a) ** 0.5
    whole = sum(t.float().norm().item() ** 2 for t in a.values()) ** 0.5
    found: dict[str, Any] = {"changed": 1 - same, "relative_length": way / whole}
    for form, how in FORMS.items():
        line = fastinterp.path(neg, pos, threads=1, **how)  # type: ignore[arg-type]
        report = line.evaluate(lambda point, _alpha, _seed: {"arrived": arrived(a, b, point)}, alphas)
        found[form] = [
            {"alpha": p.at["alpha"], "arrived": p.mean("arrived"), "told": report.effective_alpha(p)}
            for p in report.points
        ]
    return found


def same_bits(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two models have the same tensors, byte for byte."""
    if {n: (t.dtype, t.shape) for n, t in a.items()} != {n: (t.dtype, t.shape) for n, t in b.items()}:
        return False
    return all(torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in a)


def ends_are_equal(neg: Path, pos: Path) -> bool:
    """Whether the line, in the dtype that its ends are stored in, starts and ends with their bits."""
    line = fastinterp.path(neg, pos, threads=1)
    return all(same_bits(line.weights(alpha), weights(end)) for alpha, end in ((0.0, neg), (1.0, pos)))
