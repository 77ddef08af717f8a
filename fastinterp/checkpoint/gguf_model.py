"""A model in GGUF files: which files of a folder it is, what its tensors are for a merge, and what is not merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from fastinterp.checkpoint.gguf_file import read_gguf
from fastinterp.checkpoint.gguf_keys import GgufHeader
from fastinterp.checkpoint.gguf_types import BY_NAME
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import GGUF, GGUF_SPLIT, listing, quote, shell_word
from fastinterp.checkpoint.remote import opened, read_from
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import F32

_PIECE = 1 << 20  # bytes of numbers that are converted at a time
# What a GGUF file may hold beside a model, by `general.type`.
_OTHERS = {
    "adapter": "a LoRA adapter of llama.cpp, and those are not merged. Put it into its model first, with llama.cpp: "
    "`llama-export-lora -m MODEL.gguf --lora {file} -o NEW.gguf`, then name NEW.gguf",
    "imatrix": "an importance matrix of llama.cpp, and no model",
}


class Blocks(msgspec.Struct, frozen=True):
    """Blocks that no decoder of the engine reads: the package gguf turns them into float32 numbers.

    stored_as  the type of the blocks
    start      of the first block in the file, bytes
    numel      number of elements
    """

    stored_as: str
    start: int
    numel: int

    def pieces(self, path: str) -> Iterator[bytes]:
        """The numbers, at most 1 MiB at a time. Raises: CheckpointError, if the file ends too early; OSError."""
        import gguf
        import numpy as np

        elements, nbytes = BY_NAME[self.stored_as].block
        try:
            kind = gguf.GGMLQuantizationType[self.stored_as]
            gguf.quants.dequantize(np.zeros((1, nbytes), np.uint8), kind)
        except (KeyError, NotImplementedError):
            raise CheckpointError(
                f"the package gguf that is installed cannot read {self.stored_as}: `pip install -U gguf`, if a newer "
                "one can",
                file=path,
            ) from None
        left, at = self.numel // elements, self.start
        with opened(path) as file:
            while left:
                count = min(left, max(1, _PIECE // (4 * elements)))
                raw = read_from(file, path, at, count * nbytes)
                blocks = np.frombuffer(raw, np.uint8).reshape(count, nbytes)
                yield np.ascontiguousarray(gguf.quants.dequantize(blocks, kind), dtype=np.float32).tobytes()
                left, at = left - count, at + count * nbytes


def read_model(path: Path, number: int) -> tuple[list[Entry], GgufHeader]:
    """The tensors of a GGUF file, and the rest of its header. Blocks without a decoder are converted: see Blocks.

    Raises: CheckpointError, as read_gguf does; for what is no model; and for types that nothing reads.
    """
    entries, header = read_gguf(path, number)
    kind = str(header.value("general.type") or "model")
    if kind in _OTHERS:
        raise CheckpointError(f"this is {_OTHERS[kind].format(file=shell_word(path))}", file=str(path))
    return [_readable(entry, str(path)) for entry in entries], header


def _readable(entry: Entry, file: str) -> Entry:
    if entry.dtype.block is None:
        return entry
    kind = BY_NAME[entry.dtype.name]
    if kind.decoder:
        return entry
    if not kind.convertible:
        raise CheckpointError(
            f"tensor {quote(entry.name)}: {kind.name} is a type of intermediate results, which no program stores",
            file=file,
            tensor=entry.name,
        )
    return msgspec.structs.replace(
        entry, dtype=F32, nbytes=4 * entry.numel, conversion=Blocks(kind.name, entry.start, entry.numel)
    )


def files_of(name: str, root: Path, file: str, present: Sequence[str]) -> list[str]:
    """The files of the model that `file` in the folder `root` is, or is a part of.

    present  names of the folder's files
    Raises: CheckpointError, if parts are missing.
    """
    split = GGUF_SPLIT.fullmatch(file)
    if split is None:
        return [file]
    same = [n for n in present if (m := GGUF_SPLIT.fullmatch(n)) and (m["stem"], m["count"]) == split.group(1, 3)]
    numbers, count = {int(_number(n)) for n in same}, int(split["count"])
    missing = next((n for n in range(1, len(numbers) + 2) if n not in numbers), 0)
    if missing and missing <= count:
        lost = f"{split['stem']}-{missing:0{len(split['number'])}d}-of-{split['count']}{GGUF}"
        raise CheckpointError(f"{len(same)} of {count} files are there; missing: {quote(lost)}", file=name)
    return sorted(same, key=_number)


def _number(file: str) -> str:
    match = GGUF_SPLIT.fullmatch(file)
    return "" if match is None else match["number"].zfill(20)


def choose(name: str, root: Path, present: Sequence[str]) -> tuple[list[str], list[str]]:
    """(files of the GGUF model in a folder, those that are left out: projectors beside it); ([], []), if none is there.

    Raises: CheckpointError, if there are several models, or parts are missing.
    """
    every = [n for n in present if n.endswith(GGUF)]
    stems: dict[str, str] = {}
    for file in every:
        split = GGUF_SPLIT.fullmatch(file)
        stems.setdefault(f"{split['stem']}-of-{split['count']}" if split else file, file)
    projectors = [stem for stem in stems if "mmproj" in stem.lower()]
    models = [file for stem, file in stems.items() if stem not in projectors] or list(stems.values())
    if len(models) > 1:
        raise CheckpointError(
            f"it is not clear which file is the model: {listing(models, 8)}. Name one: {root / models[0]}", file=name
        )
    if not models:
        return [], []
    files = files_of(name, root, models[0], present)
    return files, [file for file in every if file not in files]


def check_splits(files: Sequence[Path], headers: Sequence[GgufHeader], tensors: int) -> None:
    """Raises: CheckpointError, if files do not say that they are the parts of one model that their names say.

    headers  of the files
    tensors  number of those in all files
    """
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        count, at = header.value("split.count"), header.value("split.no")
        if (count or 1) != len(files) or (at or 0) != number:
            part = at + 1 if isinstance(at, int) else at
            what = "is a whole model" if count is None else f"says that it is part {part} of {count}"
            raise CheckpointError(
                f"its name is that of part {number + 1} of {len(files)}, but it {what}"
                if len(files) > 1
                else f"it {what}, and the others are not there: they are found by names as x-00001-of-00002.gguf",
                file=str(file),
            )
        total = header.value("split.tensors.count")
        if total is not None and total != tensors:
            raise CheckpointError(
                f"it says that the model has {total} tensors, but its {len(files)} files have {tensors}: some is of "
                "another model. Download or copy them again",
                file=str(file),
            )
