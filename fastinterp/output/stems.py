"""The stem of weights files: an output has that of its origin, for which the library that loads the origin looks."""

from __future__ import annotations

from collections import Counter

from fastinterp.checkpoint.names import ANY_INDEX, SHARD, STEMS, WEIGHTS
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty, named_file

MODEL, DIFFUSERS, OPEN_CLIP = STEMS[:3]


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
        return f"{match['stem']}.{variant}" if variant else match["stem"]
    stems = Counter(
        m["stem"] if (m := SHARD.fullmatch(p.name)) else p.name.removesuffix(WEIGHTS) for p in checkpoint.files
    )
    stem, _ = stems.most_common(1)[0]
    if len(stems) == 1 and (checkpoint.whole_folder or is_known(stem)):
        return stem
    return _expected(checkpoint)


def is_known(stem: str) -> bool:
    """Whether a library looks for weights of this stem; with a variant, as `model.fp16`, too."""
    return stem.partition(".")[0] in STEMS


def _expected(checkpoint: Checkpoint) -> str:
    """The stem that the software which reads the folder's configuration looks for; else `model`."""
    root = checkpoint.root
    if (root / "open_clip_config.json").is_file():
        return OPEN_CLIP
    return DIFFUSERS if "_diffusers_version" in json_or_empty(root / CONFIG) else MODEL
