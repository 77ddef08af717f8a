"""EMACallback under torch's FSDP: two processes on the CPU, each of which averages its part of the weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastinterp.errors import UsageError
from fastinterp.integrations.sharded_parameters import Parts
from tests.support import fsdp_training, processes

ROOT = Path(__file__).parents[2]


def trained(how: str, out: Path) -> Path:
    """The output of a run of two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--rdzv-backend", "c10d"]
    command = [*launch, "--rdzv-endpoint", "localhost:0", "-m", "tests.support.fsdp_training", how, out]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
    with processes.started(command, limit_s=300, env=env, cwd=ROOT, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return out


@pytest.mark.slow(25)
@pytest.mark.parametrize("how", ["fsdp1", "fsdp2"])
def test_the_average_is_saved_whole(tmp_path: Path, how: str):
    """It is the average of the whole weights, in float32; of tied weights, once; and training can go on with it."""
    out = trained(how, tmp_path)
    want, ema = load_file(out / "want.safetensors"), out / "checkpoint-3" / "ema"
    stored = load_file(ema / "model.safetensors")
    assert stored.keys() == want.keys() - ({"lm_head.weight"} if how == "fsdp1" else set())
    assert all(torch.equal(x, want[name]) for name, x in stored.items())
    model, info = transformers.AutoModelForCausalLM.from_pretrained(ema, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model) is transformers.LlamaForCausalLM
    dtype = torch.float32 if how == "fsdp1" else torch.bfloat16
    copied = load_file(out / "copied.safetensors")
    assert all(torch.equal(copied[name], x.to(dtype).float()) for name, x in want.items())


@pytest.mark.slow(25)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # that peft asks for
def test_of_an_adapter_the_adapter(tmp_path: Path):
    peft = pytest.importorskip("peft")
    out = trained("adapter", tmp_path)
    want = {name: x for name, x in load_file(out / "want.safetensors").items() if "lora_" in name}
    base = fsdp_training.llama(False, torch.bfloat16)
    model = peft.PeftModel.from_pretrained(base, out / "checkpoint-3" / "ema")
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert found.keys() == want.keys()
    assert all(torch.equal(p, want[name]) for name, p in found.items())


@pytest.mark.slow(15)
def test_joined_parameters_are_refused(tmp_path: Path):
    said = (trained("flat", tmp_path) / "refused.txt").read_text()
    assert "Set use_orig_params to true (fsdp_use_orig_params), take FSDP 2, or use AverageCheckpoints" in said


def test_zero_stage_3_is_refused():
    """DeepSpeed marks its parameters so."""
    model: Any = torch.nn.Linear(2, 2)
    model.weight.ds_id = 0
    with pytest.raises(UsageError, match=r"weight is in parts .* \(ZeRO stage 3\).* Use AverageCheckpoints"):
        Parts(model)
