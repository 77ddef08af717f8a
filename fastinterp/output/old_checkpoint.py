"""What is in an output folder before anything is written: an old checkpoint, and files that are the inputs' own."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.names import ANY_INDEX, GGUF, GGUF_SPLIT, PICKLES, SHARD, TEMPLATES, WEIGHTS
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import is_sidecar
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.output.receipt import RECEIPT, read_receipt
from fastinterp.output.stems import is_known
from fastinterp.presence import file_size, info_of, is_file, is_folder


def old_checkpoint(root: Path, present: Sequence[str], new: Collection[str]) -> tuple[list[str], list[str]]:
    """The files in `root` that make up a checkpoint there (weights, indexes, sidecars), and weights of none.

    present  names relative to `root`
    new      names of files that are written: weights of these stems are those of an older output
    An index that is damaged or no regular file names nothing, but is one of them.
    """
    files = [n for n in present if not os.path.basename(n).startswith(".") and not is_folder(root / n)]
    indexes = [n for n in files if ANY_INDEX.fullmatch(n)]
    listed: set[str] = set()
    for index in indexes:
        beside = index[: -len(os.path.basename(index))]
        try:
            weight_map = parse_json(read_regular(str(root / index), MAX_HEADER), "the index", index)["weight_map"]
            listed.update(beside + v for v in weight_map.values() if isinstance(v, str))
        except UnreadableError:
            raise
        except (CheckpointError, KeyError, TypeError, AttributeError):
            continue
    written = {_stem(n) for n in new if n.endswith((WEIGHTS, GGUF))}
    weights, strangers = [], []
    for name in files:
        last = os.path.basename(name)
        known = last.endswith(WEIGHTS) and (SHARD.fullmatch(last) or is_known(last) or _stem(name) in written)
        known = known or (last.endswith(GGUF) and _stem(name) in written)
        if known or (name in listed and name.endswith((WEIGHTS, *PICKLES))):
            weights.append(name)
        elif name.endswith(WEIGHTS) or (name.endswith(GGUF) and any(n.endswith(GGUF) for n in new)):
            strangers.append(name)
    # A chat template or vocabulary of the old model would be taken for the new one's.
    sidecars = [n for n in files if is_sidecar(os.path.basename(n)) or n.startswith(f"{TEMPLATES}/") or n == RECEIPT]
    return weights + indexes + (sidecars if indexes or weights else []), strangers


def not_of_receipt(root: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Those of these files that fastinterp did not write there, by name: not in the receipt that is there, or not of
    the size that it says.
    """
    if not is_file(root / RECEIPT):
        return tuple(sorted(names))
    try:
        receipt = read_receipt(str(root / RECEIPT))
    except CheckpointError:
        return tuple(sorted(names))
    own = {name: file.size for name, file in receipt.weights.items()}
    own |= {name: file.size for name, file in receipt.files.items()}
    return tuple(sorted(n for n in names if n != RECEIPT and own.get(n, -1) != file_size(root / n)))


def _stem(name: str) -> str:
    match = SHARD.fullmatch(name) or GGUF_SPLIT.fullmatch(name)
    return match["stem"] if match else name.removesuffix(WEIGHTS)


def identity(path: Path) -> tuple[int, int] | None:
    info = info_of(path)
    return None if info is None else (info.st_dev, info.st_ino)


def identities(path: Path) -> set[tuple[int, int] | None]:
    """Of `path` and every folder above it; those that do not exist are left out."""
    real = Path(os.path.realpath(path))
    return {identity(p) for p in (real, *real.parents)} - {None}
