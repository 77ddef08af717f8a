"""Files at an address of a protocol that fsspec knows: `s3://bucket/model`, `gs://`. For HTTP see http_folder.py."""

from __future__ import annotations

import posixpath
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.remote import RemoteFile
from fastinterp.checkpoint.retries import tell_retry
from fastinterp.errors import CheckpointError, FastinterpError, StorageError
from fastinterp.messages import closest
from fastinterp.urls import full, scheme_of

T = TypeVar("T")

_TRIES = 5  # in a row that bring nothing
_LONGEST_WAIT_S = 10.0
# The package that has a protocol, where that is none of fsspec's.
_PACKAGES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs",
    "adl": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko", "ssh": "paramiko", "smb": "smbprotocol",
    "hdfs": "pyarrow", "arrow_hdfs": "pyarrow", "webhdfs": "requests", "github": "requests", "oci": "ocifs",
    "oss": "ossfs", "webdav": "webdav4", "box": "boxfs", "dropbox": "dropboxdrivefs requests", "git": "pygit2",
    "http": "fsspec[http]", "https": "fsspec[http]",
}  # fmt: skip
# What an answer about a file says of its version, the surest first.
_VERSIONS = (
    "ETag", "etag", "generation", "version_id", "md5Hash", "md5", "blob_id", "sha", "content_md5", "LastModified",
    "last_modified", "modificationTime", "mtime", "modified", "updated", "created",
)  # fmt: skip
_WHERE = ("host", "account_name", "endpoint_url", "org", "repo")  # options that say which of several stores it is
_LOGIN = {
    "s3": "Log in with `aws configure`; of a bucket that is public, set FSSPEC_S3='{\"anon\": true}'",
    "gs": "Log in with `gcloud auth application-default login`; of a public one, set FSSPEC_GS='{\"token\": \"anon\"}'",
    "hf": "Log in with `hf auth login`",
}  # fmt: skip
_LOGIN |= {"s3a": _LOGIN["s3"], "gcs": _LOGIN["gs"]}


@dataclass(frozen=True)
class There:
    """What is known of a file elsewhere, or of a folder.

    size     bytes; None: not known
    version  what tells it from what it becomes, as the store says it: `ETag 1f3a`; empty, if it says nothing
    """

    size: int | None
    version: str
    folder: bool = False


class Store(Protocol):
    """The files below one address. Names are relative to it, with `/`; empty: itself."""

    url: str

    def look(self) -> There | None:
        """What is at the address; None: that does not show without listing it."""
        ...

    def listed(self, folder: str) -> Mapping[str, There]:
        """Name -> what is in a folder. Raises: CheckpointError, if there is none; StorageError."""
        ...

    def read(self, name: str) -> bytes:
        """The content of a small file. Raises: CheckpointError, StorageError."""
        ...

    def file(self, name: str, there: There) -> RemoteFile:
        """A file that is read by ranges. Raises: CheckpointError, StorageError."""
        ...


def file_system(url: str, given: str) -> tuple[Any, str]:
    """The file system of fsspec for an address, and the path in it. given: the address with login and parameters

    Raises: CheckpointError, if fsspec or the package of the protocol is missing, or it knows no such protocol.
    """
    scheme = scheme_of(url)
    try:
        import fsspec
    except ImportError:
        raise CheckpointError("this needs fsspec. Install it: `pip install fsspec`", file=url) from None
    try:
        fs, path = fsspec.core.url_to_fs(given)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        if package is None:
            raise CheckpointError(f"fsspec cannot read {scheme}://: {_said(error, url)}", file=url) from None
        raise CheckpointError(f"this needs {package}. Install it: `pip install {package}`", file=url) from None
    except ValueError as error:
        if "rotocol not known" not in str(error):
            raise CheckpointError(f"fsspec cannot read this address: {_said(error, url)}", file=url) from None
        close = closest(scheme, (*_PACKAGES, *fsspec.available_protocols()))
        hint = f" Did you mean `{close}://`?" if close else ""
        raise CheckpointError(f"fsspec knows no protocol {quote(scheme)}.{hint}", file=url) from None
    except FastinterpError:
        raise
    except Exception as error:
        raise StorageError(f"{url}: fsspec cannot open this address: {_said(error, url)}") from None
    return fs, path


def place_of(fs: Any, path: str) -> tuple[str, ...]:
    """A path of a file system in parts. Equal ones lead to the same file, however the address is spelled:
    `s3a://bucket//m/./a` as `s3://bucket/m/a`. The first part says which file system it is.
    """
    while (inner := getattr(fs, "fs", None)) is not None and hasattr(inner, "storage_options"):  # a cache of that
        fs = inner
    options = getattr(fs, "storage_options", {})
    kind = [type(fs).__qualname__, *(str(options.get(key, "")).lower() for key in _WHERE)]
    return (" ".join(kind).strip(), *posixpath.normpath(f"/{path}").strip("/").split("/"))


