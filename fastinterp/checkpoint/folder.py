"""Which files of a folder make the model: those that the library which loads such folders would read."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastinterp.checkpoint import remote
from fastinterp.checkpoint.index import read_index
from fastinterp.checkpoint.names import (
    ANY_INDEX,
    PICKLES,
    SHARD,
    TRAINER_PICKLES,
    WEIGHTS,
    is_plain,
    listing,
    quote,
)
from fastinterp.errors import CheckpointError, UnreadableError

ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"  # as peft saves them
MODEL, DIFFUSERS = "model", "diffusion_pytorch_model"  # the stems that transformers and diffusers load
PICKLED_MODEL = "pytorch_model"  # the stem of transformers' pickles
_TRAINER = re.compile(TRAINER_PICKLES)
# As torch.distributed.checkpoint writes one for each process; each holds a piece of every tensor.
_PIECE = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
# As diffusers called the shards of a variant before 0.30: now the variant comes before the number.
_OLD_VARIANT = re.compile(r"(?P<shard>.+-\d{5,}-of-\d{5,})\.(?P<variant>[^.]+)\.safetensors", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """The files of a model in its folder: `files`, or those that the index names; and why those and no others."""

    files: tuple[str, ...]
    index: str | None
    reason: str


class _Stem(NamedTuple):
    """A stem and the suffix behind it: `model`, `.safetensors`."""

    name: str
    suffix: str


@dataclass
class _Group:
    """The files of one stem: `model.safetensors`, `model.safetensors.index.json`, `model-00001-of-00002.safetensors`.

    shards  by the count that their names claim, digits as written
    """

    single: str | None = None
    index: str | None = None
    shards: dict[str, list[str]] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The file by which a message names the group; a user can name it, but for shards without an index."""
        return self.single or self.index or next(iter(self.shards.values()))[0]


def names_in(root: Path) -> list[str]:
    """The names in a folder, sorted, hidden ones left out."""
    try:
        return sorted(n for n in {*os.listdir(root), *remote.names_in(root)} if not n.startswith("."))
    except OSError as error:
        raise UnreadableError(f"the folder cannot be read: {error.strerror}", file=str(root)) from None


def weight_files(present: Sequence[str]) -> list[str]:
    """The .safetensors files among the names of a folder's files, and indexes of such."""
    return [name for name in present if name.endswith(WEIGHTS) or _suffix_of_index(name) == WEIGHTS]


def pickled_files(present: Sequence[str]) -> list[str]:
    """The files of torch.save among the names of a folder's files, and indexes of such. What is by its name the state
    of a training run is none of them.
    """
    return [name for name in present if _is_pickle(name) or _suffix_of_index(name) in PICKLES]


def _is_pickle(name: str) -> bool:
    return name.endswith(PICKLES) and not name.endswith((".pkl", ".pickle")) and not _TRAINER.fullmatch(name)


def _suffix_of_index(name: str) -> str:
    """Of the files that an index names by its name; empty, if it is none."""
    match = ANY_INDEX.fullmatch(name)
    return match["suffix"] if match else ""


def choose(name: str, root: Path, present: Sequence[str], config: Mapping[str, Any]) -> Choice | None:
    """The files of the model in the folder `root`; None, if none there is an index, a .safetensors file or a file of
    torch.save.

    name     of the checkpoint, for messages
    present  names of the folder's files, sorted
    config   config.json, or empty

    transformers loads the file that `transformers_weights` of config.json names, else `model.safetensors`, else the
    files that `model.safetensors.index.json` names; diffusers looks for its index first. Files of another stem are not
    the model's then, nor are copies in another precision (`model.fp16.safetensors`). In a folder without such files,
    all must have one stem, or names that differ in a number only. In a folder without any .safetensors file, the same
    holds for files of torch.save, where transformers loads `pytorch_model.bin`.
    Raises: CheckpointError, if it is not clear which files make the model, or if shards are missing.
    """
    safe, pickled = weight_files(present), pickled_files(present)
    named = config.get("transformers_weights")
    if isinstance(named, str) and is_plain(named) and named in (*safe, *pickled):
        index = named if ANY_INDEX.fullmatch(named) else None
        return Choice(() if index else (named,), index, f"config.json names {quote(named)}")
    if all(_is_adapter(file) for file in safe) and any(file.startswith(f"{PICKLED_MODEL}.") for file in pickled):
        _refuse_adapter_beside(name, root, present, _grouped([*safe, *pickled]))
        safe = []
    return _choose(name, root, present, config, safe) or _choose(name, root, present, config, pickled)


def _is_adapter(name: str) -> bool:
    return name.startswith(f"{ADAPTER}.")


