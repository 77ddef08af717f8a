"""Adapters in folders, written and read with safetensors and json alone; and the changes that they stand for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PREFIX = "base_model.model."
Changes = dict[str, np.ndarray]  # module -> f64[out, in, ...]


def factors(seed: int, out: int, rank: int, columns: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(A, B)"""
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.standard_normal((rank, columns)).astype(dtype), rng.standard_normal((out, rank)).astype(dtype)


def write_adapter(
    folder: Path,
    modules: Mapping[str, tuple[np.ndarray, np.ndarray]],
    more: Mapping[str, np.ndarray] = {},
    **config: Any,
) -> str:
    """An adapter of peft: modules with (A, B), and further tensors by their names behind `base_model.model.`."""
    folder.mkdir()
    tensors = {f"{PREFIX}{name}": x for name, x in more.items()}
    for module, (a, b) in modules.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"], tensors[f"{PREFIX}{module}.lora_B.weight"] = a, b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    given: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "lora_alpha": 8,
        "r": next((a.shape[0] for a, _ in modules.values()), 8),
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(given | config))
    return str(folder)


def read_adapter(folder: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors without the prefix, adapter_config.json)"""
    tensors = load_file(Path(folder) / "adapter_model.safetensors")
    assert all(name.startswith(PREFIX) for name in tensors)
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    return {name.removeprefix(PREFIX): x for name, x in tensors.items()}, config


def changes(folder: str | Path) -> Changes:
    """scale * B A of every module, in float64, by the rules of peft."""
    tensors, config = read_adapter(folder)
    made = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removesuffix(".lora_A.weight")
        b = tensors[f"{module}.lora_B.weight"]
        rank = _of_pattern(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _of_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        assert a.shape[0] == b.shape[1] == rank, module
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        product = b.reshape(b.shape[0], rank).astype(np.float64) @ a.reshape(rank, -1).astype(np.float64)
        made[module] = scale * product.reshape(b.shape[0], *a.shape[1:])
    return made


def _of_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    return next((x for key, x in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def summed(weights: Mapping[str, float]) -> Changes:
    """The weighted sum of the changes of adapters, by their folders."""
    total: Changes = {}
    for folder, weight in weights.items():
        for module, change in changes(folder).items():
            total[module] = total.get(module, 0.0) + weight * change
    return total


def assert_close(got: Changes, want: Changes, relative: float) -> None:
    """Each element to a part of the largest of its module."""
    assert got.keys() == want.keys() and got
    for module, change in want.items():
        assert np.abs(got[module] - change).max() <= relative * np.abs(change).max(), module


def recipe(weights: Mapping[str, float], method: str = "linear", **keys: Any) -> dict[str, Any]:
    """A recipe of adapters, by their folders."""
    parameters = {"normalize": False} if method == "linear" else {}
    parameters |= keys.pop("parameters", {})
    models = [{"model": folder, "parameters": {"weight": weight}} for folder, weight in weights.items()]
    return {"merge_method": method, "models": models, "parameters": parameters, "out": "lora", **keys}
