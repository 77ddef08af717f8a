"""Races a merge of two models over HTTP against one curl for each of them, in turn, from a server on this machine.

    python -m benchmarks.link MODEL_A MODEL_B [--mbytes 200] [--runs 3] [--folder DIR]

MODEL_A and MODEL_B are folders with model.safetensors. --mbytes limits the link, all connections together, to so many
MB/s; 0: not at all. Prints seconds of the two curls in parallel, into files and into nothing, and of `fastinterp
interpolate` with the start of its process; and the load of the machine. The server sends by sendfile.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

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


def seconds(commands: list[list[str]]) -> float:
    """Of commands in parallel."""
    start = time.perf_counter()
    running = [subprocess.Popen(command) for command in commands]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"a command failed: {codes}")
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs=2, type=Path)
    parser.add_argument("--mbytes", type=float, default=0.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    link = Link({"a": given.models[0], "b": given.models[1]}, given.mbytes * 1e6)
    urls = [f"{link.url}/{name}" for name in "ab"]
    ratios: dict[str, list[float]] = {"into files": [], "into nothing": []}
    for _ in range(given.runs):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            targets = [[f"{folder}/{name}" for name in "ab"], [os.devnull] * 2]
            took = [
                seconds(
                    [["curl", "-sf", "-o", to, f"{url}/model.safetensors"] for url, to in zip(urls, of, strict=True)]
                )
                for of in targets
            ]
            shutil.rmtree(folder)
            os.mkdir(folder)
            merge = [
                sys.executable,
                "-m",
                "fastinterp",
                "interpolate",
                *urls,
                f"{folder}/out",
                "--alpha",
                "0.5",
                "--quiet",
            ]
            own = seconds([merge])
        for name, curls in zip(ratios, took, strict=True):
            ratios[name].append(curls / own)
        load = os.getloadavg()[0]
        print(f"curl {took[0]:.2f} s into files, {took[1]:.2f} s into nothing; merge {own:.2f} s; load {load:.1f}")
    for name, found in ratios.items():
        print(f"rate of the merge relative to curl {name}: {statistics.median(found):.2f}")


if __name__ == "__main__":
    main()
