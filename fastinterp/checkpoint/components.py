"""Checkpoints of several components, each in a folder of its own: those of diffusers and of sentence-transformers.

Such a folder is opened as one checkpoint, in which the names of tensors begin with the folder of their component:
`unet/conv_in.weight`. The root of a sentence-transformer is a component without a folder, and so without a prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastinterp.checkpoint.folder import names_in, pickled_files, weight_files
from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import is_relative, listing, quote
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.strict_json import parse_json, parse_object
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.presence import is_file, is_folder

PIPELINE, MODULES = "model_index.json", "modules.json"


class Found(NamedTuple):
    """The components with weights in a folder.

    folders  of each, relative to that folder; empty for the folder itself
    remarks  which others are named, and are not there
    """

    folders: tuple[str, ...]
    remarks: tuple[str, ...]


def find_components(root: Path, present: Sequence[str]) -> Found:
    """The components that model_index.json or modules.json in the folder `root` names.

    present  names in the folder
    Raises: CheckpointError, if the file that names them is damaged.
    """
    named = _of_pipeline(root) if PIPELINE in present else _of_modules(root)
    there = [folder for folder in named if is_folder(root / folder)]
    missing = [folder for folder in named if folder not in there] if PIPELINE in present else []
    remarks = (f"{PIPELINE} names {listing(missing)}, but there is no such folder",) if missing else ()
    return Found(tuple(folder for folder in there if has_weights(root / folder)), remarks)


def named_folders(root: Path) -> tuple[str, ...]:
    """The folders that the files of a pipeline or sentence-transformer in `root` name, with weights or without, there
    or not.
    """
    try:
        if is_file(root / PIPELINE):
            return tuple(_of_pipeline(root))
        return tuple(f for f in _of_modules(root) if f) if is_file(root / MODULES) else ()
    except UnreadableError:
        raise
    except CheckpointError:
        return ()


def _of_pipeline(root: Path) -> list[str]:
    """The folders of the components that model_index.json names."""
    path = str(root / PIPELINE)
    table = parse_object(read_regular(path, MAX_HEADER).lstrip(), "the index of the pipeline", path)
    return [key for key, value in table.items() if is_relative(key) and _is_component(key, value)]


def _is_component(key: str, value: Any) -> bool:
    """Whether it is an entry such as "unet": ["diffusers", "UNet2DConditionModel"]; null stands for one left out."""
    return not key.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value


def _of_modules(root: Path) -> list[str]:
    """The folders of the modules that modules.json names, each once; empty for the root."""
    path = str(root / MODULES)
    try:
        table = parse_json(read_regular(path, MAX_HEADER), "the list of modules", path)
        folders = [module["path"].strip("/") for module in table]
    except (KeyError, TypeError, AttributeError):
        raise CheckpointError("this is no list of modules, each with a `path`", file=path) from None
    wrong = [f for f in folders if f and not is_relative(f)]
    if wrong:
        raise CheckpointError(f"{quote(wrong[0])} is no folder in that of the model", file=path)
    return list(dict.fromkeys(folders))


def has_weights(folder: Path) -> bool:
    """Whether a folder itself has files of weights. Raises: CheckpointError, if it cannot be read."""
    names = names_in(folder)
    return bool(weight_files(names) or pickled_files(names))
