"""A process of a training under FSDP on the CPU, with EMACallback: `python -m tests.support.fsdp_training HOW OUT`.

HOW is `fsdp1`, `fsdp2`, `flat` (FSDP 1 without use_orig_params) or `adapter` (FSDP 2, LoRA alone is trained). The first
process writes what the averages must be, from the whole weights after each step, into OUT/want.safetensors.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fastinterp.errors import UsageError
from fastinterp.integrations.transformers import EMACallback

DECAY, STEPS = 0.75, 3


def llama(tied: bool, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=91, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype)


def unsharded(how: str) -> Any:
    if how in ("fsdp1", "flat"):
        return llama(True, torch.float32)
    model = llama(False, torch.bfloat16)
    if how == "adapter":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    return model


def sharded(how: str) -> Any:
    model = unsharded(how)
    if how in ("fsdp1", "flat"):
        wrap, cpu = ModuleWrapPolicy({LlamaDecoderLayer}), torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=wrap, device_id=cpu, use_orig_params=how == "fsdp1")
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    return fully_shard(model)


def whole(model: Any) -> dict[str, torch.Tensor]:
    options = StateDictOptions(full_state_dict=True)  # cpu_offload of FSDP 1 crashes where all is on the CPU
    return {n: x.float() for n, x in get_model_state_dict(model, options=options).items()}


def main(how: str, out: Path) -> None:
    distributed.init_process_group("gloo")
    model = sharded(how)
    trained = sum(p.numel() for p in unsharded(how).parameters() if p.requires_grad)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    callback, args = EMACallback(DECAY), SimpleNamespace(output_dir=str(out))
    state = SimpleNamespace(global_step=0, is_world_process_zero=distributed.get_rank() == 0)
    try:
        callback.on_train_begin(args, state, None, model=model)
    except UsageError as error:
        if distributed.get_rank() == 0:
            (out / "refused.txt").write_text(str(error))
        distributed.destroy_process_group()
        return
    average = whole(model)
    for step in range(1, STEPS + 1):
        ids = torch.randint(2, 90, (2, 8), generator=torch.Generator().manual_seed(step + 9 * distributed.get_rank()))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        state.global_step = step
        callback.on_step_end(args, state, None, model=model)
        average = {n: average[n] + (1.0 - DECAY) * (x - average[n]) for n, x in whole(model).items()}
    callback.on_save(args, state, None, model=model)
    distributed.barrier()
    again = EMACallback(DECAY)  # training resumes
    again.on_train_begin(args, state, None, model=model)
    for name, part in callback.averages.items():
        torch.testing.assert_close(again.averages[name], part, rtol=0, atol=0)
    # Shared out: no process has averages of more than a part.
    assert 2 * sum(part.numel() for part in callback.averages.values()) < 1.2 * trained
    callback.copy_to(model)
    kept = whole(model)
    if distributed.get_rank() == 0:
        save_file({n: x.clone() for n, x in average.items()}, out / "want.safetensors")
        save_file({n: x.clone() for n, x in kept.items()}, out / "copied.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # not through the destructors: on a busy machine, threads that gloo has left abort some exits
