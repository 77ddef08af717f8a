"""The models on disk: safetensors in small shards with an index, and what transformers needs to open the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.paper_path.model import Shape

SHARD_BYTES = 512 * 1024


def save(folder: Path, state: Mapping[str, Tensor], shape: Shape) -> None:
    """Write a model into a folder; the index last, so that a folder with an index is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        used = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and used + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor.detach().contiguous()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(t.nbytes for t in state.values())
    for name, content in sidecars(shape).items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, sharded or not; nothing of fastinterp's is used."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise SystemExit(f"{folder} holds no .safetensors file. Run `train`, then `sweep`, into the same folder")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def nbytes(folder: Path) -> int:
    """Bytes of tensor data in a checkpoint."""
    return sum(t.nbytes for t in load(folder).values())


def sidecars(shape: Shape) -> dict[str, Any]:
    """GPT-2's config, and a tokenizer whose tokens are the characters of ASCII."""
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "torch_dtype": "float32",
        "n_embd": shape.n_embd, "n_layer": shape.n_layer, "n_head": shape.n_head, "n_positions": shape.n_positions,
        "vocab_size": shape.vocab_size, "activation_function": "gelu_new", "tie_word_embeddings": False,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": 10, "eos_token_id": 10,
    }  # fmt: skip
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {chr(i): i for i in range(shape.vocab_size)},
            "unk_token": "?",
        },
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?", "bos_token": "\n", "eos_token": "\n"}
    return {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 10, "eos_token_id": 10},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": settings,
    }


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """|a - b|, over all tensors."""
    return float(torch.stack([(a[n].double() - b[n].double()).square().sum() for n in a]).sum().sqrt())
