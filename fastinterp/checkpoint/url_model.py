"""Models at addresses, `s3://bucket/model`, `https://host/m.safetensors`: small files fetched, weights left there.

Small files come into a temporary folder, which goes when the program ends; weights are registered (remote.py) and read
by ranges wherever their headers or their data are needed. There is no cache: every run asks for them anew.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from hashlib import blake2b
from pathlib import Path
from urllib.parse import unquote

from fastinterp.checkpoint import hub, remote
from fastinterp.checkpoint.names import listing, names_weights
from fastinterp.checkpoint.url_store import FsspecStore, Store, There, file_system, place_of
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.messages import tell
from fastinterp.presence import exists, is_folder
from fastinterp.urls import full, is_chained, scheme_of

_AT_ONCE = 16  # files that are asked for at the same time
_LONGEST_NAME = 60  # characters of a folder's name here, of up to four bytes each
HERE = ("memory", "file", "local")  # protocols that fetch nothing
_HUB_HOSTS = ("huggingface.co", "hf.co", "www.huggingface.co")
_ON_HUB = re.compile(r"/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([^/]+)(?:/(.+?))?)?/?")


@dataclass
class Site:
    """A model at an address.

    url    as it is shown
    root   the folder here that has its small files
    file   the name of the file in it that was named; empty: the folder was
    versions  size and version of every file that was taken, by name: what its store says, of a small one of which that
              says nothing, a hash
    """

    url: str
    root: Path
    file: str
    versions: dict[str, tuple[int, str]] = field(default_factory=dict)
    store: Store | None = None
    found: dict[str, Mapping[str, There]] = field(default_factory=dict)  # by folder

    def take(self, folders: Sequence[str] = ("",), weights: Sequence[str] = hub.SAFETENSORS) -> None:
        """Fetch the small files of folders of the model, and register the weights there, which stay where they are.

        folders  empty: the top folder
        weights  patterns of their names
        Raises: StorageError and CheckpointError, if they cannot be had.
        """
        small, heavy = {}, {}
        for folder in folders:
            for base, there in self._listed(folder).items():
                name = f"{folder}/{base}" if folder else base
                if there.folder or not hub.is_safe(name):
                    continue
                if hub.is_small(name, there.size) and not exists(self.root / name):
                    small[name] = there
                elif any(fnmatchcase(base, p) for p in weights) and not remote.exists(self.root / name):
                    heavy[name] = there
        if not small and not heavy:
            return
        assert self.store is not None
        store = self.store
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            contents = dict(zip(small, pool.map(store.read, small), strict=True))
            files = dict(zip(heavy, pool.map(store.file, heavy, heavy.values()), strict=True))
        what = hub.fetching([*map(len, contents.values())], [file.size for file in files.values()])
        tell(f"{self.url}: fetching {what}")
        for name, content in contents.items():
            _write(self.root / name, content)
            version = small[name].version or f"blake2b {blake2b(content, digest_size=8).hexdigest()}"
            self.versions[name] = len(content), version
        for name, file in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            remote.register(self.root / name, file, None)
            self.versions[name] = file.size, file.version

    @property
    def folder(self) -> str:
        """The address of the folder."""
        return _parent(self.url) if self.file else self.url.rstrip("/")

    @property
    def has_weights(self) -> bool:
        """Whether there are files of weights, as far as was looked."""
        return bool(self.file) or any(names_weights(name) for name in self.versions)

    def inside(self) -> str:
        """What is in the folder, for a message: `the folders a, b`; empty, if it is empty."""
        there = {name: t for name, t in self._listed("").items() if not name.startswith(".")}
        folders = [name for name, t in there.items() if t.folder]
        kind = "the folder" if folders else "the file"
        names = folders or [*there]
        return f"{kind}{'s' if len(names) > 1 else ''} {listing(names, 8)}" if names else ""

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch small files, whatever they are called: those that are there. Raises: StorageError."""
        assert self.store is not None
        for name in names:
            folder, _, base = name.rpartition("/")
            if hub.is_safe(name) and base in self._listed(folder) and not exists(self.root / name):
                _write(self.root / name, self.store.read(name))

    def _listed(self, folder: str) -> Mapping[str, There]:
        """What is in a folder; of the top folder at least the file that was named."""
        if folder not in self.found:
            assert self.store is not None
            try:
                self.found[folder] = self.store.listed(folder)
            except (CheckpointError, StorageError):
                if not self.file or folder:
                    raise
                self.found[folder] = {}
        found = self.found[folder]
        return {**found, self.file: found.get(self.file, There(None, ""))} if self.file and not folder else found