class FsspecStore:
    """The files below an address, through fsspec; Store describes the methods.

    given  the address with login and parameters
    Raises: what file_system does.
    """

    def __init__(self, url: str, given: str):
        self.url = url
        self.fs, self._path = file_system(url, given)
        self._path = self._path.rstrip("/")

    def path(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    def shown(self, name: str) -> str:
        """The address of a file in it."""
        base, question, query = self.url.partition("?")
        return f"{base.rstrip('/')}/{name}{question}{query}" if name else self.url

    def look(self) -> There | None:
        self.fs.invalidate_cache()
        return _there(asked(lambda: self.fs.info(self.path("")), self.url))

    def listed(self, folder: str) -> dict[str, There]:
        shown, path = self.shown(folder), self.path(folder)
        self.fs.invalidate_cache()
        found = {}
        for info in asked(lambda: self.fs.ls(path, detail=True), shown):
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if str(info["name"]).strip("/") != path.strip("/") and name:
                found[name] = _there(info)
        return found

    def read(self, name: str) -> bytes:
        content: bytes = asked(lambda: self.fs.cat_file(self.path(name)), self.shown(name))
        return content

    def file(self, name: str, there: There) -> FsspecFile:
        if there.size is None:
            there = _there(asked(lambda: self.fs.info(self.path(name)), self.shown(name)))
        if there.size is None:
            raise StorageError(
                f"{self.shown(name)}: the store does not say how large it is. Download it, and name that"
            )
        return FsspecFile(self.fs, self.path(name), self.shown(name), there.size, there.version)


class FsspecFile:
    """A file that fsspec reads by ranges; from several threads at once.

    name, size, version  as RemoteFile has them
    """

    def __init__(self, fs: Any, path: str, name: str, size: int, version: str):
        self._fs, self._path, self.name, self.size, self.version = fs, path, name, size, version

    def read_into(self, view: memoryview, offset: int) -> None:
        end = offset + len(view)

        def read() -> None:
            data = self._fs.cat_file(self._path, start=offset, end=end)
            if len(data) < len(view):
                if self.changed():
                    raise changed(self.name)
                raise OSError(f"{len(data)} of {len(view)} bytes came")
            if len(data) > len(view):
                raise StorageError(f"{self.name}: the store does not send parts of files. Download it, and name that")
            view[:] = data

        asked(read, self.name, f"reading {len(view)} bytes at {offset} failed: ")

    def changed(self) -> bool:
        """Whether the store says that it is another file by now. Raises: CheckpointError, StorageError."""

        def info() -> There:
            self._fs.invalidate_cache()
            return _there(self._fs.info(self._path))

        now = asked(info, self.name)
        return now.size != self.size or (now.version.partition(" ")[0] == self.version.partition(" ")[0]
                                         and now.version != self.version)  # fmt: skip


def changed(name: str) -> CheckpointError:
    """The error about a file that is another one than before."""
    return CheckpointError(
        "it changed while it was being read. Run the same command again, once nothing is writing to it", file=name
    )


def asked(ask: Callable[[], T], shown: str, doing: str = "") -> T:
    """What a store answers, asked again after errors that may pass.

    shown  the address, for messages
    Raises: CheckpointError, if there is no such thing; StorageError, if it may not be read, or after five errors.
    """
    for tries in range(1, _TRIES + 1):
        try:
            return ask()
        except FastinterpError:
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "bucket" if "bucket does not exist" in str(error) else "file or folder"
            raise CheckpointError(f"there is no such {what}", file=shown) from None
        except Exception as error:  # every store has errors of its own
            if (refused := _refused(error, shown)) is not None:
                raise refused from None
            last = _said(error, shown)
        if tries < _TRIES:
            tell_retry(shown, shown, f"{doing}{last}", _TRIES - tries)
            time.sleep(min(_LONGEST_WAIT_S, 0.1 * 2**tries))
    raise StorageError(f"{shown}: {doing}{last}, {_TRIES} times in a row. Try again later")


def _refused(error: Exception, shown: str) -> FastinterpError | None:
    """The error about an answer that another try does not mend; None, if it may."""
    name, text = type(error).__name__, str(error)
    login = f". {_LOGIN[scheme_of(shown)]}" if scheme_of(shown) in _LOGIN else ""
    if isinstance(error, PermissionError) or "Forbidden" in text or "AccessDenied" in text:
        return StorageError(f"{shown}: access is refused{login}")
    if "Credential" in name or "Credential" in text or "Unauthorized" in text or "Anonymous" in text:
        return StorageError(f"{shown}: it needs a login{login}")
    if isinstance(error, (IsADirectoryError, NotImplementedError, ValueError, TypeError)):
        return StorageError(f"{shown}: fsspec cannot read it: {_said(error, shown)}")
    return None


def _said(error: BaseException, shown: str) -> str:
    """What an error says, in one line, without what must not be shown of an address."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    given = full(shown)
    text = text.replace(given, shown)
    return re.sub(r"//[^/@\s]*:[^/@\s]*@", "//", re.sub(r"\?[\w.~%-]+=\S+", "", text))


def _there(info: Mapping[str, Any]) -> There:
    """What fsspec says of a file."""
    folder = info.get("type") == "directory"
    size = info.get("size")
    version = next((f"{key} {_plain(info[key])}" for key in _VERSIONS if info.get(key)), "")
    return There(size if isinstance(size, int) and not folder else None, "" if folder else version, folder)


def _plain(value: Any) -> str:
    """As text: times, which listings have as numbers and answers about one file as objects, as seconds."""
    if hasattr(value, "timestamp"):
        value = value.timestamp()
    return f"{value:.6f}" if isinstance(value, float) else str(value).strip('"')
