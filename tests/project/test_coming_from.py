"""The tables of the pages for users of other tools: what stands under `write` runs, and does what stands beside it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import fastinterp
from tests.lora.adapters import factors, write_adapter
from tests.support.modules import llama, saved, state

pytestmark = [
    pytest.mark.slow,  # transformers and peft take seconds to import
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

DOCS = Path(__file__).resolve().parents[2] / "docs"


def rows(page: str) -> dict[str, str]:
    """What others have -> what is written here: of each cell of a page's first table the first code, or its text."""
    table = re.search(
        r"^\| if you use \| write \|\n\|---\|---\|\n((?:\|.*\n)+)", (DOCS / page).read_text("utf-8"), re.M
    )
    assert table
    cells = [line.strip("|\n ").split(" | ") for line in table[1].splitlines()]
    return {code(theirs): code(ours) for theirs, ours in cells}


def code(cell: str) -> str:
    found = re.search(r"`([^`]+)`", cell)
    return found[1] if found else cell.strip()


def run(command: str, folder: Path) -> None:
    program, *words = shlex.split(command)
    assert program == "fastinterp"
    done = subprocess.run(
        [sys.executable, "-m", "fastinterp", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def close(ours: Any, theirs: Any) -> None:
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            close(ours[name], theirs[name])
        return
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from fastinterp.integrations import torch_ops

    monkeypatch.chdir(tmp_path)
    table = rows("TORCH.md")
    torch.manual_seed(0)
    x, y, base = torch.randn(3, 5, 7)
    a, b = ({"w": torch.randn(4, 4), "b": torch.randn(4)} for _ in range(2))
    names: dict[str, Any] = {"torch": torch, "fastinterp": fastinterp, "torch_ops": torch_ops}
    names |= {"x": x, "y": y, "base": base, "a": a, "b": b, "weights": torch.tensor([0.5, 0.2])}
    for theirs in list(table)[:4]:
        if theirs != "torch.compile":
            close(eval(table[theirs], names), eval(theirs, names))
    close(eval(table["torch.compile"], names), eval(list(table)[1], names))

    for i, weights in enumerate((a, b), 1):
        torch.save(weights, f"{i}.pt")
    eval(table["torch.load"], names)
    mean = {name: (a[name] + b[name]) / 2 for name in a}
    close({n: torch.from_numpy(w) for n, w in load_file("mean.safetensors").items()}, mean)

    model = torch.nn.Linear(4, 4)
    models = [{"model": f"{i}.pt"} for i in (1, 2)]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    dict_of = {"weight": torch.ones(4, 4), "bias": torch.zeros(4)}
    save_file({name: w.numpy() for name, w in dict_of.items()}, "A.safetensors")
    save_file({name: w.numpy() * 3 + 1 for name, w in dict_of.items()}, "B.safetensors")
    recipe["models"] = [{"model": f"{name}.safetensors"} for name in "AB"]
    names |= {
        "model": model,
        "recipe": recipe,
        "loss": lambda m, alpha, seed: {"mean": float(m.weight.detach().mean())},
    }
    eval(table["model.load_state_dict(averaged)"], names)
    close(state(model), {"weight": torch.full((4, 4), 2.5), "bias": torch.full((4,), 0.5)})

    call = table["weights at many points between two models, one after the other"]
    report = eval(call.replace('"A", "B"', '"A.safetensors", "B.safetensors"'), names)
    assert [point.mean("mean") for point in report.points] == [1.0, 2.5, 4.0]

    params, decay = [torch.ones(3)], 0.9
    averages = [[torch.zeros(3)], [torch.zeros(3)]]
    eval(
        "torch._foreach_lerp_(averages, params, 1 - decay)",
        names | {"averages": averages[0], "params": params, "decay": decay},
    )
    ours = table["torch._foreach_lerp_(averages, params, 1 - decay)"]
    eval(ours, names | {"averages": averages[1], "params": params, "decay": decay})
    close(averages[1][0], averages[0][0])
    assert "get_ema_multi_avg_fn(0.999)" in list(table)[-1]
    names |= {"AveragedModel": AveragedModel, "get_ema_multi_avg_fn": get_ema_multi_avg_fn}
    for call in (list(table)[-1], table[list(table)[-1]]):
        averaged = eval(call, names)
        averaged.update_parameters(model)


def test_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import peft as theirs_peft
    from transformers import AutoModelForCausalLM

    from fastinterp.integrations import peft

    monkeypatch.chdir(tmp_path)
    table = rows("PEFT.md")
    saved(llama(0, dtype=torch.float32), tmp_path / "base")
    saved(llama(1, dtype=torch.float32), tmp_path / "finetune")
    shape = llama(0).model.layers[0].self_attn.q_proj.weight.shape
    for seed, name in enumerate(("adapter", "other")):
        modules = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        write_adapter(tmp_path / name, {module: factors(seed, shape[0], 4, shape[1]) for module in modules})
    names: dict[str, Any] = {"fastinterp": fastinterp, "peft": peft}

    def based(*adapters: str) -> Any:
        found = theirs_peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained("base"), adapters[0], adapters[0]
        )
        for name in adapters[1:]:
            found.load_adapter(name, name)
        return found

    model = based("adapter", "other")
    call = next(ours for ours in table.values() if "add_weighted_adapter" in ours)
    eval(call.replace('"first", "second"', '"adapter", "other"'), names | {"model": model})
    assert "both" in model.peft_config

    merged = next(ours for ours in table.values() if "passthrough" in ours)
    eval(merged, names)
    close(state(AutoModelForCausalLM.from_pretrained("merged")), state(based("adapter").merge_and_unload()))
    several = table["the same of several adapters, the second with half its scale"]
    eval(merged.replace("base+adapter", several).replace('"merged"', '"merged-2"'), names)
    assert (tmp_path / "merged-2" / "model.safetensors").exists()

    one = {"model": "adapter", "parameters": {"weight": 0.7}}, {"model": "other", "parameters": {"weight": 0.3}}
    recipe = {"merge_method": "linear", "models": [*one], "parameters": {"normalize": False}, "out": "lora"}
    (tmp_path / "adapters.yml").write_text(yaml.safe_dump(recipe))
    eval(next(ours for ours in table.values() if "merge_adapters" in ours), names)
    eval(next(ours for ours in table.values() if "extract_lora" in ours), names)
    for name in ("mixed", "extracted"):
        based(name)
    run(re.search(r"`(fastinterp diff [^`]+)`", (DOCS / "PEFT.md").read_text("utf-8"))[1], tmp_path)  # type: ignore[index]


def test_sd_mecha(tmp_path: Path) -> None:
    """Commands and recipe, compared with the formulas."""
    table = rows("SD-MECHA.md")
    rng = np.random.default_rng(0)
    a, b, c = ({"model.diffusion_model.out.0.weight": rng.normal(size=(4, 6)).astype(np.float32)} for _ in range(3))
    for name, tensors in zip("abc", (a, b, c), strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (x,), (y,), (z,) = a.values(), b.values(), c.values()
    for command in table.values():
        if command.startswith("fastinterp "):
            run(command, tmp_path)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "SD-MECHA.md").read_text("utf-8"), re.DOTALL)
    (tmp_path / "difference.yml").write_text(recipe)
    (merge,) = re.findall(r"`(fastinterp merge difference[^`]+)`", (DOCS / "SD-MECHA.md").read_text("utf-8"))
    run(merge, tmp_path)
    u, v, w = x.astype(np.float64), y.astype(np.float64), z.astype(np.float64)
    lengths = np.linalg.norm(u), np.linalg.norm(v)
    angle = np.arccos((u * v).sum() / (lengths[0] * lengths[1]))
    direction = (np.sin(0.7 * angle) * u / lengths[0] + np.sin(0.3 * angle) * v / lengths[1]) / np.sin(angle)
    wanted = {
        "between": 0.7 * u + 0.3 * v,
        "mean": (u + v + w) / 3,
        "difference": u + 0.5 * (v - w),
        "slerp_alpha_0.3": direction * (0.7 * lengths[0] + 0.3 * lengths[1]),
    }
    for name, want in wanted.items():
        (got,) = load_file(tmp_path / f"{name}.safetensors").values()
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=name)


def test_mergekit(tmp_path: Path) -> None:
    table = rows("MERGEKIT.md")
    saved(llama(0), tmp_path / "base")
    saved(llama(1), tmp_path / "finetune")
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("base", "finetune")]
    recipe = {"merge_method": "linear", "models": models, "dtype": "bfloat16"}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(recipe))
    commands = [ours for ours in table.values() if ours.startswith("fastinterp ")]
    assert len(commands) == 2
    for command in commands:
        run(command, tmp_path)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
