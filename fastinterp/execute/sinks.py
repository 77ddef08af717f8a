"""The sinks of a run: output files, or memory.

Of a file, space is reserved first, without the file growing; then its data is written, and last its header, which has
the checksum of the data. So a file that was not finished has no header, or is shorter than the header says.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fastinterp.backends.cpu import FileChecksum, Progress, SinkHandle, reserve, start_writeback
from fastinterp.checkpoint.regular_file import close, write_all
from fastinterp.errors import OutputError
from fastinterp.execute.sources import storage
from fastinterp.output.layout import Layout, OutFile
from fastinterp.plan.plan import Plan

if TYPE_CHECKING:
    from fastinterp.output.receipt import WeightsFile


class Sinks(Protocol):
    """The sinks of a run.

    handles  the sinks in the form that the pump takes
    of       tensor -> (sinks, byte offsets in them), one of each per output; those that are written alone
    paths    paths of the sinks that are files, for messages
    files    number of files that are open at the same time
    scratch  a folder for temporary files; None: the system's
    checksums  of the files that are open, by their numbers among all files of all outputs
    """

    handles: list[SinkHandle]
    paths: list[Path]
    files: int
    scratch: Path | None
    checksums: dict[int, FileChecksum]

    @property
    def of(self) -> Mapping[str, tuple[Sequence[int], Sequence[int]]]: ...

    def open(self, stack: ExitStack, isa: str) -> None: ...

    def watched(self, progress: Progress | None) -> Progress | None:
        """The callback that the run is to call, which calls `progress`."""

    def finish(self, threads: int) -> list[dict[str, WeightsFile]]:
        """Complete the files, when all data is written: for each output, what the receipt says of each."""


class FileSinks:
    """The output files, open until `stack` closes.

    outputs  for each output, the path of each file of its layout, which exists; None for files that other processes
             write. Contents that an earlier run has left are overwritten
    synced   they will be synced to the disk: that is begun while the run is at work
    """

    def __init__(self, plan: Plan, outputs: Sequence[Sequence[Path | None]], synced: bool = False):
        self.handles: list[SinkHandle] = []
        self.of = _Places(plan.layouts)
        self.paths: list[Path] = []
        paths = [path for files in outputs for path in files if path is not None]
        self.files = len(paths)
        self.scratch: Path | None = paths[0].parent
        self.checksums: dict[int, FileChecksum] = {}
        self._plan, self._outputs, self._synced = plan, outputs, synced
        self._opened: list[tuple[int, OutFile, Path, FileChecksum]] = []  # index of the output, ...

    def open(self, stack: ExitStack, isa: str) -> None:
        """Raises: OutputError, if a file cannot be opened, or the disk is full."""
        number = -1
        for k, (layout, paths) in enumerate(zip(self._plan.layouts, self._outputs, strict=True)):
            for at, (file, path) in enumerate(zip(layout.files, paths, strict=True)):
                number += 1
                if path is None:
                    continue
                shown = path.parent / os.path.basename(file.name)
                with storage(shown, OutputError):
                    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                    stack.callback(close, fd, shown)
                    if os.fstat(fd).st_size:  # an earlier run's: its header must not stand before other data
                        write_all(fd, bytes(len(file.header)), 0)
                    reserve(fd, file.size)
                self.of.add(k, at, len(self.handles))
                checksum = FileChecksum(fd, len(file.header), file.size, isa)
                self.handles.append(checksum)
                self.checksums[number] = checksum
                self.paths.append(shown)
                self._opened.append((k, file, shown, checksum))

    def watched(self, progress: Progress | None) -> Progress | None:
        # Beginning to write 2 GB to the disk takes 0.05 s of processor time, which is the kernel's where nobody waits.
        if not self._synced:
            return progress

        def report(done: int, total: int) -> None:
            for _, _, _, checksum in self._opened:
                start_writeback(checksum.fd)
            if progress is not None:
                progress(done, total)

        return report

    def finish(self, threads: int) -> list[dict[str, WeightsFile]]:
        """Raises: OutputError, if a file cannot be written."""
        from fastinterp.execute.checksums import finished_file

        finished: list[dict[str, WeightsFile]] = [{} for _ in self._outputs]
        for k, file, shown, checksum in self._opened:
            with storage(shown, OutputError):
                os.truncate(checksum.fd, file.size)  # where it ends with bytes that no tensor has
                try:
                    regions = checksum.regions(threads)
                except ValueError:
                    raise OutputError(f"{shown}: it became shorter while it was being written") from None
                header, finished[k][file.name] = finished_file(file, regions)
                write_all(checksum.fd, header, 0)
        return finished


class _Places(Mapping[str, tuple[Sequence[int], Sequence[int]]]):
    """Tensor -> (sinks, byte offsets in them), one of each per output that has a sink for its file. Looked up in the
    layouts, which all have the same tensors in the same files: models with many tensors make no large table.
    """

    def __init__(self, layouts: Sequence[Layout]):
        self._layouts = layouts
        self._open: list[tuple[list[int], list[Mapping[str, int]]]] = [([], []) for _ in layouts[0].files]

    def add(self, output: int, file: int, sink: int) -> None:
        """The sink of a file of an output."""
        sinks, places = self._open[file]
        sinks.append(sink)
        places.append(self._layouts[output].files[file].places)

    def __getitem__(self, name: str) -> tuple[Sequence[int], Sequence[int]]:
        sinks, places = self._open[self._layouts[0].place(name)[0]]
        if not sinks:
            raise KeyError(name)
        return sinks, [of[name] for of in places]

    def __iter__(self) -> Iterator[str]:
        return (name for file, (sinks, _) in zip(self._layouts[0].files, self._open, strict=True) if sinks
                for name in file.places)  # fmt: skip

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MemorySinks:
    """Outputs in memory, which its owner keeps alive during the run.

    outputs  for each output: tensor -> (address, bytes)
    """

    def __init__(self, outputs: Sequence[Mapping[str, tuple[int, int]]]):
        self.handles: list[SinkHandle] = []
        self.of: dict[str, tuple[list[int], list[int]]] = {}
        self.paths: list[Path] = []
        self.files = 0
        self.scratch: Path | None = None
        self.checksums: dict[int, FileChecksum] = {}
        for tensors in outputs:
            for name, (address, nbytes) in tensors.items():
                sinks, offsets = self.of.setdefault(name, ([], []))
                sinks.append(len(self.handles))
                offsets.append(0)
                self.handles.append(("memory", address, nbytes))

    def open(self, stack: ExitStack, isa: str) -> None:
        """Does nothing: memory needs no opening."""

    def watched(self, progress: Progress | None) -> Progress | None:
        return progress

    def finish(self, threads: int) -> list[dict[str, WeightsFile]]:
        """Does nothing: memory has no checksums."""
        return []
