"""Small models named as Llamas are, in folders with a configuration."""

from __future__ import annotations

import json
from pathlib import Path

from fastinterp.ops.dtypes import BF16, DType
from tests.support.checkpoints import Tensor, moved, weights, write


def save(name: str, model: dict[str, Tensor], **config: object) -> None:
    write(Path(name), model)
    Path(name, "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2, **config}))


def llama(seed: int = 0, layers: int = 2, noise: float = 0.0, dtype: DType = BF16) -> dict[str, Tensor]:
    """Tensors named as in a Llama; the same seed and another noise: a fine-tune."""
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(layers))]
    found = {name: weights(seed + i, dtype, (24, 16)) for i, name in enumerate(names)}
    return {n: moved(t, 99 + i, noise) for i, (n, t) in enumerate(found.items())} if noise else found
