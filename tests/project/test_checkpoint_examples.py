"""The examples of docs/CHECKPOINTS.md run as they are printed, one after the other, in one folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lora.adapters import factors, write_adapter
from tests.support import gguf_models, quantised_models
from tests.support.modules import llama, saved

pytestmark = pytest.mark.slow  # a process for each command

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "CHECKPOINTS.md").read_text("utf-8").partition("## Examples")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
OUTPUTS = {
    "dense", "mixed-fp8", "halfway", "both", "mixed-lora", "extracted", "mid.safetensors", "mixed.gguf", "small.gguf",
}  # fmt: skip


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with all that the page names."""
    fp8 = quantised_models.FORMS["blocks"]
    for path, name in zip(
        quantised_models.saved(tmp_path, fp8, quantised_models.family(fp8, 2)), ("fp8-a", "fp8-b"), strict=True
    ):
        Path(path).rename(tmp_path / name)
    saved(llama(0), tmp_path / "base")
    saved(llama(1), tmp_path / "fine-tune")
    rows, columns = llama(0).model.layers[0].self_attn.q_proj.weight.shape
    for seed, name in enumerate(("lora", "lora-2")):
        write_adapter(tmp_path / name, {"model.layers.0.self_attn.q_proj": factors(seed, rows, 4, columns)})
    for i in (1, 2):
        torch.save({"state_dict": {"w": torch.ones(2, 2) * i}}, tmp_path / f"{i}.ckpt")
    for seed, name in enumerate("ab"):
        gguf_models.write(tmp_path / f"{name}.gguf", gguf_models.numbers(seed), gguf_models.Type.BF16)
    return tmp_path


def test_examples(models: Path) -> None:
    for block in BLOCKS:
        shown = ""  # the file that the last command showed
        text: list[str] = []
        for line in block.splitlines():
            if not line.startswith("$ "):
                text.append(line)
                continue
            if shown:
                (models / shown).write_text("\n".join(text))
            words = shlex.split(line[2:])
            shown = words[1] if words[0] == "cat" else ""
            if words[0] == "fastinterp":
                command = [sys.executable, "-m", "fastinterp", *words[1:]]
                done = subprocess.run(command, cwd=models, capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert {path.name for path in models.iterdir()} >= OUTPUTS
    want = gguf_models.read(models / "a.gguf"), gguf_models.read(models / "b.gguf")
    for name, (kind, x) in gguf_models.read(models / "mixed.gguf").items():
        assert x.tobytes() == gguf_models.combined([w[name][1] for w in want], [0.7, 0.3], kind).tobytes()
    half = np.fromfile(models / "mid.safetensors", np.float32, offset=4096)
    assert half.tolist() == [1.5] * 4
