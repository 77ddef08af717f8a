"""Where outputs go: files with their headers in place and their space reserved, or memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from fastinterp.backends.cpu import Handle, reserve
from fastinterp.errors import OutputError
from fastinterp.execute.sources import storage
from fastinterp.plan.plan import Plan


class Sinks(Protocol):
    """Outputs by number.

    handles  as the pump takes them
    of       tensor -> number of the sink and byte offset in it, one of each per output
    paths    of sinks that are files, for messages
    files    how many of them will be open at the same time
    scratch  a folder for temporary files; None: the system's
    """

    handles: list[Handle]
    of: dict[str, tuple[list[int], list[int]]]
    paths: list[Path]
    files: int
    scratch: Path | None

    def open(self, stack: ExitStack) -> None: ...


class FileSinks:
    """The output files, open for writing until `stack` closes.

    outputs  for each output, the path of each file of its layout; None for files that others write. They exist. What
             an earlier run has left in them is written again
    """

    def __init__(self, plan: Plan, outputs: Sequence[Sequence[Path | None]]):
        self.handles: list[Handle] = []
        self.of: dict[str, tuple[list[int], list[int]]] = {}
        self.paths: list[Path] = []
        paths = [path for files in outputs for path in files if path is not None]
        self.files = len(paths)
        self.scratch: Path | None = paths[0].parent
        self._plan, self._outputs = plan, outputs

    def open(self, stack: ExitStack) -> None:
        """Raises: OutputError, if a file cannot be opened, or the disk is full."""
        for layout, paths in zip(self._plan.layouts, self._outputs, strict=True):
            for file, path in zip(layout.files, paths, strict=True):
                if path is None:
                    continue
                with storage(path.parent / file.name, OutputError):
                    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    stack.callback(os.close, fd)
                    reserve(fd, file.size)
                    _write_first(fd, file.header)
                for name, offset in file.places.items():
                    sinks, offsets = self.of.setdefault(name, ([], []))
                    sinks.append(len(self.handles))
                    offsets.append(offset)
                self.handles.append(fd)
                self.paths.append(path.parent / file.name)


class MemorySinks:
    """Memory that its owner keeps.

    outputs  for each output: tensor -> address and bytes
    """

    def __init__(self, outputs: Sequence[Mapping[str, tuple[int, int]]]):
        self.handles: list[Handle] = []
        self.of: dict[str, tuple[list[int], list[int]]] = {}
        self.paths: list[Path] = []
        self.files = 0
        self.scratch: Path | None = None
        for places in outputs:
            for name, (address, nbytes) in places.items():
                sinks, offsets = self.of.setdefault(name, ([], []))
                sinks.append(len(self.handles))
                offsets.append(0)
                self.handles.append(("memory", address, nbytes))

    def open(self, stack: ExitStack) -> None:
        """Nothing is to be opened."""


def _write_first(fd: int, data: bytes) -> None:
    """Write all of `data` at the start of a file; the system may take less at a time."""
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
