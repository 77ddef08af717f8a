"""An output of fastinterp, and the receipt by which it can be checked, and made again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec

from fastinterp.checkpoint.adapters import ADAPTER_CONFIG
from fastinterp.checkpoint.file_kinds import read_header
from fastinterp.checkpoint.journal_file import FINISHING, begun_of, journal_of, journal_path, state_of
from fastinterp.checkpoint.names import GGUF, WEIGHTS, quote
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.unfinished import about_unfinished, what_ends
from fastinterp.errors import CheckpointError, UnreadableError, UsageError
from fastinterp.messages import listed
from fastinterp.ops.combine import NUMERICS
from fastinterp.output.receipt import RECEIPT, ReceiptFile, read_receipt
from fastinterp.plan.outputs import RECEIPT_KEY
from fastinterp.presence import exists, is_file, is_folder, names_at
from fastinterp.urls import is_url

_SHOWN = 5  # names in a message, before the rest is only counted
_NONE = (
    "this is no output of fastinterp: it has no receipt. Only what `fastinterp merge`, `interpolate`, `average` or "
    "`sweep` wrote can be checked against its recipe, or made again"
)
_ADAPTER = "this is an adapter, and adapters have no receipt: only models can be checked against their recipe"


class Told(msgspec.Struct, frozen=True):
    """What a receipt tells: everything by which the same bytes are made again. The fields are those of the header's.

    fastinterp  the version that wrote it
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
    truncate_embeddings: bool = False
    private: bool = False


class MadeOutput(msgspec.Struct, frozen=True):
    """An output that fastinterp wrote.

    name     as the user has it
    path     its folder, or the one file that it is
    file     the name of that file; empty, if it is a folder
    weights  its files of weights
    told     what its receipt tells
    receipt  the file of the folder; None, if it has none
    """

    name: str
    path: Path
    file: str
    weights: tuple[Path, ...]
    told: Told
    receipt: ReceiptFile | None

    @property
    def folder(self) -> Path:
        return self.path.parent if self.file else self.path

    @property
    def ending(self) -> str:
        """How the name of the output ends, if it is one file; empty: it is a folder."""
        return next((e for e in (WEIGHTS, GGUF) if self.file.endswith(e)), "")


def open_output(name: str) -> MadeOutput:
    """An output by its name: a folder, or one file. Its files need not be whole, if the folder has its receipt.

    Raises: CheckpointError, if it is no output of fastinterp, or too damaged to tell; UsageError, if it holds several
    outputs, or is a part of one.
    """
    if is_url(name):
        return _elsewhere(name)
    path = Path(os.path.expanduser(name))
    if not exists(path):
        unfinished = about_unfinished(path.parent, path.name) if path.name.endswith((WEIGHTS, GGUF)) else ""
        missing = f"there is no such file yet: {unfinished}" if unfinished else "there is no such folder or file"
        raise CheckpointError(missing, file=name or "''")
    if is_folder(path):
        return _of_folder(name, path)
    if not path.name.endswith((WEIGHTS, GGUF)):
        raise CheckpointError(_NONE, file=name)
    beside = path.parent / RECEIPT
    if is_file(beside) and path.name in read_receipt(str(beside)).weights:
        raise UsageError(f"{quote(name)} is a part of the output {quote(str(path.parent))}. Name that")
    told = _told(read_header(path, 0).metadata.get(RECEIPT_KEY), name)
    return MadeOutput(name, path, path.name, (path,), told, None)


def _elsewhere(name: str) -> MadeOutput:
    """An output at an address: its small files are fetched, and its weights stay there."""
    from fastinterp.checkpoint import hub

    with hub.one_run():
        checkpoint = open_checkpoint(name)
        if not checkpoint.whole_folder:
            path = checkpoint.files[0]
            told = _told(checkpoint.metadata.get(RECEIPT_KEY), name)
            return MadeOutput(name, path, path.name, (path,), told, None)
        made = _of_folder(name, checkpoint.root)
        if made.receipt is not None and checkpoint.site is not None:
            checkpoint.site.fetch(made.receipt.files)
        elif made.receipt is not None and checkpoint.snapshot is not None:
            hub.fetch(checkpoint.snapshot, checkpoint.root, made.receipt.files)
        return made


