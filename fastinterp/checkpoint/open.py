"""Opens checkpoints: their files, and the place of every tensor in them. Reads headers only, no tensor data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastinterp.checkpoint.header import MAX_HEADER, Entry, read_header
from fastinterp.checkpoint.names import (
    ASIDE,
    INDEX,
    OTHER_WEIGHTS,
    PICKLES,
    PIPELINES,
    PUT_BACK,
    SHARD,
    WEIGHTS,
    is_plain,
    listing,
    quote,
)
from fastinterp.checkpoint.regular_file import Stamp, read_regular, stamp_of
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.messages import closest


@dataclass(slots=True)
class Checkpoint:
    """The files of a model and the tensors in them, as their headers say."""

    name: str  # as the user wrote it
    root: Path  # the folder that holds the files
    files: tuple[Path, ...]
    # In the order of the files, then of the offsets. Inputs are matched by name alone; an output's tensors, and so its
    # shards, come in the order of its first model.
    tensors: dict[str, Entry]
    nbytes: int  # of all tensors
    index: bool  # an index file named the files
    metadata: dict[str, str]  # of all files; where they disagree, the first one's
    stamps: tuple[Stamp, ...]  # of each file, taken before its header was read
    whole_folder: bool  # the user named the folder, or a Hub id, not one file in it
    remarks: tuple[str, ...] = ()  # what was decided about its files: which were left out, say; for people
    index_name: str = ""  # of the index file; empty, if there is none
    components: tuple[Component, ...] = ()  # of a pipeline: see components.py

    @property
    def parts(self) -> tuple[Component, ...]:
        """The components; of a checkpoint without any, itself."""
        return self.components or (Component("", self),)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What an output must not touch: the folder, if it was named, and every file."""
        return (self.root, *self.files) if self.whole_folder else self.files


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a checkpoint that is a checkpoint itself, in a folder of its own: the unet of a pipeline, say.

    folder      in that of the whole; empty: the same
    checkpoint  as if it had been opened alone: its tensors lack the prefix `FOLDER/`, which they have in the whole
    """

    folder: str
    checkpoint: Checkpoint

    @property
    def prefix(self) -> str:
        return f"{self.folder}/" if self.folder else ""


def open_checkpoint(name: str) -> Checkpoint:
    """Open the checkpoint `name`: a folder, a .safetensors file, an index file, or a Hub id (`org/name@revision`).

    A name is looked for on the disk first, and on the Hub only if nothing there has it.
    Raises: CheckpointError, naming file and tensor, if it is missing, damaged, ambiguous or empty.
    """
    path = Path(os.path.expanduser(name))
    if name.strip() and os.path.isdir(path):
        return _open_folder(name, path)
    if name.strip() and os.path.exists(path):
        return _open_file(name, path)
    from fastinterp.checkpoint import hub

    parsed = hub.parse(name)
    if parsed is None:
        raise CheckpointError(f"there is no such folder or file.{_similar(path)}", file=name or "''")
    try:
        root = hub.fetch(*parsed)
    except CheckpointError as error:
        raise CheckpointError(
            f"there is no such folder here.{_similar(path)} As a Hub id: {error.message}", file=name
        ) from error
    return _open_folder(name, root)


def changed_since(checkpoint: Checkpoint) -> list[Path]:
    """The files that were changed, replaced or removed since the checkpoint was opened."""
    return [p for p, stamp in zip(checkpoint.files, checkpoint.stamps, strict=True) if stamp_of(p) != stamp]


def _similar(path: Path) -> str:
    """` Did you mean ...?` with the closest path that is there; nothing, if a part of `path` is like none there."""
    existing = Path()
    try:
        for part in path.parts:
            if not os.path.exists(existing / part):
                close = closest(part, os.listdir(existing))
                if close is None:
                    return ""
                part = close
            existing /= part
    except (OSError, ValueError):
        return ""
    return f" Did you mean {quote(existing)}?" if path.name else ""


def _open_file(name: str, path: Path) -> Checkpoint:
    if path.name.endswith(INDEX):
        return _open_indexed(name, path.parent, path.name, named=True)
    if path.name.endswith(WEIGHTS):
        return _load(name, path.parent, [path.name])
    if path.name.endswith(PICKLES):
        raise CheckpointError(_PICKLED, file=name)
    raise CheckpointError(f"this file is not a checkpoint: expected a folder or a {WEIGHTS} file", file=name)


_PICKLED = (
    "pickled weights are never loaded, because a pickle can run any code. Convert them first, for example with "
    "`transformers`: `AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)`"
)


def _open_folder(name: str, root: Path) -> Checkpoint:
    try:
        present = sorted(n for n in os.listdir(root) if not n.startswith("."))
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error.strerror}", file=str(root)) from None
    if any(n in present for n in PIPELINES):
        from fastinterp.checkpoint.components import open_components

        whole = open_components(name, root, present)
        if whole is not None:
            return whole
    return open_plain_folder(name, root, present)


def open_plain_folder(name: str, root: Path, present: Sequence[str]) -> Checkpoint:
    """The checkpoint in the folder itself, whatever folders in it hold. present: names in the folder, sorted."""
    indexes = [n for n in present if n.endswith(INDEX)]
    weights = [n for n in present if n.endswith(WEIGHTS)]
    _refuse_adapter(name, root, present, [n for n in (*indexes, *weights) if not n.startswith(_ADAPTER)])
    if len(indexes) > 1:
        raise CheckpointError(
            f"the folder has several indexes: {listing(indexes, 8)}. Name the one you mean, as {root / indexes[0]}",
            file=name,
        )
    if indexes:
        return _open_indexed(name, root, indexes[0])
    if not weights:
        raise CheckpointError(_no_weights(root, present), file=name)
    _check_shards(name, weights)
    return _load(name, root, weights, whole_folder=True)


_ADAPTER, _ADAPTER_CONFIG = "adapter_model.", "adapter_config.json"  # as peft saves them


def _refuse_adapter(name: str, root: Path, present: Sequence[str], whole: list[str]) -> None:
    """Raises: CheckpointError, if the folder holds an adapter alone, or beside weights that no index lists.

    whole  the weights in the folder that are no adapter's
    """
    adapters = [n for n in present if n.startswith(_ADAPTER) and n.endswith((WEIGHTS, *PICKLES))]
    if whole and adapters and not any(n.endswith(INDEX) for n in whole):
        raise CheckpointError(
            f"the folder has an adapter, {listing(adapters)}, beside {listing(whole)}. Name the model's file, as "
            f"{root / whole[0]}",
            file=name,
        )
    if whole or not (adapters or _ADAPTER_CONFIG in present):
        return
    kind, base = "a PEFT adapter", ""
    if _ADAPTER_CONFIG in present:
        path = str(root / _ADAPTER_CONFIG)
        config = parse_object(read_regular(path, MAX_HEADER).lstrip(), "the adapter's configuration", path)
        kind = "a LoRA adapter" if config.get("peft_type") == "LORA" else kind
        base = f" to {quote(model)}" if isinstance(model := config.get("base_model_name_or_path"), str) else ""
    raise CheckpointError(
        f"this is {kind}{base}, not a whole model, and adapters are not merged. Merge it into its base first, with "
        f"peft: `AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained('NEW')`; then "
        "name NEW",
        file=name,
    )


def _no_weights(root: Path, present: Sequence[str]) -> str:
    pickles = [n for n in present if n.endswith(PICKLES)]
    if pickles:
        return f"the folder has no {WEIGHTS} file, only {listing(pickles)}: {_PICKLED}"
    others = [n for n in present if n.endswith(OTHER_WEIGHTS)]
    if others:
        return f"the folder has no {WEIGHTS} file, only {listing(others)}: this format is not read"
    below = [n for n in present if any(f.name.endswith(WEIGHTS) for f in (root / n).glob("*" + WEIGHTS))]
    if below:
        return f"the folder itself has no {WEIGHTS} file, but {listing(below)} in it do: name one of them"
    hidden = os.listdir(root)
    aside = sorted(n for n in hidden if ASIDE.fullmatch(n))
    if aside:
        return f"the folder has no {WEIGHTS} file, but a merge died while it replaced {listing(aside)}. {PUT_BACK}"
    if any(".partial-" in n for n in hidden):
        return f"the folder has no {WEIGHTS} file, only those of a merge that did not finish: run it again"
    return f"the folder has no {WEIGHTS} file" + (f", only {listing(present)}" if present else "; it is empty")


def _check_shards(name: str, weights: list[str]) -> None:
    """Without an index, the names `STEM-00001-of-00003.safetensors` must at least be all there."""
    shards: dict[tuple[str, int, int], set[int]] = {}
    for file in weights:
        match = SHARD.fullmatch(file)
        if match:
            key = (match["stem"], int(match["count"]), len(match["count"]))
            shards.setdefault(key, set()).add(int(match["number"]))
    for (stem, count, width), numbers in shards.items():
        # Not compared with a range: a file name may claim a billion shards.
        if len(numbers) != count or min(numbers) != 1 or max(numbers) != count:
            first = next((n for n in range(1, len(numbers) + 1) if n not in numbers), len(numbers) + 1)
            raise CheckpointError(
                f"{len(numbers)} of {count} shards are there, and no index; "
                f"missing: {quote(f'{stem}-{first:05d}-of-{count:0{width}d}{WEIGHTS}')}",
                file=name,
            )


def _open_indexed(name: str, root: Path, index: str, named: bool = False) -> Checkpoint:
    """named: the user named the index itself, so other weights in the folder do not make it ambiguous."""
    weight_map = _read_index(root / index)
    files = sorted(set(weight_map.values()))
    single = index.removesuffix(".index.json")
    if not named and single not in files and os.path.lexists(root / single):
        raise CheckpointError(
            f"the folder has both {quote(single)} and {quote(index)}, which does not name it. "
            f"Name the one you mean, as {root / index}",
            file=name,
        )
    missing = [f for f in files if not os.path.exists(root / f)]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(files)} files that {quote(index)} names are missing: {listing(missing)}", file=name
        )
    return _load(name, root, files, weight_map, index, whole_folder=True)


def _read_index(path: Path) -> dict[str, str]:
    """The weight_map of an index: tensor name -> plain name of a .safetensors file beside it."""
    file = str(path)
    weight_map = parse_object(read_regular(file, MAX_HEADER).lstrip(), "the index", file).get("weight_map")
    if type(weight_map) is not dict:
        raise CheckpointError("the index has no `weight_map` object", file=file)
    for tensor, target in weight_map.items():
        where = f"`weight_map` puts tensor {quote(tensor)} into"
        if type(target) is not str:
            raise CheckpointError(f"{where} {quote(target)}, which is not a file name", file=file, tensor=tensor)
        # The name alone is judged: files in the Hub's cache are links that leave the folder, and are fine.
        if not is_plain(target):
            raise CheckpointError(
                f"{where} {quote(target)}: only a plain file name in the same folder is allowed",
                file=file,
                tensor=tensor,
            )
        if not target.endswith(WEIGHTS):
            what = _PICKLED if target.endswith(PICKLES) else f"expected a {WEIGHTS} file"
            raise CheckpointError(f"{where} {quote(target)}: {what}", file=file, tensor=tensor)
    return weight_map


def _load(
    name: str,
    root: Path,
    files: list[str],
    weight_map: dict[str, str] | None = None,
    index: str | None = None,
    whole_folder: bool = False,
) -> Checkpoint:
    """Read the headers of `files` in `root` and check them against the index's weight_map, if there is one."""
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    stamps: list[Stamp] = []
    for number, file in enumerate(files):
        path = root / file
        # Taken before the header is read, so that a change in between is noticed too.
        stamp = stamp_of(path)
        entries, file_metadata = read_header(path, number)
        stamps.append(stamp or (0, 0, 0, 0))
        for entry in entries:
            if weight_map is not None and weight_map.get(entry.name) != file:
                _contradiction(entry.name, str(path), weight_map, str(index))
            if entry.name in tensors:
                other = files[tensors[entry.name].file]
                raise CheckpointError(
                    f"tensor {quote(entry.name)} is in {quote(other)} and in {quote(file)}, and no index says which "
                    f"counts. Name one file, as {path}",
                    file=name,
                    tensor=entry.name,
                )
            tensors[entry.name] = entry
        metadata = {**file_metadata, **metadata}
    for tensor, file in (weight_map or {}).items():
        if tensor not in tensors:
            raise CheckpointError(
                f"tensor {quote(tensor)} is in {quote(index)} but not in this file",
                file=str(root / file),
                tensor=tensor,
            )
    if not tensors:
        raise CheckpointError("the checkpoint has no tensors", file=name)
    nbytes = sum(e.nbytes for e in tensors.values())
    paths = tuple(root / f for f in files)
    return Checkpoint(
        name, root, paths, tensors, nbytes, index is not None, metadata, tuple(stamps), whole_folder,
        index_name=index or "",
    )  # fmt: skip


def _contradiction(tensor: str, file: str, weight_map: dict[str, str], index: str) -> None:
    if tensor in weight_map:
        message = f"tensor {quote(tensor)} is in this file, but {quote(index)} puts it into {quote(weight_map[tensor])}"
    else:
        message = f"tensor {quote(tensor)} is in this file but not in {quote(index)}"
    raise CheckpointError(message, file=file, tensor=tensor)
