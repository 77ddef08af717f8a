"""The examples of the pages for users of torch, transformers, PEFT and sd-mecha run as they are written."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.tools import table
from tests.support import backends
from tests.support.modules import llama, saved

pytestmark = [
    pytest.mark.slow,  # transformers and peft take seconds to import
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

ROOT = Path(__file__).resolve().parents[2]
PAGES = [(ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("INTEGRATIONS", "TORCH", "PEFT", "SD-MECHA")]
PAGE = PAGES[0]
EXAMPLES = {
    heading: code
    for page in PAGES
    for heading, code in re.findall(r"^##+ ([^\n]+)\n(?:(?!^##).)*?```python\n(.*?)```", page, re.DOTALL | re.MULTILINE)
}


class Numbers(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(2, 90, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def test_every_section_has_an_example():
    headings = [heading for page in PAGES for heading in re.findall(r"^##+ ([^\n]+)$", page, re.MULTILINE)]
    assert sorted(headings) == sorted([*EXAMPLES, "Speed of each"]) and len(headings) == 7


def test_speed_table_is_that_of_the_committed_results():
    found = json.loads((ROOT / "benchmarks" / "results" / "tools.json").read_text("utf-8"))
    shown = re.search(r"<!-- tools:begin -->\n(.*?)\n<!-- tools:end -->", PAGE, re.DOTALL)
    assert shown and shown[1].splitlines() == table(found["cases"])


def test_torch():
    exec(EXAMPLES["Running averages"], {})


def test_checkpoints_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for step in (5, 10, 15):
        saved(llama(step), tmp_path / "run" / f"checkpoint-{step}")
    exec(EXAMPLES["Checkpoints of a run"], {})
    assert all((tmp_path / name / "model.safetensors").exists() for name in ("averaged", "smoothed", "decayed"))


def test_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    models = [{"model": str(saved(llama(seed), tmp_path / str(seed)))} for seed in (1, 2)]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    names: dict[str, Any] = {"dataset": Numbers()}
    exec(EXAMPLES["transformers"], names)
    exec(EXAMPLES["Callbacks"], names)
    assert (tmp_path / "run" / "averaged" / "model.safetensors").exists()


def test_peft():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(1), config, "first")
    model.add_adapter("second", config)
    exec(EXAMPLES["add_weighted_adapter"], {"model": model})
    assert model.active_adapter == "both"


@pytest.mark.skipif(bool(backends.sd_mecha_missing()), reason=backends.sd_mecha_missing() or "it is there")
def test_sd_mecha(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import numpy as np

    from tests.support.models import save

    monkeypatch.chdir(tmp_path)
    for name in "abc":
        folder = save(tmp_path / f"folder {name}", {"model.diffusion_model.out.0.bias": np.ones(3, np.float32)})
        (folder / "model.safetensors").rename(tmp_path / f"{name}.safetensors")
    exec(EXAMPLES["Graphs of sd-mecha"], {})
    assert (tmp_path / "merged.safetensors").exists()
