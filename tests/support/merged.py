"""Recipes of every method over small models, and the files of an output."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastinterp.methods import find
from fastinterp.ops.dtypes import BF16, F32
from tests.support.checkpoints import Model, Tensor, integers, moved, weights, write

_SHARED = {"t": 0.3, "alpha": 0.3, "beta": 0.2, "decay": 0.9}


def related(count: int, seed: int = 7, rows: int = 24) -> list[Model]:
    """A model and `count - 1` fine-tunes of it: matrices of several blocks, vectors, a tensor of integers."""
    base = {
        "model.embed_tokens.weight": weights(seed, BF16, (rows * 40, 80)),
        "model.layers.0.mlp.up_proj.weight": weights(seed + 1, BF16, (rows, 64)),
        "model.layers.0.norm.weight": weights(seed + 2, F32, (64,)),
        "model.layers.1.mlp.up_proj.weight": weights(seed + 3, BF16, (rows, 64)),
        "steps": integers([3, 4], "I64"),
    }

    def tuned(name: str, t: Tensor, k: int) -> Tensor:
        return moved(t, 100 * k + len(name), 2e-3) if t.dtype.merges else t

    return [base, *({name: tuned(name, t, k) for name, t in base.items()} for k in range(1, count))]


def saved_in(folder: Path, models: Sequence[Model], shards: int = 1) -> list[Path]:
    """The models as folders `base`, `ft1`, `ft2`, ..."""
    names = ["base", *(f"ft{k}" for k in range(1, len(models)))]
    return [write(folder / name, model, shards=shards) for name, model in zip(names, models, strict=True)]


def recipe_of(method: str, paths: Sequence[Path | str], **keys: Any) -> dict[str, Any]:
    """A recipe by which the method merges these models, the first of which is the base, if it takes one."""
    found = find(method)
    most = found.models[1]
    count = min(len(paths), most)
    each = {p.name for p in found.parameters if p.each}
    values: dict[str, Any] = {}
    values |= {"weight": 0.4} if "weight" in each else {}
    values |= {"density": 0.5} if "density" in each else {}
    based = found.base != "none"
    sources = list(paths[:count])[1 if based else 0 :]
    models = [{"model": str(p), **({"parameters": values} if values else {})} for p in sources]
    known = {p.name for p in found.parameters if not p.each}
    shared = {name: value for name, value in _SHARED.items() if name in known}
    if method == "fisher":  # importances: any model of positive numbers has them; negative ones are a warning
        values = {"fisher": str(paths[0])}
        models = [{**model, "parameters": values} for model in models]
    recipe: dict[str, Any] = {"merge_method": method, "models": models}
    recipe |= {"base_model": str(paths[0])} if based else {}
    recipe |= {"parameters": shared} if shared else {}
    return {**recipe, **keys}


def tree(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by name; of a file, itself."""
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
