"""Files of a model on the Hub: small ones singly, whole weights into the Hub's cache, ranges of weights over HTTP."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastinterp.checkpoint import remote
from fastinterp.errors import CheckpointError, StorageError
from fastinterp.messages import counted, size, tell
from fastinterp.presence import exists, is_file

_AT_ONCE = 4  # files of weights that are downloaded at the same time
_TICK_S = 0.1


@dataclass(frozen=True)
class Snapshot:
    """A model on the Hub as it is at one commit.

    id, revision  as they were asked for
    commit        its hash
    root          the folder here that has its files, or will have them
    sizes         bytes of every file there, by its path; None: the Hub was not asked, and what is in `root` is all
    """

    id: str
    revision: str | None
    commit: str
    root: Path
    sizes: dict[str, int | None] | None = None

    @property
    def name(self) -> str:
        """As people write it: `org/name@revision`."""
        return self.id + (f"@{self.revision}" if self.revision else "")


class _Stop(Exception):
    """Ends a download whose program was interrupted."""


class HubFiles:
    """The files of one model on the Hub, at one commit."""

    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot

    def fetch_small(self, names: Sequence[str], at_once: int) -> None:
        """Download small files into the cache. Raises: StorageError."""
        if names:
            self._download(names, at_once, lambda _: None)

    def register(self, name: str) -> None:
        """Let the path that a file of weights has once it is downloaded stand for the file there."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        from fastinterp.checkpoint.http_ranges import HttpFile

        snapshot = self._snapshot
        path = snapshot.root / name
        path.parent.mkdir(parents=True, exist_ok=True)  # components are looked for as folders
        url = hf_hub_url(snapshot.id, name, revision=snapshot.commit, endpoint=constants.ENDPOINT)
        shown = f"{snapshot.id}/{name}"
        nbytes = (snapshot.sizes or {}).get(name)
        headers: Callable[[], Mapping[str, str]] = build_hf_headers
        remote.register(path, HttpFile(url, shown, nbytes, headers, pinned=True), self)

    def fetch(self, paths: Sequence[Path]) -> None:
        """Download whole files of weights into the cache, with a line and progress.

        Raises: StorageError, if there is no room for them, or they cannot be had.
        """
        from huggingface_hub import constants

        snapshot = self._snapshot
        names = [path.relative_to(snapshot.root).as_posix() for path in paths]
        total = sum(file.size for path in paths if (file := remote.find(path)) is not None)
        cache = Path(constants.HF_HUB_CACHE)
        free = _free(cache)
        what = f"{counted(len(names), 'file')} of weights, {size(total)}"
        if total > free:
            raise StorageError(
                f"{snapshot.id}: {what}, do not fit into the Hub's cache, {cache}, where {size(free)} are free. Free "
                "some, set HF_HOME to a folder on another disk, or merge with --stream (in Python stream=True), which "
                "stores no inputs"
            )
        tell(f"{snapshot.id}: downloading {what}, to {cache} ({size(free)} free)")
        with remote.progress() as shown:
            self._download(names, _AT_ONCE, lambda done: shown(min(done, total), total))
        for path in paths:
            if not is_file(path):
                raise StorageError(f"{snapshot.id}: {path.name} was downloaded, but is not at {path}")

    def _download(self, names: Sequence[str], at_once: int, report: Callable[[int], None]) -> None:
        """Download in threads that stop soon after an interrupt: what is complete stays in the cache."""
        waiting, lock, counter = list(reversed(names)), threading.Lock(), _Counter()
        errors: list[tuple[str, BaseException]] = []

        def work() -> None:
            while not counter.stopped:
                with lock:
                    name = waiting.pop() if waiting and not errors else None
                if name is None:
                    return
                try:
                    _download_one(self._snapshot, name, counter)
                except _Stop:
                    return
                except BaseException as error:
                    errors.append((name, error))
                    return

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, len(names)))]
        with _no_bars():
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive():
                        thread.join(_TICK_S)
                        report(counter.done)
            finally:
                counter.stopped = True
        if errors:
            raise self._failed(*errors[0])

    def _failed(self, name: str, error: BaseException) -> Exception:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            return StorageError(f"{error.filename}: {error.strerror}")
        return StorageError(
            f"{self._snapshot.id}: {name} cannot be downloaded ({first_line(error)}). Run the same command again: it "
            "goes on with what is there"
        )


class _Counter:
    """Bytes that were downloaded, and whether to stop."""

    def __init__(self) -> None:
        self.done, self.stopped = 0, False

    def add(self, nbytes: int) -> None:
        if self.stopped:
            raise _Stop
        self.done += nbytes  # of several threads: progress may be a little behind


def _download_one(snapshot: Snapshot, name: str, counter: _Counter) -> None:
    import inspect

    from huggingface_hub import constants, hf_hub_download

    options: dict[str, Any] = {"revision": snapshot.commit, "endpoint": constants.ENDPOINT}
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:  # huggingface_hub 1.2 and newer
        options["tqdm_class"] = _counting(counter)
    hf_hub_download(snapshot.id, name, **options)


def _counting(counter: _Counter) -> type:
    """A progress bar for huggingface_hub, which shows nothing and counts."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    class Counting(tqdm):
        def __init__(self, *args: Any, **settings: Any):
            counter.add(settings.get("initial") or 0)
            super().__init__(*args, **{**settings, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            counter.add(int(n or 0))

    return Counting


@contextmanager
def _no_bars() -> Iterator[None]:
    """Context manager: huggingface_hub shows no progress bars of its own."""
    from huggingface_hub import utils

    before = utils.are_progress_bars_disabled()  # type: ignore[attr-defined]
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if not before:
            utils.enable_progress_bars()  # type: ignore[attr-defined]


def _free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    import shutil  # takes milliseconds: not on the path of models that are here

    while not exists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise CheckpointError(f"the Hub's cache cannot be used: {error.strerror}", file=str(folder)) from None


def first_line(error: BaseException) -> str:
    """What an error says, without the names of Python classes in front."""
    lines = re.sub(r"(Got: )?(\w+(Error|Exception): )*", "", str(error).strip(), count=1).splitlines()
    return lines[0][:200] if lines else "no details"
