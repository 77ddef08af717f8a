"""Small causal language models in folders, as transformers saves them: characters in, characters out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers  # its parts are loaded where they are named: that takes seconds

_LETTERS = "\nabcdefghijklmnopqrstuvwxyz .?"


def save_model(folder: Path, favourite: str = "", width: int = 16, layers: int = 2) -> Path:
    """A GPT-2 that writes the letter `favourite` whatever it is told, or what its random weights say. Same weights but
    for that: its head's bias is what the letter's embedding has in common with all states."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(_LETTERS), n_positions=64, n_embd=width, n_layer=layers, n_head=2, bos_token_id=0,
        eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    if favourite:
        with torch.no_grad():
            model.transformer.ln_f.bias += 1.0  # every state leans this way ...
            model.lm_head.weight[_LETTERS.index(favourite)] += 1.0  # ... and this letter's score with it
            for block in model.transformer.h:
                block.mlp.c_fc.weight.mul_(1.01)
    model.generation_config.eos_token_id = None  # texts have the length that was asked for
    model.save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False}
    tokenizer: dict[str, object] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": split, "post_processor": None, "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(_LETTERS)}, "unk_token": "?"},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "bos_token": "\n"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
