"""Adapters as diffusers saves them: `unet.MODULE.lora_A.weight`, and the older `unet.MODULE.lora.down.weight`.

Files that others write for models of diffusers have kohya's parts on paths with dots, `diffusion_model.MODULE.lora_down
.weight`; they are read as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fastinterp.checkpoint.adapters import unmergeable_config
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora.parts import (
    Kind,
    LoraAdapter,
    LowRankModule,
    check_floats,
    check_pair,
    pair_error,
    put,
    refuse_left,
    refuse_twice,
)
from fastinterp.checkpoint.lora.peft import of_pattern
from fastinterp.checkpoint.lora.scalars import read_scalars
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError

_PART = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?:\.processor)?[._](?:lora|lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|(?:\.processor)?\.(?P<attention>to_(?:q|k|v|out))_lora\.(?P<older>down|up)\.weight"
    r"|\.lora_(?P<kohya>down|up)\.weight"
    r"|\.lora_(?P<new>[AB])(?:\.(?!weight$|bias$)[^.]+)?\.(?P<leaf>weight|bias)"
    r"|\.lora_magnitude_vector(?:\.[^.]+)?(?P<magnitude>)"
    r"|\.(?P<alpha>alpha)"
    r")",
    re.DOTALL,
)
_METADATA = "lora_adapter_metadata"  # of the file: a LoraConfig for each component, as JSON


def parse_diffusers(checkpoint: Checkpoint) -> LoraAdapter:
    """The adapter in a file of diffusers' names. Raises: CheckpointError."""
    parts: dict[str, dict[str, Entry]] = {}
    left = []
    twice: list[tuple[Entry, Entry]] = []
    for name, entry in checkpoint.tensors.items():
        found = _PART.fullmatch(name)
        if not found or (found["leaf"] == "bias" and found["new"] == "A"):
            left.append(name)
            continue
        module = found["module"]
        if found["attention"]:
            module += f".{found['attention']}"
        if module.endswith(".to_out"):
            module += ".0"  # a list of the layer and its dropout
        which = found["old"] or found["older"] or found["kohya"] or found["new"]
        part = (
            "alpha" if found["alpha"] else "magnitude" if which is None else {"A": "down", "B": "up"}.get(which, which)
        )
        put(parts.setdefault(module, {}), "bias" if found["leaf"] == "bias" else part, entry, twice)
    refuse_left(checkpoint, left, "Expected the names of diffusers, `unet.MODULE.lora_A.weight`")
    refuse_twice(checkpoint, twice)
    alphas = read_scalars(checkpoint, [found["alpha"] for found in parts.values() if "alpha" in found])
    configs = _configurations(checkpoint)
    modules = tuple(_module(checkpoint, module, found, alphas, configs) for module, found in parts.items())
    return LoraAdapter(checkpoint, "diffusers", modules)


def _module(
    checkpoint: Checkpoint,
    module: str,
    parts: Mapping[str, Entry],
    alphas: Mapping[str, float],
    configs: Mapping[str, Mapping[str, Any]],
) -> LowRankModule:
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        raise pair_error(checkpoint, module, next(iter(parts.values())), "down" if down is None else "up")
    rank = down.shape[0] if down.shape else 0
    check_pair(checkpoint, module, down, up, rank)
    check_floats(checkpoint, (parts.get("magnitude"), parts.get("bias")))
    component, _, path = module.partition(".")
    config = configs.get(component)
    if "alpha" in parts:
        alpha = alphas[parts["alpha"].name]
    else:  # without a configuration, diffusers does not scale
        alpha = of_pattern(checkpoint, config, "alpha_pattern", "lora_alpha", path, rank) if config else float(rank)
    root = config is not None and config.get("use_rslora") is True
    kind: Kind = "convolution" if len(down.shape) > 2 else "linear"
    scale = alpha / (math.sqrt(rank) if root else rank)
    return LowRankModule(module, kind, down, up, rank, alpha, scale, parts.get("magnitude"), parts.get("bias"))


def _configurations(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each component, as diffusers stores them: `{"unet.lora_alpha": 6}`.

    Raises: CheckpointError, if they are damaged, or ask for more than products.
    """
    written = checkpoint.metadata.get(_METADATA)
    configs: dict[str, dict[str, Any]] = {}
    if written is None:
        return configs
    for name, value in parse_object(written.encode(), f"`{_METADATA}`", str(checkpoint.files[0])).items():
        component, _, key = name.partition(".")
        configs.setdefault(component, {})[key] = value
    for config in configs.values():
        if reason := unmergeable_config(config):
            raise CheckpointError(reason, file=checkpoint.name)
    return configs
