"""Bodies of answers of HTTP, from a server that sends what each test says: exact bytes, cuts, stalls, signals."""

from __future__ import annotations

import fcntl
import re
import signal
import socket
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from fastinterp.checkpoint import http_body, http_ranges
from fastinterp.checkpoint.http_ranges import HttpFile
from fastinterp.errors import StorageError
from tests.support.checkpoints import words

DATA = words(7, 400_000).tobytes()  # 3.2 MB, several times what a socket holds


@dataclass
class Scripted:
    """What the server does. url: of the file. spans: (first, last) of each request. connections: that were opened

    answer  called with the connection, the number of the request, first and last; False ends the connection
    """

    answer: Callable[[socket.socket, int, int, int], bool | None]
    url: str = ""
    spans: list[tuple[int, int]] = field(default_factory=list)
    connections: int = 0


def head(first: int, last: int, length: int | None = None) -> bytes:
    """Of an answer with these bytes. length: what it says of its own, else what they are"""
    length = last + 1 - first if length is None else length
    span = f"Content-Range: bytes {first}-{last}/{len(DATA)}"
    return f"HTTP/1.1 206 Partial Content\r\n{span}\r\nContent-Length: {length}\r\n\r\n".encode()


def send_all(connection: socket.socket, number: int, first: int, last: int) -> bool | None:
    connection.sendall(head(first, last) + DATA[first : last + 1])
    return None


@contextmanager
def scripted(answer: Callable[[socket.socket, int, int, int], bool | None]) -> Iterator[Scripted]:
    """Context manager: a server of one file, DATA, until the end."""
    server = Scripted(answer)

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                while request := b"".join(iter(lines.readline, b"\r\n")):
                    first, last = map(int, re.search(rb"bytes=(\d+)-(\d+)", request).groups())  # type: ignore[union-attr]
                    server.spans.append((first, last))
                    if answer(connection, len(server.spans), first, last) is False:
                        return
            except OSError:  # the client has gone
                pass

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            server.connections += 1
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server.url = f"http://127.0.0.1:{listening.getsockname()[1]}/m"
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server
        finally:
            http_ranges._connections.close()
            listening.shutdown(socket.SHUT_RDWR)


def read(server: Scripted, first: int, count: int) -> bytes:
    """Through HttpFile. The bytes around the memory that it fills are checked."""
    memory = bytearray(b"\xa5" * (count + 128))
    HttpFile(server.url, "the file", len(DATA)).read_into(memoryview(memory)[64:-64], first)
    assert memory[:64] == memory[-64:] == b"\xa5" * 64
    return bytes(memory[64:-64])


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(http_ranges, "_LONGEST_WAIT_S", 0.0)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """Bytes that were asked for by each call of the system that waits for all."""
    asked: list[int] = []
    real = http_body._receive

    def noted(sock, view):
        asked.append(len(view))
        return real(sock, view)

    monkeypatch.setattr(http_body, "_receive", noted)
    return asked


@pytest.mark.parametrize("count", [1, 2, 8191, 8192, 8193, 16385, 300_007, len(DATA) - 5])
def test_exact_bytes_and_one_connection(count, calls):
    """Of every size around that of the buffer of http.client; the connection is in step for the next request."""
    with scripted(send_all) as server:
        for first in (5, 0, 5):
            assert read(server, first, count) == DATA[first : first + count]
        assert server.connections == 1 and server.spans[0] == (5, 4 + count)
    assert count < 1_000_000 or calls


def test_headers_alone_first_and_the_body_in_pieces(calls):
    """One call waits for all of the pieces."""

    def slowly(connection: socket.socket, number: int, first: int, last: int) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(head(first, last))
        for at in range(first, last + 1, 10_000):
            time.sleep(0.01)
            connection.sendall(DATA[at : min(at + 10_000, last + 1)])

    with scripted(slowly) as server:
        assert read(server, 3, 100_000) == DATA[3:100_003]
        assert server.spans == [(3, 100_002)]
    assert len(calls) == 1


def _unsent(connection: socket.socket) -> int:
    """Bytes that the other side has not received."""
    return int(struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"0000"))[0])


