"""Adapters of kohya's trainers, and of others that took their names: one file of `lora_unet_..._lora_down.weight`.

The path of a module stands there with underscores for dots. What it was is known from the base's own names only.
"""

from __future__ import annotations

import re

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora.parts import (
    Kind,
    LoraAdapter,
    LowRankModule,
    check_floats,
    check_pair,
    pair_error,
    refuse_left,
)
from fastinterp.checkpoint.lora.scalars import read_scalars
from fastinterp.checkpoint.open import Checkpoint

_PART = re.compile(r"(?P<module>.+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha|dora_scale)", re.DOTALL)


def parse_kohya(checkpoint: Checkpoint) -> LoraAdapter:
    """The adapter in a file of kohya's names. Raises: CheckpointError."""
    parts: dict[str, dict[str, Entry]] = {}
    left = []
    for name, entry in checkpoint.tensors.items():
        if found := _PART.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"]] = entry
        else:
            left.append(name)
    refuse_left(checkpoint, left, "Expected `MODULE.lora_down.weight`, `.lora_up.weight`, `.alpha`")
    alphas = read_scalars(checkpoint, [found["alpha"] for found in parts.values() if "alpha" in found])
    return LoraAdapter(
        checkpoint, "kohya", tuple(_module(checkpoint, module, found, alphas) for module, found in parts.items())
    )


def _module(checkpoint: Checkpoint, module: str, parts: dict[str, Entry], alphas: dict[str, float]) -> LowRankModule:
    down, up = parts.get("lora_down.weight"), parts.get("lora_up.weight")
    if down is None or up is None:
        have = next(iter(parts.values()))
        missing = "lora_down" if down is None else "lora_up"
        raise pair_error(checkpoint, module, have, f"{module}.{missing}.weight")
    rank = down.shape[0] if down.shape else 0
    check_pair(checkpoint, module, down, up, rank)
    check_floats(checkpoint, (parts.get("dora_scale"),))
    alpha = alphas[parts["alpha"].name] if "alpha" in parts else None
    kind: Kind = "convolution" if len(down.shape) > 2 else "linear"
    scale = 1.0 if alpha is None else alpha / rank
    return LowRankModule(module, kind, down, up, rank, alpha, scale, parts.get("dora_scale"))