def _choose(
    name: str, root: Path, present: Sequence[str], config: Mapping[str, Any], every: Sequence[str]
) -> Choice | None:  # fmt: skip
    """The same among the files `every`, which are .safetensors files, or all of torch.save."""
    pieces = tuple(file for file in every if _PIECE.fullmatch(file))
    groups = _grouped([file for file in every if file not in pieces])
    _refuse_adapter_beside(name, root, present, groups)
    if len(groups) > 1:
        groups = {stem: group for stem, group in groups.items() if stem.name != ADAPTER} or groups
    if not groups:
        return Choice(pieces, None, "they are pieces") if pieces else None
    plain = {
        stem: group for stem, group in groups.items() if stem._replace(name=stem.name.rpartition(".")[0]) not in groups
    }
    known = [_Stem(MODEL, WEIGHTS), _Stem(PICKLED_MODEL, ".bin"), _Stem(DIFFUSERS, WEIGHTS), _Stem(DIFFUSERS, ".bin")]
    stems = [stem for stem in (known[::-1] if "_class_name" in config else known) if stem in plain]
    if stems and (len(stems) == 1 or config):
        return _of_group(name, root, plain[stems[0]], "diffusers" if stems[0].name == DIFFUSERS else "transformers")
    if len(plain) == 1:
        return _of_group(name, root, next(iter(plain.values())))
    singles = [group.single for group in plain.values() if group.single and not group.index and not group.shards]
    if len(singles) == len(plain) and len({re.sub(r"\d+", "#", file) for file in singles}) == 1:
        return Choice(tuple(singles), None, f"the model is {quote(singles[0])} and the files of that name")
    firsts = [group.first for group in plain.values()]
    nameable = [file for file in firsts if not SHARD.fullmatch(file)]
    remedy = f"Name one: {root / nameable[0]}" if nameable else "Move all but those of the model to another folder"
    raise CheckpointError(f"it is not clear which files make the model: {listing(firsts, 8)}. {remedy}", file=name)


def complete_shards(names: Sequence[str]) -> list[list[str]]:
    """The sets of shards among these files of which no number is missing."""
    every = [shards for group in _grouped(names).values() for shards in group.shards.values()]
    return [shards for shards in every if _missing(shards) is None]


def _grouped(names: Sequence[str]) -> dict[_Stem, _Group]:
    """The files of each stem. A variant is the end of its stem: `model.fp16`."""
    groups: dict[_Stem, _Group] = {}
    for name in names:
        if found := ANY_INDEX.fullmatch(name):
            variant = found["variant"] or found["old"]
            stem = _Stem(f"{found['stem']}.{variant}" if variant else found["stem"], found["suffix"])
            groups.setdefault(stem, _Group()).index = name
            continue
        old = _OLD_VARIANT.fullmatch(name)
        if shard := SHARD.fullmatch(f"{old['shard']}{WEIGHTS}" if old else name):
            stem = _Stem(f"{shard['stem']}.{old['variant']}" if old else shard["stem"], shard["suffix"])
            groups.setdefault(stem, _Group()).shards.setdefault(shard["count"], []).append(name)
        else:
            groups.setdefault(_Stem(*os.path.splitext(name)), _Group()).single = name
    return groups


def _of_group(name: str, root: Path, group: _Group, library: str = "") -> Choice:
    """The files of one stem. library: the one that loads it."""
    single, index = group.single, group.index
    if single and index and (library == "diffusers" or single in read_index(root / index).values()):
        single = None
    if file := single or index:
        reason = f"{library} loads {quote(file)}" if library else f"the model is {quote(file)}"
        return Choice((single,), None, reason) if single else Choice((), index, reason)
    complete = [shards for shards in group.shards.values() if _missing(shards) is None]
    if not complete:
        shards = next(iter(group.shards.values()))
        raise CheckpointError(
            f"{len(shards)} of {_count(shards)} shards are there, and no index; missing: {quote(_missing(shards))}",
            file=name,
        )
    if len(complete) > 1:
        raise CheckpointError(
            f"two complete sets of shards are there, and no index: {listing(c[0] for c in complete)} and those that "
            "follow. Move one set to another folder",
            file=name,
        )
    return Choice(tuple(complete[0]), None, f"the model is {quote(complete[0][0])} and the shards that follow")


def _count(shards: Sequence[str]) -> int:
    return int(_shard(shards[0])["count"])


def _shard(name: str) -> re.Match[str]:
    old = _OLD_VARIANT.fullmatch(name)
    match = SHARD.fullmatch(f"{old['shard']}{WEIGHTS}" if old else name)
    assert match is not None
    return match


def _missing(shards: Sequence[str]) -> str | None:
    """The name of the first missing one of the shards of one count; None, if they are all there."""
    numbers = {int(_shard(name)["number"]) for name in shards}
    stem, count, suffix = _shard(shards[0]).group("stem", "count", "suffix")
    # Not compared with a range: a file name may claim a billion shards.
    if len(numbers) == int(count) and min(numbers) == 1 and max(numbers) == int(count):
        return None
    first = next((n for n in range(1, len(numbers) + 1) if n not in numbers), len(numbers) + 1)
    return f"{stem}-{first:05d}-of-{count}{suffix}"


def _refuse_adapter_beside(name: str, root: Path, present: Sequence[str], groups: Mapping[_Stem, _Group]) -> None:
    """Raises: CheckpointError, if the folder has an adapter with its configuration beside a model: transformers loads
    both then. Without the configuration it loads the model alone.
    """
    adapters = [n for n in present if _is_adapter(n) and n.endswith((WEIGHTS, *PICKLES))]
    whole = [group.first for stem, group in groups.items() if stem.name.partition(".")[0] != ADAPTER]
    if adapters and whole and ADAPTER_CONFIG in present:
        model = next((file for file in whole if file.startswith((f"{MODEL}.", f"{PICKLED_MODEL}."))), whole[0])
        raise CheckpointError(
            f"the folder has an adapter, {listing(adapters)}, beside {listing(whole)}: transformers loads the model "
            f"with the adapter on it. With it, name {root / model}+{root / adapters[0]}; without it, name "
            f"{root / model}",
            file=name,
        )
