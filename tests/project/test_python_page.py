"""The code of docs/python.md runs, block by block, in one folder with the models that it names."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.lora.adapters import factors, write_adapter
from tests.support.modules import llama, saved

pytestmark = pytest.mark.slow(8)  # transformers takes seconds to import

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "docs" / "python.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
)
MODELS = ("A", "B", "base", "finetune", "B0", "P", "F")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate((*MODELS, *(f"run/checkpoint-{i}" for i in range(1, 9)))):
        saved(llama(seed), tmp_path / name)
    rows, columns = llama(0).model.layers[0].self_attn.q_proj.weight.shape
    for seed, name in enumerate(("x", "y")):
        write_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": factors(seed, rows, 4, columns)})
    for name, models, more in (("recipe", "AB", {}), ("adapters", "xy", {"out": "lora"})):
        listed = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
        (tmp_path / f"{name}.yml").write_text(yaml.safe_dump({"merge_method": "linear", "models": listed, **more}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_code_runs(folder: Path) -> None:
    x, y, base = torch.randn(3, 8)
    a, b, c = (torch.nn.Linear(4, 4) for _ in range(3))
    alphas = torch.tensor([0.2, 0.4], requires_grad=True)
    names: dict[str, Any] = {"x": x, "y": y, "base": base, "a": a, "b": b, "c": c, "alphas": alphas, "f": torch.sum}
    names |= {"model": llama(9), "loss": lambda model, alpha, seed: {"loss": float(alpha) ** 2 + seed}}
    for block in BLOCKS:
        for statement in ast.parse(block).body:
            code = ast.unparse(statement)
            if "fastinterp.merge('recipe.yml', 'merged'" in code:  # one of several calls with the same output
                shutil.rmtree("merged", ignore_errors=True)
            exec(code, names)
    assert alphas.grad is not None
    assert (folder / "report.json").exists()
