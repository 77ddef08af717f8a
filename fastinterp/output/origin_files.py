"""What becomes of the files in the origin's folder: each is merged, copied, or left out for a reason that is told."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from fastinterp.checkpoint.components import named_folders
from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import GGUF, OTHER_WEIGHTS, PICKLES, TEMPLATES, TRAINER_PICKLES, WEIGHTS, quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.regular_file import Stamp, read_regular, stamp_of
from fastinterp.checkpoint.sidecar_files import (
    CONFIG,
    is_sidecar,
    named_file,
    refuse_link,
    with_dtype,
    without_named_file,
)
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.messages import listed
from fastinterp.ops.dtypes import DType
from fastinterp.output.receipt import RECEIPT
from fastinterp.presence import is_file, is_folder, is_link, names_at, walk

LARGEST = 10_000_000  # bytes of a file that is copied without being known
_DEPTH, _MOST = 6, 5000  # folders in folders, and files of one, that are looked at
_SHOWN = 8  # names in a remark, before the rest is only counted

_CARD = "the output has a model card of its own"
_RECEIPT = "the output has a receipt of its own"
_TRAINER = "state of a training run"
_WEIGHTS = "other weights"
_MEDIA = "pictures and other media"
_HIDDEN = "hidden"
_LINK = "a link to a folder"
_ODD = "no regular file"
_CODE = "code that no configuration names"
_LARGE = f"of unknown use, and larger than {LARGEST // 10**6} MB"
_UNKNOWN = "of unknown use"
_BESIDE = "beside the one file that was named"

_LICENCES = re.compile(r"(licen[cs]e|notice|copying|authors|.*use[_-]policy)([._-].*)?", re.IGNORECASE)
_TEXTS = (".json", ".txt", ".jinja", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".md", ".csv", ".tsv", ".vocab", ".bpe",
          ".codes", ".model", ".spm", ".tiktoken")  # fmt: skip
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".bmp", ".ico", ".mp4", ".webm", ".mov", ".mp3", ".wav",
             ".flac", ".ogg", ".pdf")  # fmt: skip
_FORMATS = (*PICKLES, *OTHER_WEIGHTS, GGUF, ".distcp", ".engine", ".mlmodel", ".pte", ".ot", ".onnx_data")
_STATE = re.compile(
    rf"{TRAINER_PICKLES}|training_args\.json|trainer_state\.json|(all|train|eval|test|predict)_results\.json|events\.out\..*"
    r"|zero_to_fp32\.py|latest|latest_checkpointed_iteration\.txt|.*\.log"
)
_STATE_FOLDERS = re.compile(r"(checkpoint|step|epoch|iter)[-_]?\d+|global_step\d*|runs|wandb|logs?|tensorboard|mlruns")
_FORMAT_FOLDERS = re.compile(r"onnx|openvino|coreml|gguf|tflite|original|tensorrt|mlx|exl2")


class OriginFiles(msgspec.Struct, frozen=True):
    """The files in a folder that are not merged.

    root      the folder
    copied    name relative to `root` -> path. Some are changed before they are written, config.json by its dtype, say
    left_out  reason -> names, relative to `root`; those of folders end in `/`
    code      names of those copied that are Python code
    folders   those with weights that are merged, relative to `root`
    stamps    of the files that are copied, taken when they were listed
    """

    root: Path
    copied: dict[str, Path]
    left_out: dict[str, tuple[str, ...]]
    code: tuple[str, ...]
    folders: tuple[str, ...]
    stamps: dict[Path, Stamp | None]

    def contents(self, dtype: DType | None = None) -> dict[str, bytes | Path]:
        """What is written, by name: the path to copy, or new content.

        dtype  of all output weights, which the config.json of each component says then
        Raises: CheckpointError, if a config.json has to change and is damaged or cannot be read.
        """
        files: dict[str, bytes | Path] = {**self.copied}
        for folder in self.folders:
            name = f"{folder}/{CONFIG}" if folder else CONFIG
            if name not in files:
                continue
            path = str(self.root / name)
            if dtype is not None and dtype.block is None:
                files[name] = with_dtype(read_regular(path, MAX_HEADER), dtype, path)
            if named_file(self.root / folder):
                content = files[name]
                raw = content if isinstance(content, bytes) else read_regular(path, MAX_HEADER)
                files[name] = without_named_file(raw, path)
        return files

    def remarks(self, name: str, told: tuple[str, ...] = ()) -> list[str]:
        """What is left out, a line for each reason, and which code is copied.

        name  of the origin
        told  remarks on its weights: those that they name are not named again
        """
        named = [file for folder in self.folders if (file := named_file(self.root / folder))]
        lines = [
            f"`transformers_weights` ({quote(file)}) is left out of config.json: the output has the usual names"
            for file in named
        ]
        for reason, names in self.left_out.items():
            new = [n for n in names if not any(n in remark for remark in told)] if reason == _WEIGHTS else names
            if new:
                lines.append(f"not copied from {name}, {reason}: {listed(new, _SHOWN)}")
        if self.code:
            lines.append(f"code is copied from {name}, and never run: {listed(self.code, _SHOWN)}")
        return lines


def origin_files(
    root: Path, source: Checkpoint | None, left_out: Mapping[str, tuple[str, ...]] | None = None
) -> OriginFiles:
    """The files in the folder `root`, of the checkpoint `source` or of what is made from that.

    Of a checkpoint that is one file, named alone, only files that are known to belong to a model are copied; the others
    in its folder are left out, and told if the folder has a configuration: else they are no part of a model.

    left_out  files of the source that are not in the folder, because they have been left out before: reason -> names
    Raises: CheckpointError, if the folder cannot be read, or one of the files is a link out of it.
    """
    try:
        files = _sorted_out(root, source)
    except OSError as error:
        raise CheckpointError(f"it cannot be read: {error.strerror}", file=str(error.filename)) from None
    return replace(files, left_out={**(left_out or {}), **files.left_out})


def _sorted_out(root: Path, source: Checkpoint | None) -> OriginFiles:
    whole = source is None or source.whole_folder
    merged = _merged(source)
    found = list(_walk(root, whole, merged, named_folders(root)))
    names = [name for name, reason in found if reason is None]
    coded = _named_modules(root, names)
    code = [n for n in names if n.endswith(".py") and not _STATE.fullmatch(os.path.basename(n))]
    code = code if coded & {os.path.basename(n).removesuffix(".py") for n in code} else []
    copied: dict[str, Path] = {}
    left_out: dict[str, list[str]] = {}
    is_model = whole or is_file(root / CONFIG)
    for name, reason in found:
        why = reason or (None if name in code else _why_not(root, name, whole))
        if why is None:
            refuse_link(root, name)
            copied[name] = root / name
        elif is_model:
            left_out.setdefault(why, []).append(name)
    return OriginFiles(
        root, copied, {why: tuple(sorted(names)) for why, names in sorted(left_out.items())}, tuple(code),
        ("",) if source is None else tuple(part.folder for part in source.parts),
        {path: stamp_of(path) for path in copied.values()},
    )  # fmt: skip


def _merged(source: Checkpoint | None) -> set[Path]:
    """The files of weights that are merged, and their indexes."""
    if source is None:
        return set()
    indexes = (p.checkpoint.root / p.checkpoint.index_name for p in source.parts if p.checkpoint.index_name)
    return {*source.files, *indexes}


def _walk(root: Path, whole: bool, merged: set[Path], named: tuple[str, ...]) -> Iterator[tuple[str, str | None]]:
    """The names of all files that are not merged, sorted; for what is left out at first sight, why.

    whole  folders in the folder are part of the checkpoint
    named  folders that are known to be
    """
    for name in names_at(root):
        path = root / name
        if path in merged:
            continue
        if not is_folder(path):
            own = _CARD if name.lower() in ("readme.md", "readme") else _RECEIPT if name == RECEIPT else None
            yield name, own or _odd(path)
            continue
        below = name in named or any(n.startswith(f"{name}/") for n in named)
        why = None if below else _why_no_folder(path, whole)
        inside = [] if why else list(_files(path, name))
        if why is None and not below and any(n.endswith((WEIGHTS, *_FORMATS)) for n in inside):
            why = _WEIGHTS
        if why is None and len(inside) > _MOST:
            why = f"of more than {_MOST} files"
        if why:
            yield f"{name}/", why
            continue
        for file in inside:
            if root / file not in merged:
                yield file, _odd(root / file)


def _odd(path: Path) -> str | None:
    if path.name.startswith("."):
        return _HIDDEN
    return None if is_file(path) else _ODD


def _why_no_folder(path: Path, whole: bool) -> str | None:
    """Why a folder is left out whole, if that is known without a look into it."""
    if path.name.startswith("."):
        return _HIDDEN
    if is_link(path):
        return _LINK
    if _STATE_FOLDERS.fullmatch(path.name):
        return _TRAINER
    if _FORMAT_FOLDERS.fullmatch(path.name):
        return _WEIGHTS
    return None if whole or path.name == TEMPLATES else _BESIDE


def _files(folder: Path, name: str) -> Iterator[str]:
    """The files in a folder and in those in it, at most one more than is looked at. Links to folders are not followed.

    name  of the folder, with which their names begin
    """
    count = 0
    for path, folders, files in walk(folder):
        below = os.path.relpath(path, folder)
        prefix = name if below == "." else f"{name}/{below}"
        folders[:] = [] if prefix.count("/") + 1 >= _DEPTH else sorted(folders)
        for file in sorted(files):
            count += 1
            if count > _MOST + 1:
                return
            yield f"{prefix}/{file}"


def _why_not(root: Path, name: str, whole: bool) -> str | None:
    """Why a file is not copied; None, if it is."""
    last = os.path.basename(name)
    if _STATE.fullmatch(last):
        return _TRAINER
    if last.endswith((WEIGHTS, *_FORMATS)) or ".index." in last or last == "adapter_config.json":
        return _WEIGHTS
    if last.endswith(".py"):
        return _CODE
    if is_sidecar(last) or _LICENCES.fullmatch(last):
        return None
    if last.lower().endswith(_PICTURES):
        return _MEDIA
    if not whole and "/" not in name:
        return _BESIDE
    if not last.lower().endswith(_TEXTS):
        return _UNKNOWN
    return _LARGE if (root / name).stat().st_size > LARGEST else None


def _named_modules(root: Path, names: list[str]) -> set[str]:
    """The Python modules that JSON files among `names` name: in `auto_map`, as a component's class or module's type."""
    found: set[str] = set()
    for name in names:
        last = os.path.basename(name)
        if last.endswith(("config.json", "model_index.json")) or last == "modules.json":
            found |= _modules_in(root / name, last)
    return found


def _modules_in(path: Path, kind: str) -> set[str]:
    try:
        table = parse_json(read_regular(str(path), LARGEST), path.name, str(path))
    except UnreadableError:
        raise
    except CheckpointError:
        return set()  # who needs it says what is wrong with it
    values: list[Any] = []
    if kind == "modules.json" and isinstance(table, list):
        values = [module.get("type") for module in table if isinstance(module, dict)]
    elif isinstance(table, dict) and kind == "model_index.json":
        values = [value[0] for value in table.values() if isinstance(value, list) and value]
    elif isinstance(table, dict):
        values = list(auto_map_modules(table))
    return {value.partition(".")[0] for value in values if isinstance(value, str)}


def auto_map_modules(config: dict[str, Any]) -> set[str]:
    """The Python modules beside a configuration that its `auto_map` names; not those of another repository."""
    auto_map = config.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, dict) else []
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return {v.partition(".")[0] for v in flat if isinstance(v, str) and "--" not in v}


def missing_code(root: Path) -> dict[str, list[str]]:
    """Configurations in the folder `root`, and the files of code that their `auto_map` names and that are not there."""
    missing = {}
    for name in (n for n in names_at(root) if n.endswith("config.json")):
        modules = sorted(_modules_in(root / name, name))
        if files := [f"{m}.py" for m in modules if not is_file(root / f"{m}.py")]:
            missing[name] = files
    return missing