def cut(sent: int, reset: bool) -> Callable[[socket.socket, int, int, int], bool | None]:
    """Ends the first two answers after so many bytes, by the end of the stream or a reset."""

    def answer(connection: socket.socket, number: int, first: int, last: int) -> bool | None:
        if number > 2:
            return send_all(connection, number, first, last)
        connection.sendall(head(first, last) + DATA[first : first + sent])
        if reset:
            while _unsent(connection):  # a reset throws that away
                time.sleep(0.01)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    return answer


@pytest.mark.parametrize("sent", [0, 100, 200_000])
@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_that_ends_half_way(sent, reset):
    """The next request asks for the rest only: nothing is fetched twice."""
    with scripted(cut(sent, reset)) as server:
        assert read(server, 1000, 900_000) == DATA[1000:901_000]
    assert [first for first, _ in server.spans] == [1000, 1000 + sent, 1000 + 2 * sent]


def test_an_answer_that_is_shorter_than_its_range():
    """Its length says so. The rest is asked for."""

    def short(connection: socket.socket, number: int, first: int, last: int) -> bool | None:
        if number > 1:
            return send_all(connection, number, first, last)
        connection.sendall(head(first, last, 50_000) + DATA[first : first + 50_000])
        return None

    with scripted(short) as server:
        assert read(server, 10, 90_000) == DATA[10:90_010]
    assert [first for first, _ in server.spans] == [10, 50_010]


def test_an_answer_in_chunks():
    """http.client takes it apart."""

    def chunks(connection: socket.socket, number: int, first: int, last: int) -> None:
        parts = [DATA[at : min(at + 7000, last + 1)] for at in range(first, last + 1, 7000)]
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
        start = head(first, last).replace(b"Content-Length: %d" % (last + 1 - first), b"Transfer-Encoding: chunked")
        connection.sendall(start + body + b"0\r\n\r\n")

    with scripted(chunks) as server:
        assert read(server, 2, 60_000) == DATA[2:60_002] == read(server, 2, 60_000)
    assert server.connections == 1


def test_an_answer_with_which_the_connection_ends(calls):
    def last_one(connection: socket.socket, number: int, first: int, last: int) -> bool:
        start = head(first, last).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        connection.sendall(start + DATA[first : last + 1])
        return False

    with scripted(last_one) as server:
        assert read(server, 2, 600_000) == DATA[2:600_002] == read(server, 2, 600_000)
    assert server.connections == 2 and not calls


def stall(sent: int, times: int) -> Callable[..., bool | None]:
    """Sends so many bytes of the first answers, and then nothing more."""

    def answer(connection: socket.socket, number: int, first: int, last: int) -> bool | None:
        if number > times:
            return send_all(connection, number, first, last)
        connection.sendall(head(first, last) + DATA[first : first + sent])
        connection.recv(1)  # until the client ends the connection
        return None

    return answer


@pytest.mark.slow(1)
@pytest.mark.parametrize("sent", [0, 100_000])
def test_a_server_that_stalls(sent, monkeypatch):
    """After the time without any byte another request asks for the rest."""
    monkeypatch.setattr(http_ranges, "_TIMEOUT_S", 1.0)
    with scripted(stall(sent, 1)) as server:
        start = time.monotonic()
        assert read(server, 0, 900_000) == DATA[:900_000]
        assert time.monotonic() - start >= 1
    assert {first for first, _ in server.spans} == {0, sent}


def test_a_server_that_never_goes_on(monkeypatch):
    monkeypatch.setattr(http_ranges, "_TIMEOUT_S", 0.1)
    message = r"the file: .*no answer within 0 s.*, 5 times in a row"
    with scripted(stall(0, 99)) as server, pytest.raises(StorageError, match=message):
        read(server, 0, 900_000)
    assert {*server.spans} == {(0, 899_999)}


def test_a_signal_is_handled_while_it_waits():
    """Ctrl-C ends the wait at once, and not after the timeout."""

    class Interrupt(BaseException): ...

    def handler(number: int, frame: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        with scripted(stall(500_000, 99)) as server:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            start = time.monotonic()
            with pytest.raises(Interrupt):
                read(server, 0, 900_000)
            assert time.monotonic() - start < 10
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
