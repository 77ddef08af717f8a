"""A server of HTTP on this machine for the files of a folder: ranges, listings, and faults that a test asks for."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class FileServer:
    """What the server does.

    url      of the folder
    listing  folders have a page with links
    ranges   requests for ranges are answered with these
    login    `Authorization` that is asked for; empty: none
    fail     called with path and range, (first, last) or None; returns None, a status to answer with, or how many bytes
             to send before the connection ends
    asked    (path with parameters, range) of every request
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = ""
        self.listing = self.ranges = True
        self.login = ""
        self.fail: Any = lambda path, span: None
        self.asked: list[tuple[str, tuple[int, int] | None]] = []


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Context manager: the address of a server on this machine, which answers until the end."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """Context manager: a server that answers until the end."""
    files = FileServer(folder)
    with serving(type("Handler", (_Handler,), {"files": files})) as files.url:
        yield files


class _Handler(BaseHTTPRequestHandler):
    files: FileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None: ...

    def do_GET(self) -> None:
        files = self.files
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        span = (int(match[1]), int(match[2])) if match else None
        files.asked.append((self.path, span))
        name = unquote(urlsplit(self.path).path)
        path = files.folder / name.lstrip("/")
        if files.login and self.headers.get("Authorization") != files.login:
            return self._send(401, b"who are you?")
        fault = files.fail(name, span)
        if fault is not None and fault >= 400 and fault < 600:
            return self._send(fault, b"")
        if path.is_dir():
            if not files.listing:
                return self._send(403, b"")
            names = [p.name + ("/" if p.is_dir() else "") for p in sorted(path.iterdir())]
            page = "".join(f'<a href="{n}">{n}</a>' for n in ["../", "?C=N", *names])
            return self._send(200, page.encode(), {"Content-Type": "text/html"})
        if not path.is_file():
            return self._send(404, b"")
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()[:8]}"'}
        if span is None or not files.ranges:
            return self._send(200, data, headers, fault)
        first, last = span[0], min(span[1], len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers, fault)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        try:
            self.wfile.write(data[:cut])
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        if cut is not None:
            self.close_connection = True
