"""The small files that go with the weights: configuration, tokenizer and processors."""

from __future__ import annotations

import json
import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import OTHER_WEIGHTS, PICKLES, WEIGHTS
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import DType

CONFIG = "config.json"
_PATTERNS = (
    CONFIG, "generation_config.json", "chat_template.*",
    "tokenizer*.json", "tokenizer*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "spiece.model", "sentencepiece*.model", "*.spm", "*.tiktoken", "bpe.codes", "normalizer.json", "tekken.json",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json",
)  # fmt: skip
_NEVER = (WEIGHTS, *PICKLES, *OTHER_WEIGHTS, ".py", ".index.json")


def is_sidecar(name: str) -> bool:
    """True for a file that belongs to a model beside its weights. Never weights, code or optimizer state."""
    return not name.endswith(_NEVER) and any(fnmatchcase(name, p) for p in _PATTERNS)


def is_tokenizer_file(name: str) -> bool:
    """True for a sidecar that is no configuration of model, generation or processor."""
    return is_sidecar(name) and (name == "tokenizer_config.json" or "config." not in name)


def copy_sidecars(root: Path, dtype: DType | None = None) -> dict[str, bytes | Path]:
    """The sidecars in a checkpoint's folder, by name: the path to copy, or new content.

    With `dtype`, the dtype of all output weights, config.json says so.
    Raises: CheckpointError, if config.json has to change and is damaged or cannot be read.
    """
    try:
        names = [n for n in sorted(os.listdir(root)) if is_sidecar(n) and (root / n).is_file()]
        files: dict[str, bytes | Path] = {n: root / n for n in names}
        if dtype is not None and CONFIG in files:
            path = str(root / CONFIG)
            files[CONFIG] = with_dtype(read_regular(path, MAX_HEADER), dtype, path)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}", file=str(error.filename)) from None
    return files


def needs_code(root: Path) -> bool:
    """Whether config.json in a checkpoint's folder names Python files of the model's own.

    Raises: CheckpointError, if it is damaged or cannot be read.
    """
    return "auto_map" in (read_config(root) or {})


def read_config(root: Path) -> dict[str, Any] | None:
    """config.json in a checkpoint's folder; None if there is none.

    Raises: CheckpointError, if it is damaged or cannot be read.
    """
    path = root / CONFIG
    try:
        if not path.is_file():
            return None
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}", file=str(path)) from None
    return parse_object(read_regular(str(path), MAX_HEADER).lstrip(), "the model configuration", str(path))


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
        if key in ("torch_dtype", "dtype") and (value is None or isinstance(value, str)):
            changed |= value != name
            table[key] = name
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            changed |= _set_dtype(value, name)
    return changed
