"""Opens checkpoints: their files, and the place of every tensor in them. Reads headers only, no tensor data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import structs

from fastinterp.checkpoint import remedies, remote
from fastinterp.checkpoint.adapters import (
    ADAPTER_CONFIG,
    Adapter,
    built_in_refusal,
    find_adapter,
    refusal,
)
from fastinterp.checkpoint.components import Found, find_components, named_folders
from fastinterp.checkpoint.file_kinds import KINDS, read_header
from fastinterp.checkpoint.folder import DIFFUSERS, choose, complete_shards, names_in, pickled_files, weight_files
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.index import index_remarks, read_index
from fastinterp.checkpoint.names import (
    ANY_INDEX,
    GGUF,
    OTHER_WEIGHTS,
    PICKLES,
    PIPELINES,
    SHARD,
    TEMPLATES,
    WEIGHTS,
    listing,
    names_file,
    names_weights,
    quote,
    shell_word,
)
from fastinterp.checkpoint.no_weights import no_weights
from fastinterp.checkpoint.regular_file import Stamp, stamp_of
from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty
from fastinterp.checkpoint.unfinished import about_unfinished, read_steady
from fastinterp.errors import CheckpointError, UnreadableError, UsageError
from fastinterp.messages import closest, listed
from fastinterp.presence import exists, is_file, is_folder
from fastinterp.urls import is_url, mistyped, path_of_file, public

if TYPE_CHECKING:
    from fastinterp.checkpoint.gguf_keys import GgufHeader
    from fastinterp.checkpoint.hub_download import Snapshot
    from fastinterp.checkpoint.url_model import Site

    Take = Callable[..., None]  # of folders, and patterns of the names of weights in them

_ELSEWHERE = (0, 0, 0)  # in place of times and inode, in the stamp of a file that is not on the disk
_AT_ONCE = 16  # files elsewhere that are asked for at the same time
_PIECES = "DCP_SHARDING_INFO"  # key of the metadata of files of torch.distributed.checkpoint


@dataclass(slots=True)
class Checkpoint:
    """The files of a model and the tensors in them, as their headers say."""

    name: str  # as the user wrote it
    root: Path  # the folder that holds the files
    files: tuple[Path, ...]
    # In the order of the files, then of FileHeader. Inputs are matched by name alone; an output's tensors, and so its
    # shards, come in the order of its first model.
    tensors: dict[str, Entry]
    nbytes: int  # of all tensors
    index: bool  # an index file named the files
    metadata: dict[str, str]  # of all files; where they disagree, the first one's
    stamps: tuple[Stamp, ...]  # of each file, taken before its header was read
    whole_folder: bool  # the user named the folder, or a Hub id, not one file in it
    remarks: tuple[str, ...] = ()  # what was decided about its files: which were left out, say; for people
    adapter: Adapter | None = None  # the adapter that it is, or has built in
    index_name: str = ""  # of the index file; empty, if there is none
    gguf: GgufHeader | None = None  # of the first file, if it is in GGUF
    components: tuple[Component, ...] = ()  # if it consists of several: see components.py
    adapters: tuple[Checkpoint, ...] = ()  # that are added to it
    snapshot: Snapshot | None = None  # on the Hub, if it was named by an id
    site: Site | None = None  # if it was named by an address

    @property
    def parts(self) -> tuple[Component, ...]:
        """The components; of a checkpoint without any, itself."""
        return self.components or (Component("", self),)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What an output must not touch: the folder, if it was named, and every file."""
        own = (self.root, *self.files) if self.whole_folder else self.files
        return (*own, *(path for adapter in self.adapters for path in adapter.inputs))


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
    """Open the checkpoint `name`: a folder, a file of weights, an index file, a Hub id (`org/name@revision`), or the
    address of one of these, `s3://bucket/model`.

    Another name is looked for on the disk first, and on the Hub only if nothing there has it, and it has a `/`.
    Raises: CheckpointError, naming file and tensor, if it is missing, damaged, ambiguous or empty.
    """
    name = public(name)
    if is_url(name):
        return _open_address(name)
    path = Path(os.path.expanduser(name))
    if name.strip() and is_folder(path):
        return read_steady(name, path, lambda: _open_folder(name, path), lambda found: not changed_since(found))
    if name.strip() and exists(path):
        return read_steady(name, path.parent, lambda: _open_file(name, path), lambda found: not changed_since(found))
    from fastinterp.checkpoint import hub

    parsed = hub.parse(name) if "/" in name else None
    if parsed is None:
        if name.strip() and names_file(name) and (unfinished := about_unfinished(path.parent, path.name)):
            raise CheckpointError(f"there is no such file yet: {unfinished}", file=name)
        similar = mistyped(name) or _similar(path)
        raise CheckpointError(f"there is no such folder or file.{similar}", file=name or "''")
    try:
        snapshot = hub.find(*parsed)
    except UnreadableError:
        raise
    except CheckpointError as error:
        similar = _similar(path)
        if isinstance(error, (hub.OfflineError, hub.UnknownError)) and (similar or is_folder(path.parent)):
            raise CheckpointError(f"there is no such folder or file.{similar}", file=name) from error
        raise CheckpointError(f"there is no such folder here. As a Hub id: {error.message}", file=name) from error
    return _open_snapshot(name, snapshot)


