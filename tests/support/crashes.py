"""What a file system may hold after a crash of the machine: a model, over the recorded calls of one run.

Names: each change of a folder (a file made, renamed, removed) is on the disk if the folder was synced after it; of the
others any may be, each as a whole. Contents: what a file held when it was synced last is on the disk; of what was
written after that all, nothing, a part, or zeros. This is weaker than what ext4, xfs and btrfs promise, which keep the
order of names.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class _File:
    synced: bytes = b""
    versions: list[tuple[int, bytes]] = field(default_factory=list)  # (event, content) when it was looked at


@dataclass
class Crashes:
    """Records the changes that this process makes below `root`."""

    root: Path
    files: dict[int, _File] = field(default_factory=dict)
    at_start: dict[str, int] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    events: list[tuple[Any, ...]] = field(default_factory=list)
    _names: dict[str, int] = field(default_factory=dict)
    _real: dict[str, Any] = field(default_factory=dict)
    _open: dict[int, str] = field(default_factory=dict)

    def start(self, monkeypatch: Any) -> None:
        self.folders = {str(path) for path in (self.root, *self.root.rglob("*")) if path.is_dir()}
        for path in self.root.rglob("*"):
            if path.is_file():
                self._names[str(path)] = self._new(path.read_bytes())
        self.at_start = dict(self._names)
        own = {
            "open": self._opened, "replace": self._replace, "unlink": self._unlink, "fsync": self._fsync,
            "mkdir": self._mkdir, "rmdir": self._rmdir, "write": self._write, "ftruncate": self._ftruncate,
        }  # fmt: skip
        for name, call in own.items():
            self._real[name] = getattr(os, name)
            monkeypatch.setattr(f"os.{name}", call)

    def _new(self, content: bytes) -> int:
        self.files[len(self.files)] = _File(content)
        return len(self.files) - 1

    def _look(self) -> None:
        """Note the contents of all files; they change without calls of `os`, too."""
        for name, number in self._names.items():
            if os.path.isfile(name):
                self.files[number].versions.append((len(self.events), Path(name).read_bytes()))

    def _note(self, *event: Any) -> None:
        self._look()
        self.events.append(event)
        self._look()

    def _opened(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        name = os.path.abspath(os.fspath(path))
        fresh = flags & os.O_CREAT and not os.path.lexists(name)
        fd = int(self._real["open"](path, flags, *args, **options))
        self._open[fd] = name
        if fresh and name.startswith(str(self.root)):
            self._names[name] = self._new(b"")
            self._note("make", name, self._names[name])
        return fd

    def _replace(self, source: Any, target: Any) -> None:
        a, b = os.path.abspath(source), os.path.abspath(target)
        self._real["replace"](source, target)
        self._names[b] = self._names.pop(a)
        self._note("rename", a, b)

    def _unlink(self, path: Any, **options: Any) -> None:
        self._real["unlink"](path, **options)
        self._names.pop(os.path.abspath(path), None)
        self._note("remove", os.path.abspath(path))

    def _mkdir(self, path: Any, *args: Any, **options: Any) -> None:
        self._real["mkdir"](path, *args, **options)
        self._note("folder", os.path.abspath(path))

    def _rmdir(self, path: Any, **options: Any) -> None:
        self._real["rmdir"](path, **options)
        self._note("no folder", os.path.abspath(path))

    def _write(self, fd: int, data: Any) -> int:
        put = int(self._real["write"](fd, data))
        self._note("write")
        return put

    def _ftruncate(self, fd: int, size: int) -> None:
        self._real["ftruncate"](fd, size)
        self._note("write")

    def _fsync(self, fd: int) -> None:
        self._real["fsync"](fd)
        name = self._open[fd]
        self._note("sync", name, self._names.get(name))

    def after(self, count: int, to: Path, draw: random.Random, *, ordered: bool) -> None:
        """Make in the folder `to` what the disk may hold if the machine crashes after so many events.

        ordered  changes of names are there in their order, up to any of them; else any of them
        """
        done = self.events[:count]
        sure = {}  # folder -> number of events that are on the disk for certain
        for number, event in enumerate(done):
            if event[0] == "sync" and event[2] is None:
                sure[event[1]] = number
        last = draw.randint(max(sure.values(), default=-1), count) if ordered else count
        names = dict(self.at_start)
        folders = set(self.folders)
        for number, event in enumerate(done):
            if event[0] in ("write", "sync"):
                continue
            certain = number <= sure.get(os.path.dirname(event[-1] if event[0] != "make" else event[1]), -1)
            if not (certain or (number <= last if ordered else draw.random() < 0.5)):
                continue
            if event[0] == "make":
                names[event[1]] = event[2]
            elif event[0] == "rename" and event[1] in names:
                names[event[2]] = names.pop(event[1])
            elif event[0] == "remove":
                names.pop(event[1], None)
            elif event[0] == "folder":
                folders.add(event[1])
        loses = draw.choice(["all", "nothing", "some"])
        for name, number in names.items():
            if os.path.dirname(name) not in folders:
                continue
            path = to / os.path.relpath(name, self.root)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._content(number, count, done, loses, draw))
        to.mkdir(parents=True, exist_ok=True)

    def _content(self, number: int, count: int, done: list[tuple[Any, ...]], loses: str, draw: random.Random) -> bytes:
        file = self.files[number]
        synced_at = max((i for i, e in enumerate(done) if e[0] == "sync" and e[2] == number), default=-1)
        content = [c for at, c in file.versions if at <= count]
        kept = [c for at, c in file.versions if at <= synced_at + 1] if synced_at >= 0 else [file.synced]
        now, safe = (content or [file.synced])[-1], kept[-1]
        if now == safe or loses == "nothing":
            return now
        if loses == "all":
            return safe
        same = len(safe) if now.startswith(safe) else 0  # what was synced and not written since
        more = now[same:]
        return now[:same] + draw.choice([more, bytes(len(more)), more[: len(more) // 2], b""])
