"""Races a merge of two models over HTTP against one curl for each of them, in turn, from a server on this machine.

    python -m benchmarks.link MODEL_A MODEL_B [--mbytes 200] [--runs 3] [--folder DIR]

MODEL_A and MODEL_B are folders with model.safetensors. --mbytes limits the link, all connections together, to so many
MB/s; 0: not at all. Prints seconds of the two curls in parallel, into files and into nothing, and of `fastinterp
interpolate` with the start of its process, each with the seconds of processors of clients and server; and the load of
the machine. The server sends by sendfile.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

_AT_A_TIME = 256 << 10  # bytes


class Link:
    """A server of the files of folders, by ranges. rate: bytes/s of all connections together; 0: no limit"""

    def __init__(self, folders: dict[str, Path], rate: float):
        self._folders, self._rate, self._free, self._lock = folders, rate, 0.0, threading.Lock()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            threading.Thread(target=self._serve, args=(self._socket.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with connection, connection.makefile("rb") as lines:
                while request := lines.readline():
                    head = b"".join(iter(lines.readline, b"\r\n"))
                    self._answer(connection, request.split()[1].decode(), head)
        except (OSError, ValueError, IndexError):
            return

    def _answer(self, connection: socket.socket, name: str, head: bytes) -> None:
        model, _, file = name.strip("/").partition("/")
        path = self._folders.get(model, Path("/none")) / file
        if not path.is_file():
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        size = path.stat().st_size
        match = re.search(rb"(?i)\nrange: bytes=(\d+)-(\d+)", b"\n" + head)
        first, last = (int(match[1]), min(int(match[2]), size - 1)) if match else (0, size - 1)
        status = "206 Partial Content" if match else "200 OK"
        span = f"Content-Range: bytes {first}-{last}/{size}\r\n" if match else ""
        length = f"Content-Length: {last + 1 - first}\r\n"
        connection.sendall(f'HTTP/1.1 {status}\r\nETag: "{size}"\r\n{length}{span}\r\n'.encode())
        with open(path, "rb") as stream:
            while first <= last:
                count = min(last + 1 - first, _AT_A_TIME)
                self._wait(count)
                first += os.sendfile(connection.fileno(), stream.fileno(), first, count)

    def _wait(self, count: int) -> None:
        if self._rate:
            with self._lock:
                self._free = max(self._free, time.monotonic() - 0.05) + count / self._rate
                pause = self._free - time.monotonic()
            if pause > 0:
                time.sleep(pause)


class Took(NamedTuple):
    """Seconds. wall: from the first start to the last end. clients, server: of processors, in commands and here."""

    wall: float
    clients: float
    server: float

    @property
    def processors(self) -> float:
        return self.clients + self.server

    def __str__(self) -> str:
        return f"{self.wall:.2f} s ({self.clients:.2f} + {self.server:.2f})"


def took(commands: list[list[str]], environment: dict[str, str] | None = None) -> Took:
    """Of commands in parallel, while this process serves them."""
    start, before = time.perf_counter(), time.process_time()
    running = [subprocess.Popen(command, env=environment) for command in commands]
    clients = 0.0
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        clients += usage.ru_utime + usage.ru_stime
    if any(process.returncode for process in running):
        raise SystemExit(f"a command failed: {[process.returncode for process in running]}")
    return Took(time.perf_counter() - start, clients, time.process_time() - before)


def curls(urls: list[str], targets: list[str]) -> Took:
    """One for each model, in parallel."""
    pairs = zip(urls, targets, strict=True)
    return took([["curl", "-sf", "-o", target, f"{url}/model.safetensors"] for url, target in pairs])


def merge(urls: list[str], folder: str, environment: dict[str, str]) -> Took:
    program = [sys.executable, "-m", "fastinterp", "interpolate"]
    return took([[*program, *urls, f"{folder}/out", "--alpha", "0.5", "--quiet"]], environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, type=Path)
    parser.add_argument("--mbytes", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    link = Link({"a": given.models[0], "b": given.models[1]}, given.mbytes * 1e6)
    urls = [f"{link.url}/{name}" for name in "ab"]
    runs: list[tuple[Took, Took, Took]] = []
    with tempfile.TemporaryDirectory() as compiled:  # as pip compiles what it installs
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for run in range(-1, given.runs):  # the first one compiles, and is not counted
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                if run < 0:
                    merge(urls, folder, environment)
                    continue
                files = curls(urls, [f"{folder}/{name}" for name in "ab"])
                nothing = curls(urls, [os.devnull] * 2)
                for name in "ab":
                    os.remove(f"{folder}/{name}")
                own = merge(urls, folder, environment)
            runs.append((files, nothing, own))
            load = os.getloadavg()[0]
            print(f"curl {files} into files, {nothing} into nothing; merge {own}; load {load:.1f}", flush=True)
    for number, name in enumerate(("files", "nothing")):
        wall = statistics.median(run[number].wall / run[2].wall for run in runs)
        processors = statistics.median(run[number].processors / run[2].processors for run in runs)
        print(f"rate of the merge relative to curl into {name}: {wall:.2f}; by processor time {processors:.2f}")


if __name__ == "__main__":
    main()
