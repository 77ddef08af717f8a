"""The stem of weights files: an output has that of its origin, for which the library that loads the origin looks."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from fastinterp.checkpoint.names import ANY_INDEX, SHARD, STEMS, WEIGHTS
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty, named_file
from fastinterp.presence import is_file

MODEL, DIFFUSERS, OPEN_CLIP = STEMS[:3]
_SAFE = {"pytorch_model": MODEL, "open_clip_pytorch_model": OPEN_CLIP}


def stem_of(checkpoint: Checkpoint) -> str:
    """The stem of an output's weights files: `model` of `model.safetensors` and `model-00001-of-00002.safetensors`.

    It is that of the checkpoint's files, with a variant (`model.fp16`), or of their index. One file that was named
    alone may be called anything: if no library looks for its name, it is the stem that its folder's configuration
    leads to.
    """
    if named_file(checkpoint.root):  # any name: an output names none, and has the usual one
        return MODEL
    if match := ANY_INDEX.fullmatch(checkpoint.index_name):
        variant = match["old"] or match["variant"]
        stem = match["stem"] if match["suffix"] == WEIGHTS else _safe(match["stem"])
        return f"{stem}.{variant}" if variant else stem
    stems = Counter(map(_stem_of_file, checkpoint.files))
    stem, _ = stems.most_common(1)[0]
    if len(stems) == 1 and (checkpoint.whole_folder or is_known(stem)):
        return stem
    return _expected(checkpoint)


def _stem_of_file(path: Path) -> str:
    shard = SHARD.fullmatch(path.name)
    stem, suffix = (shard["stem"], shard["suffix"]) if shard else os.path.splitext(path.name)
    return stem if suffix == WEIGHTS else _safe(stem)


def _safe(stem: str) -> str:
    """The stem that libraries look for in .safetensors files, where theirs of files of torch.save is this one."""
    base, dot, variant = stem.partition(".")
    return "consolidated" if stem == "consolidated.00" else _SAFE.get(base, base) + dot + variant


def is_known(stem: str) -> bool:
    """Whether a library looks for weights of this stem; with a variant, as `model.fp16`, too."""
    return stem.partition(".")[0] in STEMS


def _expected(checkpoint: Checkpoint) -> str:
    """The stem that the software which reads the folder's configuration looks for; else `model`."""
    root = checkpoint.root
    if is_file(root / "open_clip_config.json"):
        return OPEN_CLIP
    return DIFFUSERS if "_diffusers_version" in json_or_empty(root / CONFIG) else MODEL