def _of_folder(name: str, path: Path) -> MadeOutput:
    unfinished = about_unfinished(path)
    if unfinished and (state_of(journal_path(path)) == FINISHING or not is_file(path / RECEIPT)):
        raise CheckpointError(unfinished, file=name)
    if is_file(path / RECEIPT):
        receipt = read_receipt(str(path / RECEIPT))
        weights = tuple(path / file for file in receipt.weights)
        return MadeOutput(name, path, "", weights, _told(receipt.merge, name), receipt)
    if is_file(path / ADAPTER_CONFIG):
        raise CheckpointError(_ADAPTER, file=name)
    if not _has_weights(path):
        if inside := outputs_in(path):
            raise UsageError(
                f"{quote(name)} holds several outputs. Name one: {listed([str(p) for p in inside], _SHOWN)}"
            )
        raise CheckpointError(_unfinished_in(path) or _NONE, file=name)
    checkpoint = open_checkpoint(name)
    return MadeOutput(name, path, "", checkpoint.files, _told(checkpoint.metadata.get(RECEIPT_KEY), name), None)


def _told(value: object, name: str) -> Told:
    """What a receipt tells: its text, or plain values. Raises: CheckpointError, if it is none of a merge."""
    if value is None:
        raise CheckpointError(_NONE, file=name)
    try:
        return msgspec.convert(json.loads(value) if isinstance(value, str) else value, Told)
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise CheckpointError(f"its receipt is damaged: {error}", file=name) from None


def refuse_numerics(told: Told, name: str) -> None:
    """Raises: CheckpointError, if the output was made under another version of the numeric contract."""
    if told.numerics != NUMERICS:
        raise CheckpointError(
            f"it was made under version {told.numerics} of the numeric contract, and this fastinterp has version "
            f"{NUMERICS}: the same recipe gives other bytes. Use the version that made it: "
            f"`pip install fastinterp=={told.fastinterp}`",
            file=name,
        )


def several_in(name: str) -> list[str]:
    """The outputs in a folder that is none itself; empty, if it is one, or has none."""
    path = Path(os.path.expanduser(name))
    if is_url(name) or not is_folder(path) or is_file(path / RECEIPT):
        return []
    folders = [p for p in outputs_in(path) if is_folder(p)]
    files = [p for p in outputs_in(path) if not is_folder(p)]
    if _has_weights(path):
        return [str(p) for p in files] if len(files) > 1 and not folders and _alone(files) else []
    return [str(p) for p in folders]


def _alone(files: list[Path]) -> bool:
    """Whether each of the files is an output of its own, and not a shard of one."""
    from fastinterp.checkpoint.names import SHARD

    return not any(SHARD.fullmatch(p.name) for p in files)


def outputs_in(folder: Path) -> list[Path]:
    """The folders and files in a folder that are outputs themselves: the points of a path or a sweep."""
    return [path for path in (folder / name for name in names_at(folder)) if _is_output(path)]


def _is_output(path: Path) -> bool:
    if path.name.startswith("."):
        return False
    try:
        if is_folder(path):
            if is_file(path / RECEIPT):
                return True
            files = [name for name in names_at(path) if name.endswith((WEIGHTS, GGUF))]
            path = path / files[0] if files else path
        return path.name.endswith((WEIGHTS, GGUF)) and is_file(path) and RECEIPT_KEY in read_header(path, 0).metadata
    except UnreadableError:
        raise
    except CheckpointError:
        return False


def _unfinished_in(folder: Path) -> str:
    """About outputs in a folder that are not finished, as those of a sweep that was stopped; empty: there are none."""
    journals: dict[str, Path] = {}
    for name in names_at(folder):
        if file := journal_of(name):
            journals[file] = folder / name
        elif is_folder(folder / name) and is_file(journal_path(folder / name)):
            journals[name] = journal_path(folder / name)
    if not journals:
        return ""
    ends = what_ends(begun_of(next(iter(journals.values()))))
    return f"no output in it is finished ({listed(sorted(journals), _SHOWN)}): if none is being written, {ends}"


def _has_weights(folder: Path) -> bool:
    return any(n.endswith((WEIGHTS, GGUF)) or n in ("model_index.json", "modules.json") for n in names_at(folder))
