"""The small files that go with the weights: which they are, and config.json."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import GGUF, OTHER_WEIGHTS, PICKLES, PIPELINES, WEIGHTS, quote, shell_word
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.strict_json import parse_json, parse_object
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.messages import listed
from fastinterp.ops.dtypes import DType
from fastinterp.presence import is_file

CONFIG = "config.json"
_TOKENIZER = (
    "chat_template.*", "tokenizer*.json", "tokenizer*.model", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model", "sentencepiece*.model", "*.spm", "*.tiktoken", "bpe.codes", "normalizer.json",
    "tekken.json",
)  # fmt: skip
_CONFIGS = (
    CONFIG, "generation_config.json", "*processor_config.json", "hf_quant_config.json", "open_clip_config.json",
    "sentence_*_config.json", "config_sentence_transformers.json", *PIPELINES,
)  # fmt: skip
_NEVER = (WEIGHTS, *PICKLES, *OTHER_WEIGHTS, GGUF, ".py", ".index.json")


def is_sidecar(name: str) -> bool:
    """True for a file that belongs to a model beside its weights. Never weights, code or optimizer state."""
    return is_tokenizer_file(name) or _matches(name, _CONFIGS)


def is_tokenizer_file(name: str) -> bool:
    """True for a file of a tokenizer in the model's own folder."""
    return _matches(name, _TOKENIZER)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not name.endswith(_NEVER) and "/" not in name and any(fnmatchcase(name, p) for p in patterns)


def refuse_link(root: Path, name: str) -> None:
    """Refuse a small file that is a link to something outside of its model: any file could get into an output so.

    The Hub's cache is no such case: its models are links to blobs beside them.
    Raises: CheckpointError; OSError.
    """
    path, home = root / name, os.path.realpath(root)
    target = os.path.realpath(path)
    if target == os.path.join(home, name) or f"{target}/".startswith(f"{home}/"):
        return
    repository, snapshots, _ = f"{home}/".rpartition("/snapshots/")
    if snapshots and os.path.dirname(target) == f"{repository}/blobs":
        return
    here, there = shell_word(path), shell_word(target)
    raise CheckpointError(
        f"this is a link to {quote(target)}, outside of the model's folder, and is not followed. If it belongs to the "
        f"model, copy it: `rm {here} && cp {there} {here}`",
        file=str(path),
    )


def read_config(root: Path) -> dict[str, Any] | None:
    """config.json in a checkpoint's folder; None if there is none.

    Raises: CheckpointError, if it is damaged or cannot be read.
    """
    path = root / CONFIG
    if not is_file(path):
        return None
    return parse_object(read_regular(str(path), MAX_HEADER).lstrip(), "the model configuration", str(path))


_DTYPES = ("torch_dtype", "dtype")  # keys of config.json
_NAMED_FILE = "transformers_weights"  # of config.json: which file transformers reads in place of model.safetensors


def named_file(root: Path) -> str | None:
    """The file or index of weights that config.json in the folder names, by which transformers goes; None, if it does
    not name one, or is damaged. Raises: UnreadableError.
    """
    name = json_or_empty(root / CONFIG).get(_NAMED_FILE)
    return name if isinstance(name, str) else None


def without_named_file(config: bytes, file: str = CONFIG) -> bytes:
    """`config` that names no file of weights: those of an output have the usual name."""
    table = parse_object(config.lstrip(), "the model configuration", file)
    table.pop(_NAMED_FILE, None)
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def json_or_empty(path: Path) -> dict[str, Any]:
    """The JSON object in a file that is only looked at: empty, if there is none, or if it is damaged.

    Raises: UnreadableError, if there is one that cannot be read.
    """
    try:
        return parse_object(read_regular(str(path), MAX_HEADER).lstrip(), path.name, str(path))
    except UnreadableError:
        raise
    except CheckpointError:
        return {}


def content_of(content: bytes | Path) -> bytes:
    """The content of a small file: itself, or what is in the file at a path."""
    return content if isinstance(content, bytes) else read_regular(str(content))


def what_differs(old: bytes, new: bytes) -> str | None:
    """In what a small file `new` differs from `old`: `vocab_size 303, num_hidden_layers 6` of JSON objects; None, if in
    nothing, or only in dtypes and in the name of the file of weights.
    """
    if old == new:
        return None
    try:
        before, after = parse_json(old, "the old file", ""), parse_json(new, "the new file", "")
    except CheckpointError:
        return ""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return ""
    keys = [k for k in {**after, **before} if before.get(k) != after.get(k) and k not in (*_DTYPES, _NAMED_FILE)]
    values = [f"{k} {json.dumps(after[k])}" for k in keys if k in after and not isinstance(after[k], (dict, list))]
    return listed(values, 4) if keys else None


def with_dtype(config: bytes, dtype: DType, file: str = CONFIG) -> bytes:
    """`config` with its `torch_dtype` and `dtype` set to `dtype`, at the top and in nested `*_config` objects.

    Only keys that are there are set. The bytes come back untouched if nothing changes.
    """
    table = parse_object(config.lstrip(), "the model configuration", file)
    if not dtype.merges:
        raise CheckpointError(f"the model configuration has no name for dtype {dtype}", file=file)
    if not _set_dtype(table, dtype.library_name):
        return config
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()


def _set_dtype(table: dict[str, Any], name: str) -> bool:
    changed = False
    for key, value in table.items():
        if key in _DTYPES and (value is None or isinstance(value, str)):
            changed |= value != name
            table[key] = name
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed |= _set_dtype(value, name)
    return changed
