"""A file behind an address of HTTP, read by ranges: connections that are kept, redirects, retries, noticed changes."""

from __future__ import annotations

import atexit
import http.client
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import quote, urljoin, urlsplit

from fastinterp._version import __version__
from fastinterp.checkpoint.http_body import received
from fastinterp.checkpoint.retries import tell_retry
from fastinterp.errors import CheckpointError, StorageError

T = TypeVar("T")

_TIMEOUT_S = 30.0  # without any byte
_TRIES = 5  # in a row that bring nothing
_LONGEST_WAIT_S = 20.0
_REDIRECTS = 10
_KEPT = 4  # connections of a thread
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_MOVED = (301, 302, 303, 307, 308)
_ABSENT = (401, 403, 404, 410)
_KEPT_CHARACTERS = "/%:?&=#@!$'()*+,;[]~"  # of addresses; others, as in `modèle 1`, are sent in percents
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class _Again(Exception):
    """What another try may mend."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class NotThere(StorageError):
    """The server has no such file, or refuses it."""


class HttpFile:
    """A file behind an address, read by ranges; from several threads at once, each with a connection of its own.

    name     for messages
    size     in bytes; None: the first answer says it
    headers  of every request to the host of `url`; of no other, to which it may redirect
    pinned   the address stands for the same bytes for ever: servers may name their version as they please

    What its answers say of size and version (ETag, else Last-Modified) must stay the same.
    """

    def __init__(
        self,
        url: str,
        name: str,
        size: int | None = None,
        headers: Callable[[], Mapping[str, str]] = dict,
        pinned: bool = False,
    ):
        self._url, self.name, self._headers, self._pinned = url, name, headers, pinned
        self._location = url  # where it was found to be
        self._version: str | None = None
        self._threads = threading.local()
        self.size = size if size is not None else self._ask_size()

    @property
    def version(self) -> str:
        """What the server calls the version of the file; empty, if its address has that already, or it says nothing."""
        return "" if self._pinned else self._version or ""

    def changed(self) -> bool:
        """Never: every answer is compared with the first."""
        return False

    @classmethod
    def whole(
        cls, url: str, name: str, headers: Mapping[str, str], most: int, wanted: str = ""
    ) -> tuple[str, bytes] | None:  # fmt: skip
        """The address, behind all redirects, and the content of a small file; None, if there is none, or the server
        refuses it.

        most    bytes, more is an error
        wanted  its type, as `text/html`; None comes back of any other
        Raises: StorageError.
        """
        file = cls(url, name, 0, lambda: headers)

        def ask() -> tuple[str, bytes] | None:
            answer = file._request("GET", {})
            if answer.status in _ABSENT or (answer.status == 200 and not _type_of(answer).startswith(wanted)):
                _connections.close()
                return None
            if answer.status != 200:
                raise file._refused(answer)
            content = answer.read(most + 1)
            if len(content) > most:
                _connections.close()
                raise StorageError(f"{name}: more than {most} bytes, which is no small file")
            length = answer.getheader("Content-Length") or ""
            if length.isdecimal() and len(content) != int(length):
                raise _Again("the connection was closed early")
            return file._location, content

        return file._tried(ask)

    def _tried(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, asked again after errors that may pass. Raises: StorageError."""
        for tries in range(1, _TRIES + 1):
            try:
                return ask()
            except (OSError, http.client.HTTPException, _Again) as error:
                _connections.close()
                message = str(error) if isinstance(error, _Again) else describe(error)
                wait = error.wait if isinstance(error, _Again) else None
                if tries < _TRIES:
                    tell_retry(self.name, self._url, message, _TRIES - tries)
                    time.sleep(min(_LONGEST_WAIT_S, wait if wait is not None else 0.2 * 2**tries))
        raise StorageError(f"{self.name}: it cannot be reached: {message}, {_TRIES} times in a row. Try again later")

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with the bytes from `offset` on.

        Raises: StorageError, if several tries bring nothing; CheckpointError, if the file changed meanwhile.
        """
        done, tries = 0, 0
        while done < len(view):
            before = done
            try:
                done = self._read_some(view, offset, done)
            except _Again as error:
                _connections.close()
                done = max(before, getattr(self._threads, "done", before))
                tries = 0 if done > before else tries + 1
                if tries >= _TRIES:
                    raise StorageError(f"{self.name}: {error}, {_TRIES} times in a row. Try again later") from None
                tell_retry(self.name, self._url, str(error), _TRIES - tries)
                time.sleep(min(_LONGEST_WAIT_S, error.wait if error.wait is not None else 0.2 * 2**tries))

    def _read_some(self, view: memoryview, offset: int, done: int) -> int:
        """Go on reading; returns how much of `view` is filled. Notes it for the case that it raises _Again."""
        self._threads.done = done
        first, last = offset + done, offset + len(view) - 1
        try:
            answer = self._request("GET", {"Range": f"bytes={first}-{last}"})
            self._check(answer, first, last)
            start = done
            for got in received(answer, _connections.socket_of(self._location), view[start:]):
                self._threads.done = done = start + got
            if done < len(view):
                raise _Again(f"the connection was closed {len(view) - done} bytes early")
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"reading {last - first + 1} bytes at {first} failed ({describe(error)})") from None
        return done

    def _ask_size(self) -> int:
        """The size, from an answer about the first byte."""

        def ask() -> int:
            answer = self._request("GET", {"Range": "bytes=0-0"})
            match = _RANGE.fullmatch(answer.getheader("Content-Range", "") or "")
            if answer.status == 416:
                raise CheckpointError("the file is empty. Download or copy it again", file=self.name)
            if answer.status in (200, 206) and _type_of(answer).startswith("text/html"):
                _connections.close()
                raise NotThere(f"{self.name}: the server sends a web page in place of a file")
            if answer.status != 206 or match is None or match[3] == "*":
                raise self._refused(answer)
            self._version = _version_of(answer)
            answer.read()
            return int(match[3])

        return self._tried(ask)

    def _check(self, answer: http.client.HTTPResponse, first: int, last: int) -> None:
        """Raises: unless the answer has just these bytes of the file as it was."""
        match = _RANGE.fullmatch(answer.getheader("Content-Range", "") or "")
        if answer.status == 416 or (match and match[3] not in ("*", str(self.size))):
            raise self._changed()
        whole = answer.status == 200 and first == 0 and answer.getheader("Content-Length") == str(last + 1)
        if not whole and (answer.status != 206 or match is None or (int(match[1]), int(match[2])) != (first, last)):
            raise self._refused(answer)
        version = _version_of(answer)
        if self._version is None:
            self._version = version
        elif version is not None and version != self._version and not self._pinned:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            "it changed while it was being read. Run the same command again, once nothing is writing to it",
            file=self.name,
        )

    def _refused(self, answer: http.client.HTTPResponse) -> Exception:
        """The error about an answer that is none."""
        status, reason = answer.status, answer.reason
        if status in _AGAIN:
            wait = answer.getheader("Retry-After", "") or ""
            return _Again(f"the server answers {status} {reason}", float(wait) if wait.isdecimal() else None)
        _connections.close()
        if status == 200:
            return StorageError(
                f"{self.name}: the server does not send parts of files (no Range). Download the file, and name that"
            )
        remedy = {401: ": it needs a login", 403: ": access is refused", 404: ": there is no such file"}.get(status, "")
        kind = NotThere if status in _ABSENT else StorageError
        return kind(f"{self.name}: the server answers {status} {reason}{remedy}")

    def _request(self, method: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """The answer, behind all redirects. An address that was redirected to is kept until it fails."""
        for url in dict.fromkeys((self._location, self._url)):
            answer = self._follow(method, url, headers)
            if answer.status not in (400, 401, 403, 404, 410) or url == self._url:  # signed addresses expire
                return answer
            _connections.close()
            self._location = self._url
        raise AssertionError

    def _follow(self, method: str, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        for _ in range(_REDIRECTS):
            own = self._headers() if urlsplit(url)[:2] == urlsplit(self._url)[:2] else {}
            try:
                answer = self._send(method, url, {**own, **headers})
            except (http.client.InvalidURL, UnicodeError) as error:  # of its host
                raise StorageError(f"{self.name}: there can be no such address: {error}") from None
            if answer.status not in _MOVED or not (target := answer.getheader("Location")):
                self._location = url
                return answer
            answer.read()
            address = joined(url, quote(target.encode("latin-1"), _KEPT_CHARACTERS))
            if address is None:
                raise StorageError(f"{self.name}: the server redirects to what is no address of HTTP")
            url = address
        raise StorageError(f"{self.name}: the server redirects more than {_REDIRECTS} times")

    def _send(self, method: str, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        parts = urlsplit(url)
        connection, target = _connections.get(parts.scheme, parts.netloc)
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), _KEPT_CHARACTERS)
        agent = {"User-Agent": f"fastinterp/{__version__}", "Accept-Encoding": "identity"}
        fresh = connection.sock is None
        try:
            connection.request(method, target + path, headers={**agent, **headers})
            return connection.getresponse()
        except (http.client.BadStatusLine, ConnectionError):
            _connections.close()
            if fresh:
                raise
        # The server had closed the connection that was kept.
        connection, target = _connections.get(parts.scheme, parts.netloc)
        connection.request(method, target + path, headers={**agent, **headers})
        return connection.getresponse()


class _Connections(threading.local):
    """The connections of one thread, for all files together; closed when the thread ends."""

    def __init__(self) -> None:
        self.of = _Kept()

    def get(self, scheme: str, netloc: str) -> tuple[http.client.HTTPConnection, str]:
        """A connection to a host, and what goes before the path in a request: of a proxy, the host."""
        if (scheme, netloc) not in self.of:
            if len(self.of) >= _KEPT:
                self.of.pop(next(iter(self.of)))[0].close()
            self.of[scheme, netloc] = _connect(scheme, netloc)
        return self.of[scheme, netloc]

    def socket_of(self, url: str) -> socket.socket | None:
        """The socket of the connection to an address; None, if that ends with its answer."""
        parts = urlsplit(url)
        kept = self.of.get((parts.scheme, parts.netloc))
        return None if kept is None else kept[0].sock

    def close(self) -> None:
        self.of.close()


class _Kept(dict[tuple[str, str], tuple[http.client.HTTPConnection, str]]):
    def close(self) -> None:
        while self:
            self.popitem()[1][0].close()

    def __del__(self) -> None:
        self.close()


_connections = _Connections()
atexit.register(_connections.close)


def _connect(scheme: str, netloc: str) -> tuple[http.client.HTTPConnection, str]:
    """A connection that is not open yet, through the proxy of the environment, and what requests have before a path."""
    from urllib.request import getproxies, proxy_bypass

    proxy = getproxies().get(scheme)
    host = netloc.rpartition("@")[2]
    through = urlsplit(proxy if "//" in proxy else f"http://{proxy}").netloc if proxy else ""
    secure = scheme == "https"
    if not through or proxy_bypass(host):
        return _open(host, secure), ""
    if not secure:
        return _open(through, False), f"http://{host}"
    connection = _open(through, True)  # plain to the proxy, and TLS through the tunnel
    connection.set_tunnel(host)
    return connection, ""


def _open(host: str, secure: bool) -> http.client.HTTPConnection:
    host = host.rpartition("@")[2]
    if secure:
        return http.client.HTTPSConnection(host, timeout=_TIMEOUT_S, context=_tls())
    return http.client.HTTPConnection(host, timeout=_TIMEOUT_S)


@lru_cache(maxsize=1)
def _tls() -> Any:
    """The settings of TLS: certificates as requests and curl find them."""
    import ssl

    names = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
    file = next((path for name in names if (path := os.environ.get(name)) and os.path.isfile(path)), None)
    if file is None:
        try:
            import certifi

            file = certifi.where()
        except ImportError:
            pass
    return ssl.create_default_context(cafile=file)


def joined(url: str, link: str) -> str | None:
    """The address of HTTP that a link on a page means; None, if it is none."""
    try:
        address = urljoin(url, link)
        return address if urlsplit(address).scheme in ("http", "https") else None
    except ValueError:  # what should be an IPv6 address, say
        return None


def _type_of(answer: http.client.HTTPResponse) -> str:
    return (answer.getheader("Content-Type") or "").lower()


def _version_of(answer: http.client.HTTPResponse) -> str | None:
    for name in ("ETag", "Last-Modified"):
        if value := answer.getheader(name):
            return f"{name} {value}"
    return None


def describe(error: BaseException) -> str:
    """An error of a connection, for people."""
    if isinstance(error, TimeoutError):
        return f"no answer within {_TIMEOUT_S:.0f} s"
    if isinstance(error, http.client.IncompleteRead):
        return "the connection was closed early"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