def _open_snapshot(name: str, snapshot: Snapshot, below: str = "") -> Checkpoint:
    """The model on the Hub, or in a folder or file of its repository."""
    from fastinterp.checkpoint import hub

    def take(folders: Sequence[str] = ("",), weights: Sequence[str] = hub.SAFETENSORS) -> None:
        hub.take(snapshot, [f"{start}/{folder}".strip("/") for folder in folders], weights)

    start, file = (below, "") if not names_weights(below) else (os.path.dirname(below), os.path.basename(below))
    root = snapshot.root / start
    try:
        checkpoint = _open_taken(name, root, file, take)
    except CheckpointError as error:
        if snapshot.sizes is not None or isinstance(error, UnreadableError):
            raise
        rest = hub.download(snapshot.id, snapshot.revision)
        message = f"{error.message}. Nothing was fetched, since {hub.offline()}. {rest}"
        raise CheckpointError(message, file=error.file, tensor=error.tensor) from error
    checkpoint.snapshot = snapshot
    if not file and (
        files := [file.relative_to(root).as_posix() for file in checkpoint.files if not file.name.endswith(WEIGHTS)]
    ):
        checkpoint.remarks += (f"{name}: the repository has no {WEIGHTS} files in their place: {listing(files)}",)
    return checkpoint


def _open_address(name: str) -> Checkpoint:
    """The model at an address, `s3://bucket/model`."""
    from fastinterp.checkpoint import hub, url_model

    try:
        path = path_of_file(name)
    except UsageError as error:
        raise CheckpointError(str(error).removeprefix(f"{name}: "), file=name) from None
    if path is not None:
        return open_checkpoint(path)
    if (on_hub := url_model.on_hub(name)) is not None:
        repo, revision, below = on_hub
        try:
            snapshot = hub.find(repo, revision)
        except CheckpointError as error:
            raise CheckpointError(error.message, file=name) from error
        return _open_snapshot(name, snapshot, below)
    site = url_model.find(name)
    try:
        checkpoint = _open_taken(name, site.root, site.file, site.take)
    except CheckpointError as error:
        if not site.has_weights and (inside := site.inside()):
            message = f"there are no files of weights, but {inside}. Name one of these"
            raise CheckpointError(message, file=name) from None
        here, file = str(site.root), error.file or name
        raise CheckpointError(
            error.message.replace(here, site.folder), file=file.replace(here, site.folder), tensor=error.tensor
        ) from error
    checkpoint.site = site
    return checkpoint


