"""Writes random checkpoints with the shapes of Llama models, with numpy. The same arguments give the same bytes."""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.messages import size as size_text

_POOL = 1 << 22  # random numbers generated; tensors are slices of them, which is much faster than generating all
_NAMES = ("base", "ft1", "ft2")


@dataclass(frozen=True, slots=True)
class Size:
    """The dimensions of a Llama model."""

    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in the order of the file."""
        wide, kv = (self.hidden, self.hidden), (self.hidden // self.heads * self.kv_heads, self.hidden)
        norm, up, down = (self.hidden,), (self.inter, self.hidden), (self.hidden, self.inter)
        layer = {
            "input_layernorm": norm, "self_attn.q_proj": wide, "self_attn.k_proj": kv, "self_attn.v_proj": kv,
            "self_attn.o_proj": wide, "post_attention_layernorm": norm, "mlp.gate_proj": up, "mlp.up_proj": up,
            "mlp.down_proj": down,
        }  # fmt: skip
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for i in range(self.layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    @property
    def nbytes(self) -> int:
        """Tensor data of one checkpoint in bf16."""
        return sum(2 * math.prod(shape) for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "hidden_size": self.hidden, "intermediate_size": self.inter, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "num_key_value_heads": self.kv_heads, "vocab_size": self.vocab,
            "max_position_embeddings": 2048, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
            "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16",
        }  # fmt: skip


SIZES = {
    "tiny": Size(64, 176, 4, 4, 2, 512),
    "100m": Size(768, 2048, 8, 12, 4, 16000),
    "1b": Size(2048, 5632, 22, 32, 4, 32000),
    "7b": Size(4096, 11008, 32, 32, 32, 32000),
}


def write_checkpoints(
    folder: Path, size: Size, *, shard_bytes: int = 1 << 30, seed: int = 0, say: Callable[[str], None] | None = None
) -> list[Path]:
    """Write `base`, `ft1` and `ft2` into `folder`, in bf16. Returns their paths.

    Weights are normal with standard deviation 0.02, those of norms near 1; each fine-tune adds a normal delta of
    standard deviation 0.002. shard_bytes: tensor data in one file. say: called with a line before each checkpoint.
    A checkpoint appears when it is complete, or not at all.
    """
    rng = np.random.default_rng(seed)
    weights, delta = (rng.standard_normal(_POOL, np.float32) * np.float32(s) for s in (0.02, 0.002))
    made = []
    for name in _NAMES:
        if say:
            say(f"writing {name}: {size_text(size.nbytes)}")
        partial = folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _write(partial, size, shard_bytes, weights, None if name == "base" else delta, name)
            made.append(partial.rename(folder / name))
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return made


def _write(
    out: Path, size: Size, shard_bytes: int, weights: NDArray[Any], delta: NDArray[Any] | None, model: str
) -> None:
    (out / "config.json").write_text(json.dumps(size.config(), indent=1))
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    room = shard_bytes
    for name, shape in size.shapes().items():
        room -= 2 * math.prod(shape)
        if room < 0 and shards[-1]:
            shards.append({})
            room = shard_bytes - 2 * math.prod(shape)
        shards[-1][name] = shape
    one = len(shards) == 1
    weight_map: dict[str, str] = {}
    for k, shard in enumerate(shards):
        file = "model.safetensors" if one else f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        with open(out / file, "wb") as stream:
            stream.write(_header(shard))
            for name, shape in shard.items():
                for block in _blocks(name, math.prod(shape), weights, delta, model):
                    stream.write(block.data)
    if not one:
        index = {"metadata": {"total_size": size.nbytes}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _header(shard: dict[str, tuple[int, ...]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        start, end = end, end + 2 * math.prod(shape)
        table[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    raw = json.dumps(table).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _blocks(
    name: str, numel: int, weights: NDArray[Any], delta: NDArray[Any] | None, model: str
) -> Iterator[NDArray[np.uint16]]:
    """The bf16 codes of one tensor: the pools of random numbers, rotated by a hash of the names."""
    for k, start in enumerate(range(0, numel, _POOL)):
        count = min(_POOL, numel - start)
        x = np.roll(weights, zlib.crc32(f"{name} {k}".encode()) % _POOL)[:count]
        if "norm" in name:
            x += np.float32(1)
        if delta is not None:
            x += np.roll(delta, zlib.crc32(f"{name} {k} {model}".encode()) % _POOL)[:count]
        u = x.view(np.uint32)
        yield ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest even; there are no NaN
