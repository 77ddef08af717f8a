"""A stand-in for the Hugging Face Hub: a server of HTTP on this machine, with the models that a test puts there.

It answers what huggingface_hub and fastinterp ask for: files and sizes of a model at a revision, files whole and by
ranges (weights behind a redirect, as there), tokens, new models, and uploads in the ways of Git LFS. Every request is
noted. Faults can be asked for: answers of 503, connections that end early, files that change.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.support.file_server import serving

HEAVY = (".safetensors", ".bin", ".gguf", ".pt")  # are behind a redirect
TOKEN = "hf_test"


class Request(NamedTuple):
    """What was asked for: method, path, bytes of the range or None, bytes of the body that was sent."""

    method: str
    path: str
    range: tuple[int, int] | None
    sent: int


@dataclass
class Repo:
    """A model: files at each revision, `main` among them. folder: has the files of all revisions, as they are now."""

    files: dict[str, bytes]
    private: bool = False
    revisions: dict[str, dict[str, bytes]] = field(default_factory=dict)
    folder: Path | None = None

    def at(self, revision: str) -> dict[str, bytes] | None:
        if self.folder is not None:
            return _files(self.folder)
        if revision in ("main", commit_of(self.files)):
            return self.files
        for name, files in self.revisions.items():
            if revision in (name, commit_of(files)):
                return files
        return None


def commit_of(files: Mapping[str, bytes]) -> str:
    """The hash of a commit with these files."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + hashlib.sha1(files[name]).digest())
    return digest.hexdigest()


class HubServer:
    """The models, and what was asked for.

    url      of the server: HF_ENDPOINT
    repos    by id
    asked    every request
    fail     called with method, path and range of each request for a file's bytes; returns None, a status to answer
             with, or how many bytes to send before the connection ends
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[Request] = []
        self.fail: Any = lambda method, path, span: None
        self.slow = 0.0  # seconds before each MiB
        self.lock = threading.Lock()
        self.url = ""
        self.objects: dict[str, bytes] = {}  # of Git LFS

    def add(self, repo: str, folder: Path, **revisions: Path) -> str:
        """Put a model there: the files of a folder. Returns the hash of its commit."""
        self.repos[repo] = Repo(_files(folder), revisions={name: _files(path) for name, path in revisions.items()})
        return commit_of(self.repos[repo].files)

    def mirror(self, repo: str, folder: Path) -> None:
        """Put a model there: the files that a folder has whenever it is asked for them."""
        self.repos[repo] = Repo({}, folder=folder)

    def fetched(self, repo: str) -> list[str]:
        """The files of a model of which bytes were asked for, by name."""
        paths = [r.path.removeprefix(f"/{repo}/resolve/") for r in self.asked if r.path.startswith(f"/{repo}/resolve/")]
        return sorted({path.partition("/")[2] for path in paths})

    def data(self, suffix: str = HEAVY[0]) -> int:
        """Bytes that were sent of files whose names end so."""
        return sum(r.sent for r in self.asked if r.path.endswith(suffix))

    def lookups(self, repo: str) -> int:
        """How often it was asked for a model's files."""
        return sum(r.path.startswith(f"/api/models/{repo}") for r in self.asked)


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """Context manager: a server that answers until the end."""
    hub = HubServer()
    with serving(type("Handler", (_Handler,), {"hub": hub})) as hub.url:
        yield hub


