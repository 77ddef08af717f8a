"""The body of an answer of HTTP, received into memory that is there already."""

from __future__ import annotations

import http.client
import math
import socket
import struct
from collections.abc import Iterator

_PART = 256 << 10  # bytes that the system waits for before it wakes the thread


def received(answer: http.client.HTTPResponse, sock: socket.socket | None, view: memoryview) -> Iterator[int]:
    """Fill `view` with the body of an answer. Yields after each piece how many bytes are there so far; ends early where
    the connection was closed.

    sock  of the answer, with a timeout; None: it has none that can be read beside http.client
    Raises: OSError and HTTPException of the connection; TimeoutError.
    """
    plain = type(sock) is socket.socket and bool(sock.gettimeout())  # no TLS
    done, direct = 0, plain and answer.length == len(view)  # no chunks
    while done < len(view):
        if not direct:
            got = answer.readinto(view[done:])
        elif done == 0:
            some = len(answer.fp.peek())  # what came with the headers: all that http.client has taken from the socket
            got = answer.fp.readinto(view[:some])
        else:
            assert sock is not None
            got = _receive(sock, view[done:])
        if not got:
            return
        done += got
        yield done
    if direct:
        answer.length = 0
    answer.read()  # nothing is left: the connection can be used again


def _receive(sock: socket.socket, view: memoryview) -> int:
    """Fill `view` from a socket with a timeout. Returns how many bytes came until that, or until it was closed.

    These are two calls of the system for all of them, without the interpreter's lock, where http.client calls Python
    for every piece that is there. The timeout is of all waits of a call together: a server that stalls after the first
    bytes of one is noticed within twice that time.
    Raises: OSError; TimeoutError, if none came.
    """
    timeout = sock.gettimeout()
    assert timeout  # of every connection that is read so
    fraction, seconds = math.modf(timeout)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), int(fraction * 1e6)))
    sock.settimeout(None)  # only so does the system wait for all
    first = max(0, len(view) - _PART)  # after these come _PART more, so that waiting for that many never waits too long
    got = 0
    try:
        got += _waited(sock, view[:first], _PART) if first else 0
        return got if got < first else got + _waited(sock, view[first:], 1)
    except BlockingIOError:
        if not got:
            raise TimeoutError from None
        return got
    finally:
        sock.settimeout(timeout)


def _waited(sock: socket.socket, view: memoryview, part: int) -> int:
    """Fill `view`, waking after `part` bytes at the soonest. Returns how many came until the timeout or the end."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, part)
    return sock.recv_into(view, flags=socket.MSG_WAITALL)
