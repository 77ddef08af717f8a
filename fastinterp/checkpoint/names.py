"""Names of files and tensors: how they are shown in messages, and which are safe or mean something."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from fastinterp.errors import UsageError
from fastinterp.messages import listed, plain
from fastinterp.presence import is_folder

WEIGHTS = ".safetensors"
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")  # as torch.save writes them: see pytorch/
GGUF = ".gguf"
OTHER_WEIGHTS = (".ggml", ".h5", ".msgpack", ".onnx", ".npz", ".npy", ".tflite", ".nemo")

# Of weights that a library looks for by their name.
STEMS = (
    "model",
    "diffusion_pytorch_model",
    "open_clip_model",
    "open_clip_pytorch_model",
    "pytorch_model",
    "consolidated",
)
PIPELINES = ("model_index.json", "modules.json")  # files that name the components of a folder: see components.py
TEMPLATES = "additional_chat_templates"  # the folder in which transformers keeps those beside chat_template.jinja

SHARD = re.compile(
    r"(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>\.(?:safetensors|bin|pt|pth|ckpt))", re.DOTALL
)
# A part of a model in GGUF, as llama.cpp's gguf-split writes it.
GGUF_SPLIT = re.compile(r"(?P<stem>.*)-(?P<number>\d{5,})-of-(?P<count>\d{5,})\.gguf", re.DOTALL)
# An index, or that of a variant: `model.safetensors.index.fp16.json`, and as diffusers wrote it before 0.30,
# `model.safetensors.fp16.index.json`.
ANY_INDEX = re.compile(
    r"(?P<stem>.+)(?P<suffix>\.(?:safetensors|bin))\.(?:(?P<old>[^.]+)\.)?index\.(?:(?P<variant>[^.]+)\.)?json",
    re.DOTALL,
)

# Pickles that are state of a training run, by what writes them: no weights.
TRAINER_PICKLES = (
    r"(?:optimizer|scheduler|scaler|sampler|dataloader|random_states|rng_state|custom_checkpoint|training_args)"
    r"[^/]*\.(?:pt|pth|bin|pkl|ckpt)|[^/]*optim_states\.pt"
)


def quote(name: object, limit: int = 160) -> str:
    """`name` in backquotes on one line: control characters escaped and the middle of long names cut out."""
    text = str(name)
    if len(text) > limit:
        text = f"{text[: limit // 2]}...{text[-limit // 4 :]}"
    return f"`{plain(text)}`"


def shell_word(text: object) -> str:
    """`text` as one word of a shell command."""
    import shlex  # only messages need it

    return shlex.quote(str(text))


def listing(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    return listed([quote(name) for name in names], limit)


def is_plain(name: str) -> bool:
    """True if `name` names a file directly inside a folder: no separator, no `..`, not absolute."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def is_relative(name: str) -> bool:
    """True if `name` names a file inside a folder, or in folders in it: only plain names between slashes."""
    return all(is_plain(part) for part in name.split("/"))


def index_of(stem: str) -> str:
    """The name of the index of shards of this stem: `model.safetensors.index.json`; of a variant, `model.fp16`, it is
    `model.safetensors.index.fp16.json`.
    """
    base, _, variant = stem.partition(".")
    return f"{base}{WEIGHTS}.index.{variant}.json" if variant and base in STEMS else stem + INDEX


def names_file(out: str) -> str:
    """How the name of an output ends that is one file, `.safetensors` or `.gguf`; empty, if it is a folder.

    Raises: UsageError, if it ends like the name of a file of weights, but is none that can be written. A folder that
    is there may have any name.
    """
    for ending in (WEIGHTS, GGUF):
        if out.endswith(ending):
            return ending
    name = out.rstrip("/")
    stem, suffix = os.path.splitext(name)
    if name.endswith(INDEX):
        stem, suffix = name.removesuffix(INDEX), INDEX
    meant = suffix == INDEX or suffix.lower() in (*PICKLES, *OTHER_WEIGHTS, GGUF, ".sft") or _nearly_weights(suffix)
    if not (meant or out == "-") or is_folder(out):
        return ""
    if out == "-":
        raise UsageError("`-` is no output: checkpoints are not written to stdout. Give a folder, or NAME.safetensors")
    slash = name.endswith((WEIGHTS, GGUF))
    what = "ends in `/`, but its name is that of a file" if slash else f"ends in {quote(suffix)}"
    ending = GGUF if suffix.lower() == GGUF else WEIGHTS
    raise UsageError(
        f"the output {quote(out)} {what}. Give {quote(stem + ending)} for one file, or {quote(stem)} for a folder"
        + ("" if ending == GGUF else ". What is written is safetensors, and of GGUF files GGUF")
    )


def names_weights(name: str) -> bool:
    """Whether this is the name of a file of weights, of whatever kind, or of an index of such."""
    return name.endswith((WEIGHTS, *PICKLES, GGUF, *OTHER_WEIGHTS)) or ANY_INDEX.fullmatch(name) is not None


def _nearly_weights(suffix: str) -> bool:
    """Whether this is `.safetensors`, or that misspelt: `.Safetensors`, `.safetensor`."""
    written = suffix.lower()
    if not 7 < len(written) < 17 or not written.startswith(".s"):
        return False
    from difflib import SequenceMatcher  # not on the path of a merge

    return SequenceMatcher(None, written, WEIGHTS).ratio() > 0.8
