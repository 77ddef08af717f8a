"""The sinks of a run: output files, with headers written and space reserved, or memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from fastinterp.backends.cpu import Handle, reserve
from fastinterp.checkpoint.regular_file import close, write_all
from fastinterp.errors import OutputError
from fastinterp.execute.sources import storage
from fastinterp.plan.plan import Plan


class Sinks(Protocol):
    """The sinks of a run.

    handles  the sinks in the form that the pump takes
    of       tensor -> (sinks, byte offsets in them), one of each per output
    paths    paths of the sinks that are files, for messages
    files    number of files that are open at the same time
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

    outputs  for each output, the path of each file of its layout, which exists; None for files that other processes
             write. Contents that an earlier run has left are overwritten
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
                shown = path.parent / os.path.basename(file.name)
                with storage(shown, OutputError):
                    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                    stack.callback(close, fd, shown)
                    reserve(fd, file.size)
                    write_all(fd, file.header, 0)
                for name, offset in file.places.items():
                    sinks, offsets = self.of.setdefault(name, ([], []))
                    sinks.append(len(self.handles))
                    offsets.append(offset)
                self.handles.append(fd)
                self.paths.append(shown)


class MemorySinks:
    """Outputs in memory, which its owner keeps alive during the run.

    outputs  for each output: tensor -> (address, bytes)
    """

    def __init__(self, outputs: Sequence[Mapping[str, tuple[int, int]]]):
        self.handles: list[Handle] = []
        self.of: dict[str, tuple[list[int], list[int]]] = {}
        self.paths: list[Path] = []
        self.files = 0
        self.scratch: Path | None = None
        for tensors in outputs:
            for name, (address, nbytes) in tensors.items():
                sinks, offsets = self.of.setdefault(name, ([], []))
                sinks.append(len(self.handles))
                offsets.append(0)
                self.handles.append(("memory", address, nbytes))

    def open(self, stack: ExitStack) -> None:
        """Does nothing: memory needs no opening."""
