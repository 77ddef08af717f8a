"""Models with adapters in `load`, `Live` and `path`: the weights are those that a merge writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import save_file  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import fastinterp  # noqa: E402


def net() -> Any:
    return torch.nn.ModuleDict({"a": torch.nn.Linear(24, 40), "b": torch.nn.Linear(40, 24, bias=False)})


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """base/model.safetensors, lora/ of rank 3 on both layers, and what their merge is in float32."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (40, 24), "a.bias": (40,), "b.weight": (24, 40)}
    (tmp_path / "base").mkdir()
    save_file({n: rng.normal(size=s).astype("f4") for n, s in shapes.items()}, "base/model.safetensors")
    factors = {}
    for name, (out, into) in (("a", (40, 24)), ("b", (24, 40))):
        factors[f"base_model.model.{name}.lora_A.weight"] = rng.normal(size=(3, into)).astype("f4")
        factors[f"base_model.model.{name}.lora_B.weight"] = rng.normal(size=(out, 3)).astype("f4")
    (tmp_path / "lora").mkdir()
    save_file(factors, "lora/adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6}))
    fastinterp.interpolate("base", "base+lora", 0.25, "quarter")
    return tmp_path


def assert_state(module: Any, file: str) -> None:
    want = load_file(file)
    assert all(torch.equal(tensor, want[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("resident", [True, False])
def test_live(models, resident):
    module = net()
    module.load_state_dict(load_file("base/model.safetensors"))
    with fastinterp.Live(module, a="base", b="base+lora", resident=resident) as live:
        live.set(0.25)
        assert_state(module, "quarter/model.safetensors")
        live.set(0.0)
        assert_state(module, "base/model.safetensors")


def test_load(models):
    recipe = {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": w}} for n, w in (
        ("base", 0.75), ("base+lora", 0.25),
    )]}  # fmt: skip
    state = fastinterp.load(recipe)
    want = load_file("quarter/model.safetensors")
    assert all(torch.equal(tensor, want[name]) for name, tensor in state.items())
