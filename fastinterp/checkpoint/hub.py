"""Models named by their id on the Hugging Face Hub: looked up once a run, small files fetched, weights left there.

What is fetched at once are the small files, into the Hub's cache. Weights are registered (remote.py): headers are read
by ranges, and whole files come into the same cache when something reads their data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from operator import eq
from pathlib import Path

from fastinterp.checkpoint import remote
from fastinterp.checkpoint.hub_download import HubFiles, Snapshot, first_line
from fastinterp.checkpoint.names import GGUF, OTHER_WEIGHTS, PICKLES, WEIGHTS, shell_word
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.errors import CheckpointError, OutputError, StorageError
from fastinterp.messages import counted, size, tell
from fastinterp.presence import exists, is_file, is_folder

# Small files that may belong to a model, its code among them, which is never run.
SMALL = (
    "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.spm", "*.vocab", "*.bpe", "*.codes",
    "*.yaml", "*.yml", "*.py", "tokenizer*", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
SAFETENSORS, GGUFS = (f"*{WEIGHTS}",), (f"*{GGUF}",)
_MOST_SMALL = 200_000_000  # bytes of a file that is called small
# What libraries load of files of torch.save, in place of .safetensors files.
PICKLED = (
    *(f"{stem}{ending}" for stem in ("pytorch_model", "diffusion_pytorch_model") for ending in (".bin", "-*-of-*.bin")),
    "open_clip_pytorch_model.bin", "adapter_model.bin", "pytorch_lora_weights.bin", "learned_embeds.bin",
)  # fmt: skip
_NEVER = (WEIGHTS, *PICKLES, *OTHER_WEIGHTS, GGUF)

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_FILES = (WEIGHTS, *PICKLES, GGUF, *OTHER_WEIGHTS)
_ID = re.compile(rf"({_PART}(?:/{_PART})?)(?:@([A-Za-z0-9][A-Za-z0-9._/-]*))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_MOST_UNKNOWN = 20  # ids that the Hub does not know, after which no more are looked up
_AT_ONCE = 8  # small files that are fetched at the same time
_TIMEOUT_S = 15.0  # of a look-up
_LARGEST_REF = 1000  # bytes of a file of the cache with the commit of a branch or tag


def parse(name: str) -> tuple[str, str | None] | None:
    """`org/name@revision` -> (id, revision or None); None if `name` cannot be a Hub id.

    `./x`, `/x`, `a/b/c` and names of files of weights are paths, never ids.
    """
    match = _ID.fullmatch(name)
    if not match or "--" in match[1] or ".." in match[1] or match[1].endswith(_FILES):
        return None
    return match[1], match[2]


@dataclass
class _Run:
    """What is remembered while a run lasts."""

    found: dict[tuple[str, str | None], Snapshot | CheckpointError] = field(default_factory=dict)
    unknown: int = 0
    refused: str = ""  # why nothing may be fetched, or cannot
    wished: str = ""  # the same, if somebody wants it so: other places than the Hub are not asked either
    addresses: dict[str, object] = field(default_factory=dict)  # Site of url_model.py, which imports this
    outputs: dict[str, tuple[str, ...]] = field(default_factory=dict)  # addresses that are written -> place_of each


_run: ContextVar[_Run | None] = ContextVar("hub_run", default=None)


@contextmanager
def one_run() -> Iterator[None]:
    """Context manager: inside, every id is looked up once, and means the same commit each time."""
    token = _run.set(_run.get() or _Run())
    try:
        yield
    finally:
        _run.reset(token)


class OfflineError(CheckpointError):
    """A model that may be on the Hub, or at an address, which was not asked; the Hub's cache does not have it."""


class UnknownError(CheckpointError):
    """The Hub has no such model, or does not show it."""


def refuse(why: str) -> None:
    """Have nothing fetched until the `one_run` ends that is in effect. why: `--offline was given`."""
    run = _run.get()
    if run is not None:
        run.refused = run.refused or why
        run.wished = run.wished or why


def this_run() -> _Run:
    """What is remembered while a run lasts; outside of one, nothing is."""
    return _run.get() or _Run()


