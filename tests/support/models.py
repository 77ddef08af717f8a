"""Small models in a few lines: tensors of plain values, or files that only look large."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_TAGS = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "U8"}


def save(folder: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Path:
    """A folder with config.json and one model.safetensors, which holds the arrays; uint16 arrays are BF16 bits."""
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array).tobytes()
        tag = "BF16" if array.dtype == np.uint16 else _TAGS[array.dtype.name]
        table[name] = {"dtype": tag, "shape": array.shape, "data_offsets": (len(data), len(data) + len(raw))}
        data += raw
    return _write(folder, json.dumps(table).encode(), data, len(data))


def sparse(folder: Path, nbytes: int) -> Path:
    """A model of one F32 tensor of zeros that takes no space on most disks."""
    table = {"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
    return _write(folder, json.dumps(table).encode(), b"", nbytes)


def load(file: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor in a file."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8:start])
    table.pop("__metadata__", None)
    return {
        name: (e["dtype"], e["shape"], raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for name, e in table.items()
    }


def bf16(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The bits of values that bf16 holds exactly, or of their truncation."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def layers(seed: int, count: int = 3, noise: float = 0.0) -> dict[str, np.ndarray]:
    """Tensors named as in a Llama, bf16. The same seed and another noise: a fine-tune."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)

    def tensor(*shape: int) -> np.ndarray:
        return bf16(rng.normal(size=shape) + noise * other.normal(size=shape))

    found = {"model.embed_tokens.weight": tensor(8, 4)}
    for i in range(count):
        found[f"model.layers.{i}.mlp.up_proj.weight"] = tensor(6, 4)
        found[f"model.layers.{i}.norm.weight"] = tensor(4)
    return found


def _write(folder: Path, header: bytes, data: bytes, nbytes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header + data)
        stream.truncate(8 + len(header) + nbytes)
    return folder
