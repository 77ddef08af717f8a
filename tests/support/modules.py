"""Small transformers models for tests: made in memory, and saved as checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def llama(seed: int, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Llama of two layers, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied, pad_token_id=0, bos_token_id=1,
        eos_token_id=95,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed: int, *, dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-2 of two layers, whose head is its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=95, pad_token_id=0
    )
    torch.manual_seed(seed)
    return GPT2LMHeadModel(config).to(dtype).eval()


def saved(module: Any, folder: Path) -> Path:
    module.save_pretrained(folder)
    return folder


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of everything that a module holds."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))


def assert_same_state(expected: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == got.keys()
    differing = [name for name in expected if not same_bits(expected[name], got[name])]
    assert not differing


class Buffers(torch.nn.Module):
    def __init__(self, fill):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(4)
        self.scale = torch.nn.Parameter(torch.full((3,), float(fill)))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)
        torch.nn.init.constant_(self.norm.running_mean, fill)
        self.norm.num_batches_tracked.fill_(fill)