def refuse_output(place: Sequence[str]) -> None:
    """Raises: OutputError, if what is at a place, as of place_of, is written by this run, or is in that, or has it."""
    for out, there in this_run().outputs.items():
        if all(map(eq, place, there)):  # one is the beginning of the other
            raise OutputError(f"{out}: it is an input of the merge, or contains one, or is in one. Give another name")


def place_of(repo: str) -> tuple[str, ...]:
    """What `place_of` of url_store.py is for other stores."""
    return ("Hub", *repo.lower().split("/"))


def offline() -> str:
    """Why nothing is to be fetched: `HF_HUB_OFFLINE is set`; empty, if something may be."""
    run = _run.get()
    if run is not None and run.refused:
        return run.refused
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    try:
        from huggingface_hub import constants
    except ImportError:  # who needs it says so
        return ""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""


def find(repo: str, revision: str | None = None) -> Snapshot:
    """The model `repo` on the Hub; offline, or where that cannot be reached, in its cache.

    Raises: CheckpointError, if huggingface_hub is missing, or the Hub and the cache cannot give the model; OutputError.
    """
    if revision in (None, "main"):  # others stay as they are
        refuse_output(place_of(repo))
    with one_run():
        run = _run.get()
        assert run is not None
        key = repo, revision
        if key not in run.found:
            try:
                run.found[key] = _found(repo, revision, run)
            except CheckpointError as error:
                run.found[key] = error
        found = run.found[key]
    if isinstance(found, CheckpointError):
        raise found
    return found


def _found(repo: str, revision: str | None, run: _Run) -> Snapshot:
    try:
        from huggingface_hub import HfApi, constants
        from huggingface_hub import errors as hub_errors
    except ImportError:
        raise CheckpointError(
            "this needs the Hub's client. Install it: pip install huggingface_hub", file=repo
        ) from None

    if why := offline():
        return _cached(repo, revision, why)
    if run.unknown >= _MOST_UNKNOWN:
        raise UnknownError(f"not looked up: the Hub does not know {run.unknown} names before it", file=repo)
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    except hub_errors.RevisionNotFoundError:
        problem = f"it has no revision `{revision}`"
    except hub_errors.GatedRepoError:
        problem = "it is gated: ask for access on its page, then run `hf auth login`"
    except hub_errors.RepositoryNotFoundError:
        run.unknown += 1
        raise UnknownError(
            "the Hub has no such model, or it is private (then run `hf auth login`)", file=repo
        ) from None
    except hub_errors.HFValidationError as error:
        problem = f"it is not a valid id: {error}"
    except Exception as error:  # the client's HTTP library (requests, httpx) differs by version, and so do its errors
        run.refused = f"the Hub cannot be reached ({first_line(error)})"
        return _cached(repo, revision, run.refused)
    else:
        commit = str(info.sha)
        if not _COMMIT.fullmatch(commit):
            raise CheckpointError("the Hub names no commit of it", file=repo)
        folder = _cache_of(repo)
        _note_commit(folder, revision or constants.DEFAULT_REVISION, commit)
        sizes = {s.rfilename: s.size for s in info.siblings or () if is_safe(s.rfilename)}
        return Snapshot(repo, revision, commit, folder / "snapshots" / commit, sizes)
    raise CheckpointError(problem, file=repo)


def is_safe(name: str) -> bool:
    """Whether a name of a file elsewhere stays within a folder here."""
    return all(part not in ("", ".", "..") and "\\" not in part and "\0" not in part for part in name.split("/"))