def _open_taken(name: str, root: Path, file: str, take: Take) -> Checkpoint:
    """A model of which `take` brings small files into `root`, and registers the weights there."""
    from fastinterp.checkpoint import hub

    if file:
        every = {GGUF: hub.GGUFS}.get(os.path.splitext(file)[1], (file,))
        take(weights=every)
        if ANY_INDEX.fullmatch(file):
            take(weights=tuple(dict.fromkeys(os.path.basename(shard) for shard in read_index(root / file).values())))
        return _open_file(name, root / file)
    take()
    named = named_folders(root)
    if folders := (*named, *_template_folders(root)):
        take(folders)
    if lacking := tuple(folder for folder in named or ("",) if _lacks_weights(root, folder)):
        take(lacking, hub.PICKLED)
    if not named and _lacks_weights(root, "") and not pickled_files(names_in(root)):
        take(weights=hub.GGUFS)
    return _open_folder(name, root)


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError, saying how it becomes a model, if a checkpoint is an adapter. One that is built into a
    whole model is let pass, unless peft can merge it into the model's weights.
    """
    if (adapter := checkpoint.adapter) is None:
        return
    message = built_in_refusal(adapter)
    if not adapter.whole:
        message = refusal(checkpoint.name, checkpoint.root, adapter, checkpoint.tensors, checkpoint.files[0])
    if message:
        raise CheckpointError(message, file=checkpoint.name)


def changed_since(checkpoint: Checkpoint) -> list[Path]:
    """The files that were changed, replaced or removed since the checkpoint was opened."""
    pairs = [*zip(checkpoint.files, checkpoint.stamps, strict=True)]
    if any(remote.find(path) is not None for path in checkpoint.files):
        from concurrent.futures import ThreadPoolExecutor  # stores are asked

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            own = [
                path
                for (path, _), differs in zip(pairs, pool.map(lambda pair: _changed(*pair), pairs), strict=True)
                if differs
            ]
    else:
        own = [path for path, stamp in pairs if _changed(path, stamp)]
    return [*own, *(path for adapter in checkpoint.adapters for path in changed_since(adapter))]


def _changed(path: Path, before: Stamp) -> bool:
    """Of a file that was elsewhere when it was opened, and is here now, the size tells: its path has the version."""
    if (found := remote.find(path)) is not None and found.changed():
        return True
    now = _stamp(path)
    return now[0] != before[0] if before[1:] == _ELSEWHERE else now != before


def _stamp(path: Path) -> Stamp:
    found = remote.find(path)
    return (stamp_of(path) or (0, 0, 0, 0)) if found is None else (found.size, *_ELSEWHERE)


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
    root, file = path.parent, path.name
    if ANY_INDEX.fullmatch(file):
        return _open_indexed(name, root, file)
    if file.endswith(GGUF):
        from fastinterp.checkpoint.gguf_model import files_of

        return _load(name, root, files_of(name, root, file, names_in(root)))
    if file.endswith(tuple(KINDS)):
        shard = SHARD.fullmatch(file)
        remarks = []
        if shard and int(shard["count"]) > 1:
            remarks.append(f"{name} is one of {int(shard['count'])} shards: the tensors of the others are not read")
        return _load(name, root, [file], remarks=remarks)
    if file.endswith(OTHER_WEIGHTS):
        raise CheckpointError(remedies.other_format(root, [file]), file=name)
    if file.endswith(".distcp"):
        raise CheckpointError(remedies.dcp_folder(root), file=name)
    raise CheckpointError(f"this file is not a checkpoint: expected a folder, or one of {listed(KINDS, 8)}", file=name)


def _config(root: Path) -> dict[str, Any]:
    """config.json; empty, if there is none, or if it is damaged: who needs it to be right says so."""
    return json_or_empty(root / CONFIG)


def _lacks_weights(root: Path, folder: str) -> bool:
    """Whether a folder in that of a model has no .safetensors files: it may have others. Empty: `root` itself. One
    without a configuration, as of a tokenizer, is not expected to have any.
    """
    expected = not folder or is_file(root / folder / CONFIG)
    return expected and not weight_files(names_in(root / folder))


def _template_folders(root: Path) -> tuple[str, ...]:
    """The folder in which transformers keeps chat templates beside the one of chat_template.jinja."""
    return (TEMPLATES,) if is_file(root / "chat_template.jinja") else ()


def _open_folder(name: str, root: Path) -> Checkpoint:
    present = names_in(root)
    if any(n in present for n in PIPELINES):
        found = find_components(root, present)
        if any(found.folders):
            return _open_components(name, root, present, found)
    return _open_plain_folder(name, root, present)


def _open_components(name: str, root: Path, present: Sequence[str], found: Found) -> Checkpoint:
    """The checkpoint of all components that were found, each opened as if it had been named alone."""
    components: list[Component] = []
    remarks = [*found.remarks]
    for folder in found.folders:
        opened = _open_folder(str(root / folder), root / folder) if folder else _open_plain_folder(name, root, present)
        components += [Component(f"{folder}/{c.folder}".strip("/"), c.checkpoint) for c in opened.parts]
        remarks += opened.remarks
    tensors: dict[str, Entry] = {}
    files: list[Path] = []
    metadata: dict[str, str] = {}
    for component in components:
        part = component.checkpoint
        for entry in part.tensors.values():
            tensors[component.prefix + entry.name] = structs.replace(
                entry, name=component.prefix + entry.name, file=entry.file + len(files)
            )
        files += part.files
        metadata = {**part.metadata, **metadata}
    return Checkpoint(
        name, root, tuple(files), tensors, sum(c.checkpoint.nbytes for c in components), False, metadata,
        tuple(stamp for c in components for stamp in c.checkpoint.stamps), True, tuple(remarks),
        next((c.checkpoint.adapter for c in components if c.checkpoint.adapter), None), components=tuple(components),
    )  # fmt: skip


def refuse_components(checkpoint: Checkpoint) -> None:
    """Raises: CheckpointError, if it has components, where one model is wanted; it names them."""
    if checkpoint.components:
        places = [str(c.checkpoint.root) if c.folder else str(c.checkpoint.files[0]) for c in checkpoint.components]
        raise CheckpointError(
            f"it consists of {len(places)} models, {listing(places, 8)}. Name one of them", file=checkpoint.name
        )


def _open_plain_folder(name: str, root: Path, present: Sequence[str]) -> Checkpoint:
    """The checkpoint in the folder itself, whatever folders in it hold. present: names in the folder, sorted."""
    choice = choose(name, root, present, _config(root))
    if choice is None:
        return _open_gguf_folder(name, root, present)
    if choice.index is not None:
        return _open_indexed(name, root, choice.index, choice.reason, present)
    return _load(
        name, root, choice.files, whole_folder=True, remarks=_left_out(name, choice.files, choice.reason, present)
    )


def _open_gguf_folder(name: str, root: Path, present: Sequence[str]) -> Checkpoint:
    """The model in a folder that may have GGUF files, and has nothing else that is read."""
    from fastinterp.checkpoint.gguf_model import choose as choose_gguf

    files, others = choose_gguf(name, root, present)
    if not files:
        raise CheckpointError(no_weights(name, root, present), file=name)
    remarks = [f"left out of {name}: {listing(others)}, because the model is {quote(files[0])}"] if others else []
    return _load(name, root, files, whole_folder=True, remarks=remarks)


def _left_out(name: str, taken: Sequence[str], reason: str, present: Sequence[str]) -> list[str]:
    left = [file for file in weight_files(present) if file not in taken]
    pickled = pickled_files(present)
    if taken[0] in pickled:
        left += [file for file in pickled if file not in taken]
    elif not reason.startswith(("transformers loads", "diffusers loads")):  # they would load these then
        left += [n for n in present if n.endswith(PICKLES) and n.startswith(("pytorch_model", f"{DIFFUSERS}."))]
    return [f"left out of {name}: {listing(left)}, because {reason}"] if left else []


def _open_indexed(
    name: str, root: Path, index: str, reason: str | None = None, present: Sequence[str] = ()
) -> Checkpoint:  # fmt: skip
    """reason: why this index, if the user named the folder; `present`: names of its files."""
    weight_map = read_index(root / index)
    files = sorted(set(weight_map.values()))
    missing = [f for f in files if not remote.exists(root / f)]
    if missing:
        raise CheckpointError(_missing(root, index, files, missing), file=name)
    remarks = [] if reason is None else _left_out(name, [index, *files], reason, present)
    return _load(name, root, files, weight_map, index, whole_folder=True, remarks=remarks)


def _missing(root: Path, index: str, files: Sequence[str], missing: Sequence[str]) -> str:
    """The message about missing files that an index names, and what else is there."""
    message = f"{len(missing)} of {len(files)} files that {quote(index)} names are missing: {listing(missing)}"
    present = names_in(root)
    for shards in complete_shards(present):
        return (
            f"{message}. The shards {listing(shards)} are all there, so the index is of another set. Remove the index, "
            f"and they are read without one: `rm {shell_word(root / index)}`"
        )
    match = ANY_INDEX.fullmatch(index)
    single = match["stem"] + match["suffix"] if match else ""
    if single in present:
        return f"{message}. {quote(single)} is there: to read that instead, name {root / single}"
    return f"{message}. Download or copy them again"


def _load(
    name: str,
    root: Path,
    files: Sequence[str],
    weight_map: Mapping[str, str] | None = None,
    index: str | None = None,
    whole_folder: bool = False,
    remarks: Sequence[str] = (),
) -> Checkpoint:
    """Read the headers of `files` in `root`; tensors that an index's weight_map names must be there."""
    tensors: dict[str, Entry] = {}
    superseded: set[str] = set()  # tensors that are in several files of an index
    metadata: dict[str, str] = {}
    stamps: list[Stamp] = []
    headers: list[GgufHeader] = []
    for number, file in enumerate(files):
        path = root / file
        # Taken before the header is read, so that a change in between is noticed too.
        stamp = _stamp(path)
        entries, file_metadata, file_remarks, gguf = read_header(path, number)
        headers += [gguf] if gguf else []
        if _PIECES in file_metadata:
            raise CheckpointError(remedies.dcp_pieces(root), file=str(path))
        stamps.append(stamp)
        for entry in entries:
            if (earlier := tensors.pop(entry.name, None)) is not None:
                if weight_map is None:
                    raise _in_two_files(name, root, entry.name, files[earlier.file], file)
                superseded.add(entry.name)
            tensors[entry.name] = entry
        metadata = {**file_metadata, **metadata}
        remarks = [*remarks, *(f"{name}: {r}" for r in file_remarks)]
    for tensor, file in (weight_map or {}).items():
        if tensor not in tensors:
            raise CheckpointError(
                f"tensor {quote(tensor)} is in {quote(index)} but not in this file",
                file=str(root / file),
                tensor=tensor,
            )
    if not tensors:
        raise CheckpointError("the checkpoint has no tensors", file=name)
    if weight_map is not None:
        found = {tensor: files[entry.file] for tensor, entry in tensors.items()}
        remarks = [*remarks, *(f"{name}: {r}" for r in index_remarks(str(index), weight_map, found, superseded))]
    if headers:
        from fastinterp.checkpoint.gguf_model import check_splits

        check_splits([root / file for file in files], headers, len(tensors))
    nbytes = sum(e.nbytes for e in tensors.values())
    return Checkpoint(
        name, root, tuple(root / f for f in files), tensors, nbytes, index is not None, metadata, tuple(stamps),
        whole_folder, tuple(remarks), find_adapter(tensors, metadata, root / ADAPTER_CONFIG), index or "",
        headers[0] if headers else None,
    )  # fmt: skip


def _in_two_files(name: str, root: Path, tensor: str, first: str, second: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {quote(tensor)} is in {quote(first)} and in {quote(second)}, and no index says which counts. If these "
        f"are two models, name one file, as {root / second}. If each has a piece of every tensor, join them first, "
        "with the program that wrote them",
        file=name,
        tensor=tensor,
    )
