"""LoRA adapters as products of two factors: what the files of PEFT, kohya and diffusers hold, in one form.

`parse` reads headers and adapter_config.json only, and knows nothing of a base: modules have the names that the file
gives them. What is changed in a base is found in plan/adapters.py.
"""

from __future__ import annotations

from fastinterp.checkpoint.adapters import unmergeable
from fastinterp.checkpoint.lora.parts import Kind, LoraAdapter, LowRankModule, TokenRows
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.errors import CheckpointError

__all__ = ["Kind", "LoraAdapter", "LowRankModule", "TokenRows", "parse"]


def parse(checkpoint: Checkpoint) -> LoraAdapter:
    """The adapter that a checkpoint is.

    Raises: CheckpointError, if it is none that is a sum of low-rank products, or if a tensor of it has no place.
    """
    adapter = checkpoint.adapter
    if adapter is None or adapter.whole:
        raise CheckpointError(
            "this is no adapter, but a model: only adapters stand behind `+` and as `lora`", file=checkpoint.name
        )
    if reason := unmergeable(adapter):
        raise CheckpointError(reason, file=checkpoint.name)
    if adapter.style == "peft":
        from fastinterp.checkpoint.lora.peft import parse_peft as read
    elif adapter.style == "kohya":
        from fastinterp.checkpoint.lora.kohya import parse_kohya as read
    else:
        from fastinterp.checkpoint.lora.diffusers import parse_diffusers as read
    return read(checkpoint)