def _cache_of(repo: str) -> Path:
    """The folder of a model in the Hub's cache: `refs`, `blobs`, `snapshots`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / "--".join(("models", *repo.split("/")))


def _note_commit(folder: Path, revision: str, commit: str) -> None:
    """Write into the cache which commit a branch or tag is, so that it is found offline."""
    if revision == commit:
        return
    path = folder / "refs" / revision
    try:
        if is_file(path) and path.read_text() == commit:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
        draft.write_text(commit)
        os.replace(draft, path)
    except OSError as error:
        raise StorageError(f"{path}: the Hub's cache cannot be written: {error.strerror}") from None


def _cached(repo: str, revision: str | None, why: str) -> Snapshot:
    """The model as the cache has it. why: the Hub is not asked."""
    from huggingface_hub import constants

    folder = _cache_of(repo)
    wanted = revision or constants.DEFAULT_REVISION
    ref = folder / "refs" / wanted
    try:
        commit = read_regular(str(ref), _LARGEST_REF).decode().strip() if is_file(ref) else wanted
    except UnicodeDecodeError:
        commit = ""
    root = folder / "snapshots" / commit
    if commit and is_safe(commit) and "/" not in commit and is_folder(root):
        remote.forget(root)
        return Snapshot(repo, revision, commit, root)
    where = f"the local cache ({constants.HF_HUB_CACHE}) does not hold it"
    raise OfflineError(f"{why}, and {where}. {download(repo, revision)}", file=repo)


def download(repo: str, revision: str | None) -> str:
    """How a model comes into the cache."""
    at = f" --revision {shell_word(revision)}" if revision else ""
    return f"Download it first, where there is a connection: `hf download {shell_word(repo)}{at}`"


def take(snapshot: Snapshot, folders: Sequence[str] = ("",), weights: Sequence[str] = SAFETENSORS) -> None:
    """Fetch the small files of folders of a model, and register the weights there, which stay where they are.

    folders  empty: the top folder
    weights  patterns of their names
    Raises: StorageError and CheckpointError, if they cannot be had.
    """
    if snapshot.sizes is None:
        return
    names = [name for name in snapshot.sizes if name.rpartition("/")[0] in folders]
    small = [n for n in names if is_small(n, snapshot.sizes[n])]
    heavy = [n for n in names if any(fnmatchcase(n.rpartition("/")[2], pattern) for pattern in weights)]
    lacking = [n for n in small if not exists(snapshot.root / n)]
    there = [n for n in heavy if not remote.exists(snapshot.root / n)]
    if lacking or there:
        tell(_about(snapshot, lacking, there))
    files = HubFiles(snapshot)
    files.fetch_small(lacking, _AT_ONCE)
    for name in there:
        files.register(name)


def fetch(snapshot: Snapshot, folder: Path, names: Iterable[str]) -> None:
    """Fetch small files of a folder of a model, whatever they are called. Raises: StorageError."""
    start = folder.relative_to(snapshot.root).as_posix().removeprefix(".")
    every = [f"{start}/{name}".strip("/") for name in names]
    lacking = [n for n in every if n in (snapshot.sizes or {}) and not exists(snapshot.root / n)]
    HubFiles(snapshot).fetch_small(lacking, _AT_ONCE)


def is_small(name: str, nbytes: int | None) -> bool:
    """Whether a file, by its path, is one of the small ones beside the weights."""
    base = name.rpartition("/")[2]
    return (
        not base.startswith(".") and not base.endswith(_NEVER) and any(fnmatchcase(base, pattern) for pattern in SMALL)
    ) and (nbytes or 0) <= _MOST_SMALL


def fetching(small: Sequence[int], weights: Sequence[int]) -> str:
    """What a line says of files that are fetched: `9 small files, 11.4 MB, and the headers of 2 files of weights, ...`.

    small, weights  their sizes in bytes
    """
    parts = [f"{counted(len(small), 'small file')}, {size(sum(small))}"] if small else []
    if weights:
        headers = "header" if len(weights) == 1 else "headers"
        of = counted(len(weights), "file")
        parts.append(f"the {headers} of {of} of weights, which stay there ({size(sum(weights))})")
    return " and ".join(parts)


def _about(snapshot: Snapshot, small: Sequence[str], weights: Sequence[str]) -> str:
    """The line about what is fetched."""
    sizes = snapshot.sizes or {}
    what = fetching([sizes[n] or 0 for n in small], [sizes[n] or 0 for n in weights])
    return f"{snapshot.name}: fetching {what}, from the Hub at {snapshot.commit[:12]}"
