"""The pretrained model: SmolLM2-135M-Instruct, out of its GGUF file, stored in bfloat16 as models are shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from examples.real_path.data import GGUF

START = 0  # <|endoftext|>: stands before every snippet, and after it


def convert(source: Path, target: Path) -> None:
    """De-quantise the weights of `source` / GGUF into a checkpoint, its tokenizer beside it."""
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are numbers now
    config.bos_token_id = config.eos_token_id = config.pad_token_id = START
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    model.generation_config.update(bos_token_id=START, eos_token_id=START, pad_token_id=START)
    save(model, target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def save(model: Any, target: Path) -> None:
    """Weights and configuration, in bfloat16. The model given keeps its own dtype."""
    import copy

    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(target)


def load(folder: Path) -> Any:
    """A model in float32: its weights are those of the file, its sums are not rounded to bfloat16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def empty(folder: Path) -> Any:
    """A model of the same layout whose weights come later."""
    with torch.device("cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)
