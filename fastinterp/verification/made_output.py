"""An output of fastinterp: its files, and the receipt by which it can be made again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fastinterp.checkpoint.names import GGUF, WEIGHTS, quote
from fastinterp.checkpoint.open import Checkpoint, open_checkpoint
from fastinterp.errors import CheckpointError, UsageError
from fastinterp.messages import listed
from fastinterp.ops.combine import NUMERICS

KEY = "fastinterp"  # of the receipt, in the metadata of a file of weights
_SHOWN = 5  # names in a message, before the rest is only counted


class Told(msgspec.Struct, frozen=True):
    """What a receipt tells: everything by which the same bytes are made again. The fields are those of the header's.

    fastinterp  the version that wrote it
    local       models that stand for folders of the machine that made it, named by the last parts of their paths
    """

    fastinterp: str
    numerics: int
    method: str
    models: list[str]
    recipe: str
    rounding: str
    seed: int
    fp8_overflow: str
    dtype: str | None = None
    missing: str = "error"
    channels: str = "same"
    quantize: str = "none"
    document: str | None = None
    max_shard_size: int | None = None
    private: bool = False
    local: list[str] = []


class MadeOutput(msgspec.Struct, frozen=True):
    """An output that fastinterp wrote.

    name        as the user has it
    path        its folder, or the one file that it is
    file        the name of that file; empty, if it is a folder
    told        what the receipt in the headers tells
    """

    name: str
    path: Path
    file: str
    checkpoint: Checkpoint
    told: Told

    @property
    def folder(self) -> Path:
        return self.path.parent if self.file else self.path

    @property
    def ending(self) -> str:
        """How the name of the output ends, if it is one file; empty: it is a folder."""
        return next((e for e in (WEIGHTS, GGUF) if self.file.endswith(e)), "")


def open_output(name: str) -> MadeOutput:
    """Open an output by its name: a folder, or one file.

    Raises: CheckpointError, if it is damaged, or no output of fastinterp; UsageError, if several are in it.
    """
    path = Path(os.path.expanduser(name))
    if path.is_dir() and (inside := outputs_in(path)) and not _has_weights(path):
        raise UsageError(f"{quote(name)} holds several outputs. Name one: {listed([str(p) for p in inside], _SHOWN)}")
    if not path.exists():
        raise CheckpointError("there is no such folder or file", file=name or "''")
    checkpoint = open_checkpoint(name)
    told = told_by(checkpoint.metadata, name)
    return MadeOutput(name, path, "" if path.is_dir() else path.name, checkpoint, told)


def told_by(metadata: Mapping[str, str], name: str) -> Told:
    """What the metadata of a file of weights tells. Raises: CheckpointError, if it has no receipt of a merge."""
    text = metadata.get(KEY)
    if text is None:
        raise CheckpointError(
            "this is no output of fastinterp: its header has no receipt. Only what `fastinterp merge`, `interpolate`, "
            "`average` or `sweep` wrote can be checked against its recipe",
            file=name,
        )
    try:
        return msgspec.convert(json.loads(text), Told)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise CheckpointError(f"the receipt in its header is damaged: {error}", file=name) from None


def refuse_numerics(told: Told, name: str) -> None:
    """Raises: CheckpointError, if the output was made under another version of the numeric contract."""
    if told.numerics != NUMERICS:
        raise CheckpointError(
            f"it was made under version {told.numerics} of the numeric contract, and this fastinterp has version "
            f"{NUMERICS}: the same recipe gives other bytes. Use the version that made it: "
            f"`pip install fastinterp=={told.fastinterp}`",
            file=name,
        )


def outputs_in(folder: Path) -> list[Path]:
    """The folders and files in a folder that are outputs themselves: the points of a path or a sweep."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    return [p for p in entries if _is_output(p)]


def _is_output(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    try:
        if path.is_dir():
            files = [p for p in sorted(path.iterdir()) if p.name.endswith((WEIGHTS, GGUF))]
            path = files[0] if files else path
        if not path.is_file() or not path.name.endswith((WEIGHTS, GGUF)):
            return False
        from fastinterp.checkpoint.file_kinds import read_header

        return KEY in read_header(path, 0)[1]
    except (OSError, CheckpointError):
        return False


def _has_weights(folder: Path) -> bool:
    names = [p.name for p in folder.iterdir()]
    return any(n.endswith((WEIGHTS, GGUF)) or n in ("model_index.json", "modules.json") for n in names)


def receipt_as_dict(told: Told) -> dict[str, Any]:
    """Plain values, as --json prints them."""
    plain: dict[str, Any] = msgspec.to_builtins(told)
    return plain