def find(url: str) -> Site:
    """The model at an address, once a run.

    Raises: CheckpointError, if there is none, or a package is missing; StorageError, if it cannot be reached;
    OutputError, if it is written.
    """
    run = hub.this_run()
    if run.wished and scheme_of(url) not in HERE:
        raise hub.OfflineError(f"nothing is read from there: {run.wished}. Download it, and name the folder", file=url)
    if run.outputs and scheme_of(url) not in ("http", "https"):
        hub.refuse_output(place_of(*file_system(url, full(url))))
    if url not in run.addresses:
        run.addresses[url] = _found(url)
    site = run.addresses[url]
    assert isinstance(site, Site)
    return site


def on_hub(url: str) -> tuple[str, str | None, str] | None:
    """The Hub id, the revision and the path in the repository that an address of the Hub means; None of others."""
    rest = url.partition("://")[2]
    if scheme_of(url) == "hf":
        parts = rest.strip("/").split("/")
        if len(parts) < 2 or parts[0] in ("datasets", "spaces", "buckets"):
            return None
        parsed = hub.parse("/".join(parts[:2]))
        return None if parsed is None else (*parsed, "/".join(parts[2:]))
    host, _, path = rest.partition("?")[0].partition("/")
    if scheme_of(url) not in ("http", "https") or host not in _HUB_HOSTS:
        return None
    match = _ON_HUB.fullmatch(unquote(f"/{path}"))
    return None if match is None or hub.parse(match[1]) is None else (match[1], match[2], match[3] or "")


def _found(url: str) -> Site:
    rest = url.partition("://")[2].partition("?")[0]
    if not rest.strip("/"):
        raise CheckpointError(f"this address names no model: expected {scheme_of(url)}://BUCKET/PATH", file=url)
    last = rest.rstrip("/").rpartition("/")[2]
    file = unquote(last) if names_weights(last) else ""
    given = full(url)
    store = _store(url, given)
    there = store.look()
    if there is not None and there.folder:
        file = ""
    elif there is not None:
        file = last  # whatever it is: that is told when it is opened
    if file:
        store = _store(_parent(url), _parent(given))
    name = "" if file else re.sub(r"[^\w.-]", "_", last)[:_LONGEST_NAME].strip(".")
    root = _new_folder() / (name or "model")
    root.mkdir()
    return Site(url, root, file, store=store)


def _parent(url: str) -> str:
    base, question, query = url.partition("?")
    return base.rstrip("/").rpartition("/")[0] + question + query


def _store(url: str, given: str) -> Store:
    """given: the address with login and parameters"""
    if scheme_of(url) not in ("http", "https") or is_chained(url):
        return FsspecStore(url, given)
    from fastinterp.checkpoint.http_folder import HttpStore

    return HttpStore(url, given)


_folders: list[str] = []


def _new_folder() -> Path:
    """A new folder, which goes when the program ends."""
    if not _folders or not is_folder(_folders[-1]):
        home = tempfile.mkdtemp(prefix="fastinterp-")
        _folders.append(home)
        owner = os.getpid()
        atexit.register(lambda: shutil.rmtree(home, ignore_errors=True) if os.getpid() == owner else None)
    return Path(tempfile.mkdtemp(dir=_folders[-1]))


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror}. It is a temporary file: TMPDIR says where those are") from None
