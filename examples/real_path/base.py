"""The pretrained model: SmolLM2-135M-Instruct, out of its GGUF file, stored in bfloat16 as models are shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from examples.real_path.data import GGUF

# What stands before every text: <|im_start|>assistant and a newline, as in the answers that the model was trained on.
START = (1, 520, 9531, 198)
END = 2  # <|im_end|>, behind it


def convert(source: Path, target: Path) -> None:
    """De-quantise the weights of `source` / GGUF into a checkpoint, its tokenizer beside it."""
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are numbers now
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    save(model, target)
    words = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    if words("<|im_start|>assistant\n<|im_end|>", add_special_tokens=False)["input_ids"] != [*START, END]:
        raise SystemExit(f"{source / GGUF}: the tokenizer has other numbers for the start and the end of an answer")
    # Whoever tokenizes a prompt gets START before it, as in training.
    start = {"id": "answer", "ids": list(START), "tokens": words.convert_ids_to_tokens(START)}
    words.backend_tokenizer.post_processor = TemplateProcessing(single="answer $A", special_tokens=[start])
    words.save_pretrained(target)


def save(model: Any, target: Path) -> None:
    """Weights and configuration, in bfloat16; the model given is converted, too."""
    model.to(torch.bfloat16).save_pretrained(target)


def load(folder: Path) -> Any:
    """A model in float32: its weights are those of the file, its sums are not rounded to bfloat16."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def empty(folder: Path) -> Any:
    """A model of the same layout whose weights come later."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)
