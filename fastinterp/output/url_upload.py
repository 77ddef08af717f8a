"""Uploads an output to an address, `s3://bucket/merged`, when it is complete in a temporary folder here.

The index and the configuration go last, by which readers begin. Nothing that is there is replaced without `force`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fastinterp.checkpoint import hub
from fastinterp.checkpoint.names import listing, names_file, names_weights, shell_word
from fastinterp.checkpoint.sidecar_files import CONFIG
from fastinterp.checkpoint.url_model import HERE
from fastinterp.errors import CheckpointError, FastinterpError, OutputError, StorageError, UsageError
from fastinterp.messages import counted, size, tell
from fastinterp.presence import is_folder, walk
from fastinterp.urls import full, scheme_of

if TYPE_CHECKING:
    from fastinterp.output.hub_upload import Upload

_AT_ONCE = 4  # files that are uploaded at the same time
# Stores of objects: a file appears when it is complete. In others it is uploaded under another name, and renamed.
_OBJECTS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory")
_LAST = (CONFIG, "model_index.json", "modules.json", "adapter_config.json")


def files_of(local: Path) -> list[Path]:
    """The files of an output here, which may be one itself. Raises: OSError."""
    if not is_folder(local):
        return [local]
    return sorted(Path(folder, name) for folder, _, names in walk(local) for name in names)


class Destination:
    """An output at an address.

    force  replace a model, or a file, that is there: its weights and its index are removed before the upload

    Raises: UsageError, if nothing can be written there; OutputError, if something is there, or the store refuses;
    CheckpointError, if a package is missing.
    """

    def __init__(self, url: str, force: bool = False):
        self.url, self._force = url.rstrip("/"), force
        scheme = scheme_of(url)
        if scheme in ("http", "https"):
            raise UsageError(
                f"{url}: nothing can be written to addresses of HTTP. Give a folder, or an s3:// address, say"
            )
        if not url.partition("://")[2].partition("?")[0].strip("/"):
            raise UsageError(f"{url} names no output: expected {scheme}://BUCKET/PATH")
        if (why := hub.this_run().wished) and scheme not in HERE:
            later = f"fastinterp upload FOLDER {shell_word(url)}"
            if scheme == "hf":
                later = f"hf upload {shell_word(url.partition('://')[2])} FOLDER . --private"
            raise UsageError(f"{url}: nothing is uploaded: {why}. Name a folder, and upload it later: `{later}`")
        self._home = ""
        self._file = names_file(self.url)
        last = self.url.partition("?")[0].rpartition("/")[2]
        self._last = last if last.strip(".") else "merged"
        self._hub, self._has_no_folders = scheme == "hf", scheme in _OBJECTS
        if not self._hub:
            from fastinterp.checkpoint.url_store import file_system, place_of

            self._fs, path = file_system(self.url, full(self.url))
            self._path = path.rstrip("/")
            hub.this_run().outputs[self.url] = place_of(self._fs, path)
            self._refuse_existing()
            self._refuse_unwritable()

    @property
    def local(self) -> str:
        """The folder or file here that is uploaded."""
        return os.path.join(self._home, self._last)

    def _asked(self, ask: Callable[[], Any], doing: str = "") -> Any:
        from fastinterp.checkpoint.url_store import asked

        try:
            return asked(ask, self.url, doing)
        except (CheckpointError, StorageError) as error:
            raise OutputError(str(error)) from None

    def _there(self) -> list[str]:
        """The names of the files there, in the folder itself; of an output that is one file, that."""
        self._fs.invalidate_cache()

        def ask() -> list[str]:
            try:
                found = self._fs.ls(self._path, detail=True)
            except (FileNotFoundError, NotADirectoryError) as error:
                if "bucket does not exist" in str(error):
                    raise
                return []
            names = [str(i["name"]).rstrip("/").rpartition("/")[2] for i in found if i.get("type") != "directory"]
            return [name for name in names if name and not name.startswith(".")]

        return cast("list[str]", self._asked(ask))

    def _refuse_existing(self) -> None:
        there = self._there()
        if there and not self._force:
            what = "the file is there already" if self._file else f"the folder is there already, with {listing(there)}"
            raise OutputError(
                f"{self.url}: {what}. Add --force (in Python force=True) to replace it, or give another name"
            )

    def _refuse_unwritable(self) -> None:
        """See that something can be written there before the merge, which may take long."""
        trial = f"{self._path}.uploading" if self._file else f"{self._path}/.uploading"

        def ask() -> None:
            if not self._file and not self._has_no_folders:
                self._fs.makedirs(self._path, exist_ok=True)
            self._fs.pipe_file(trial, b"-")
            self._fs.rm_file(trial)

        self._asked(ask, "nothing can be written there: ")

    @contextmanager
    def written(self) -> Iterator[str]:
        """Context manager: what is written to the path that it gives is uploaded at the end, and removed here.

        Raises: OutputError, if the upload fails: the output stays here, and the message says how to repeat it.
        """
        self._home, complete = tempfile.mkdtemp(prefix="fastinterp-upload-"), False
        upload: Upload | None = None
        try:
            upload = self._of_hub() if self._hub else None
            yield self.local
            complete = True
            if upload is None:
                self.upload(Path(self.local))
            else:
                upload.run()
            complete = False
        except BaseException as error:
            again = f"`{self.command}`" if upload is None else upload.command
            kept = f"the output is complete in {self.local}. To upload it: {again}"
            error.outcome = kept if complete else "nothing was uploaded"  # type: ignore[attr-defined]
            if isinstance(error, OutputError) and self._home in str(error) and not complete:
                place = "The output is written there before it is uploaded: TMPDIR=FOLDER names another place"
                raise OutputError(f"{error}. {place}") from None
            if isinstance(error, FastinterpError) and complete and self.local not in str(error):
                error.args = (f"{error}. T{kept[1:]}",)
            raise
        finally:
            if not complete:
                shutil.rmtree(self._home, ignore_errors=True)

    def _of_hub(self) -> Upload:
        from fastinterp.output.hub_upload import Upload

        return Upload(self.url.partition("://")[2], self.local, force=self._force)

    @property
    def command(self) -> str:
        """The command that uploads what is complete here, over what is there already of it."""
        return f"fastinterp upload {shell_word(self.local)} {shell_word(self.url)} --force"

    def upload(self, local: Path) -> int:
        """Upload a folder or a file. Returns the bytes. Raises: OutputError."""
        every = files_of(local)
        names = {path: path.relative_to(local).as_posix() if path != local else "" for path in every}
        total = sum(path.stat().st_size for path in every)
        tell(f"{self.url}: uploading {counted(len(every), 'file')}, {size(total)}")
        if self._force and is_folder(local):
            self._remove_older({name.partition("/")[0] if "/" in name else "" for name in names.values()})
        last = [path for path in every if path.name in _LAST or path.name.endswith(".index.json")]
        heavy = [path for path in every if path not in last and names_weights(path.name)]
        others = [path for path in every if path not in last and path not in heavy]
        for some in (heavy, others, last):
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                for _ in pool.map(lambda path: self._put(path, names[path]), some):
                    pass
        return total

    def _remove_older(self, folders: set[str]) -> None:
        """Remove index, configuration and weights there, in this order, so that no mixture of two models is read."""
        for folder in folders:
            path = f"{self._path}/{folder}".rstrip("/")

            def ask(path: str = path) -> None:
                self._fs.invalidate_cache()
                try:
                    names = [str(i["name"]) for i in self._fs.ls(path, detail=True) if i.get("type") != "directory"]
                except (FileNotFoundError, NotADirectoryError):
                    return
                first = [n for n in names if n.endswith((".index.json", *_LAST))]
                for name in (*first, *(n for n in names if names_weights(n) and n not in first)):
                    self._fs.rm_file(name)

            self._asked(ask, "the older model cannot be removed: ")

    def _put(self, path: Path, name: str) -> None:
        to = f"{self._path}/{name}" if name else self._path
        folder, _, base = to.rpartition("/")
        at = to if self._has_no_folders else f"{folder}/.{base}.uploading"

        def ask() -> None:
            if not self._has_no_folders:  # where they are part of names, this could make a bucket
                self._fs.makedirs(folder, exist_ok=True)
            self._fs.put_file(str(path), at)
            if at != to:
                if self._is_there(to):
                    self._fs.rm_file(to)
                self._fs.mv(at, to)
            self._fs.invalidate_cache()
            there = self._fs.info(to).get("size")
            if there is not None and there != path.stat().st_size:
                raise OSError(f"{there} of {path.stat().st_size} bytes arrived")

        if not self._force and self._asked(lambda: self._is_there(to)):
            raise OutputError(
                f"{self.url}: {name or base} is there already. Add --force (in Python force=True) to "
                "replace it, or give another name"
            )
        self._asked(ask, f"uploading {path.name} failed: ")

    def _is_there(self, path: str) -> bool:
        """Whether the store has something there. Raises: what it raises, if it does not say."""
        try:
            self._fs.info(path)
        except FileNotFoundError:
            return False
        return True

    def named(self, result: Any) -> Any:
        """What a function returned about the output here, with its address."""
        if isinstance(result, list):
            return [self.named(one) for one in result]
        if not is_dataclass(result) or isinstance(result, type):
            return result
        changes: dict[str, Any] = {}
        if isinstance(output := getattr(result, "output", None), str):
            changes["output"] = self._shown(output)
        if (report := getattr(result, "report", None)) is not None:
            changes["report"] = self.named(report)
        if isinstance(getattr(result, "path", None), Path):
            changes["path"] = None  # it is no path of this machine
        return replace(result, **changes)

    def _shown(self, output: str) -> str:
        start = self.local.rpartition("/")[0]
        base = self.url.rpartition("/")[0]
        return self.url if output == self.local else output.replace(f"{start}/", f"{base}/", 1)