def environment(server: HubServer, home: Path) -> dict[str, str]:
    """The variables of this process for one that has the stand-in for the Hub, and a cache of its own in `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept, "HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


@contextmanager
def in_this_process(hub: HubServer, cache: Path) -> Iterator[None]:
    """Context manager: huggingface_hub takes the stand-in for the Hub, and a folder for its cache."""
    from huggingface_hub import constants

    changed = {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        for name, value in changed.items():
            patch.setattr(constants, name, value)
        yield


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        try:
            if path.startswith("/raw/"):
                self._send_file(*_split(path.removeprefix("/raw/")), direct=True)
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+|[^/]+)(?:/revision/(.+))?", path):
                self._model(match[1], match[2] or "main", parse_qs(urlsplit(self.path).query))
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                self._send_file(match[1], match[2], match[3])
            else:
                self._write(path, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _note(self, span: tuple[int, int] | None = None, sent: int = 0) -> None:
        with self.hub.lock:
            self.hub.asked.append(Request(self.command, unquote(urlsplit(self.path).path), span, sent))

    def _json(self, value: Any, status: int = 200, **headers: str) -> None:
        content = json.dumps(value).encode()
        self._note(sent=len(content))
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _missing(self, code: str, status: int = 404) -> None:
        self._json({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def _allowed(self, repo: Repo) -> bool:
        return not repo.private or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _model(self, name: str, revision: str, query: Mapping[str, Any]) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or not self._allowed(repo):
            return self._missing("RepoNotFound", 401)
        files = repo.at(revision)
        if files is None:
            return self._missing("RevisionNotFound")
        siblings = [
            {"rfilename": n, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()} for n, data in files.items()
        ]
        return self._json({"id": name, "modelId": name, "sha": commit_of(files), "private": repo.private,
                           "siblings": siblings, "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def _send_file(self, name: str, revision: str, file: str, direct: bool = False) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or not (direct or self._allowed(repo)):
            return self._missing("RepoNotFound", 401)
        files = repo.at(revision)
        if files is None:
            return self._missing("RevisionNotFound")
        if file not in files:
            return self._missing("EntryNotFound")
        data, commit = files[file], commit_of(files)
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if not direct and file.endswith(HEAVY):
            self._note()
            self.send_response(302)
            self.send_header("Location", f"{self.hub.url}/raw/{name}@{commit}/{file}")
            self.send_header("X-Repo-Commit", commit)
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-Etag", etag)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        assert not direct or "Authorization" not in self.headers or self.headers["Host"] in self.hub.url
        span = _span(self.headers.get("Range"), len(data))
        return self._send_bytes(data, span, {"ETag": etag, "X-Repo-Commit": commit})

    def _send_bytes(self, data: bytes, span: tuple[int, int] | None, headers: Mapping[str, str]) -> None:
        first, last = span or (0, len(data) - 1)
        fault = self.hub.fail(self.command, unquote(urlsplit(self.path).path), span)
        if fault is not None and fault >= 400:
            return self._missing("Fault", fault)
        self.send_response(206 if span else 200)
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if self.command == "HEAD":
            return self._note(span)
        if fault is not None:
            last = min(last, first + fault - 1)
            self.close_connection = True
        self._note(span, last + 1 - first)
        for at in range(first, last + 1, 1 << 20):
            if self.hub.slow:
                time.sleep(self.hub.slow)
            self.wfile.write(data[at : min(at + (1 << 20), last + 1)])
        return None

    def _write(self, path: str, body: bytes) -> None:
        """Requests that change something."""
        hub = self.hub
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/lfs/"):
            return self._json({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": "org", "orgs": [], "auth": {"accessToken": {"role": "write"}}})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            return self._json(
                [
                    {"type": "file", "path": n, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for n, data in hub.repos[match[1]].files.items()
                ]
            )
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'org'}/{asked['name']}"
            if name in hub.repos:
                return self._json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            hub.repos[name] = Repo({}, private=bool(asked.get("private") or asked.get("visibility") == "private"))
            return self._json({"url": f"{hub.url}/{name}", "name": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(HEAVY) else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]  # fmt: skip
            return self._json({"files": modes})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            actions = [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}}
                for o in wanted
            ]
            return self._json({"transfer": "basic", "objects": actions})
        if path.startswith("/lfs/"):
            fault = hub.fail(self.command, path, None)
            if fault is not None:
                return self._json({"error": "fault"}, fault)
            hub.objects[path.removeprefix("/lfs/")] = body
            return self._json({})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._commit(match[1], body)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        return self._json({"error": f"no such address: {path}"}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        files = dict(self.hub.repos[name].files)
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        self.hub.repos[name].files = files
        url = f"{self.hub.url}/{name}/commit/{commit_of(files)}"
        return self._json({"commitUrl": url, "commitOid": commit_of(files), "success": True})


def _split(path: str) -> tuple[str, str, str]:
    match = re.fullmatch(r"([^/]+/[^/@]+)@([0-9a-f]+)/(.+)", path)
    assert match is not None, path
    return match[1], match[2], match[3]


def _span(text: str | None, size: int) -> tuple[int, int] | None:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", text or "")
    return None if match is None else (int(match[1]), min(int(match[2] or size - 1), size - 1))
