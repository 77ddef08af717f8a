"""The files of an output, compared with the checksums of its receipt."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from fastinterp.backends.cpu import REGION_BYTES, checksum, xxh3
from fastinterp.backends.registry import cpu_threads
from fastinterp.checkpoint import remote
from fastinterp.checkpoint.checksum import stated_checksum
from fastinterp.checkpoint.file_kinds import read_header
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.regular_file import pieces_of
from fastinterp.checkpoint.remote import opened, read_up_to
from fastinterp.errors import CheckpointError
from fastinterp.execute.checksums import small_file
from fastinterp.execute.sources import storage
from fastinterp.execute.torn import holes_in
from fastinterp.messages import counted, listed
from fastinterp.messages import size as shown_size
from fastinterp.output.receipt import ReceiptFile, SmallFile, WeightsFile, hexadecimal
from fastinterp.presence import file_size
from fastinterp.progress import Progress

_SHOWN = 3  # tensors in a message, before the rest is only counted
_AT_A_TIME = 4  # regions between two looks at the keyboard


class Finding(msgspec.Struct, frozen=True):
    """What is wrong with a file.

    file     relative to the output's folder
    what     for people
    tensors  that are concerned, as far as that is known
    """

    file: str
    what: str
    tensors: tuple[str, ...] = ()


class Checked(msgspec.Struct, frozen=True):
    """What was compared with checksums: findings, files of weights, other files, and bytes."""

    findings: tuple[Finding, ...]
    weights: int
    others: int
    nbytes: int


def check_files(folder: Path, receipt: ReceiptFile, threads: int | None, progress: Progress | None) -> Checked:
    """Compare all files of a folder with its receipt. Raises: StorageError, if one cannot be read."""
    findings: list[Finding] = []
    total = sum(file.size for file in receipt.weights.values())
    done = 0
    for name, weights in receipt.weights.items():
        findings += _check_weights(folder, name, weights, threads, _from(progress, done, total))
        done += weights.size
    for name, small in receipt.files.items():
        findings += _check_small(folder / name, name, small)
    nbytes = total + sum(small.size for small in receipt.files.values())
    return Checked(tuple(findings), len(receipt.weights), len(receipt.files), nbytes)


def check_stated(path: Path, threads: int | None, progress: Progress | None) -> Checked:
    """Compare a file of weights with the checksum that its header states; with nothing, if that states none.

    Raises: CheckpointError, if its header is damaged; StorageError, if it cannot be read.
    """
    header = read_header(path, 0)
    stated = stated_checksum(header.metadata)
    if stated is None:
        return Checked((), 0, 0, 0)
    start = min((entry.start for entry in header.entries), default=0)
    elsewhere = remote.find(path)
    size = (file_size(path) or 0) if elsewhere is None else elsewhere.size
    found = sum(regions_of(path, start, size, threads, progress)) % 2**64
    findings = []
    if found != stated:
        what = f"its data is not what was written: the checksum is {found:016x}, and the header says {stated:016x}"
        findings.append(Finding(path.name, what + _holes(path, start, size), ()))
    return Checked(tuple(findings), 1, 0, size)


def regions_of(path: Path, start: int, end: int, threads: int | None, progress: Progress | None) -> list[int]:
    """The checksums of the regions of a file's data. Raises: StorageError."""
    if (elsewhere := remote.find(path)) is not None:
        from fastinterp.verification.elsewhere import regions_elsewhere

        return regions_elsewhere(elsewhere, start, end, threads, progress)
    numbers: list[int] = []
    with storage(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            at = start
            while at < end:
                stop = min(end, (at // REGION_BYTES + _AT_A_TIME) * REGION_BYTES)
                numbers += checksum(fd, at, stop, cpu_threads(threads))
                at = stop
                if progress is not None:
                    progress(at, end)
        except ValueError:
            raise CheckpointError("it became shorter while it was being read", file=str(path)) from None
        finally:
            os.close(fd)
    return numbers


def _check_weights(
    folder: Path, name: str, receipt: WeightsFile, threads: int | None, progress: Progress | None
) -> list[Finding]:  # fmt: skip
    path = folder / name
    elsewhere = remote.find(path)
    size = file_size(path) if elsewhere is None else elsewhere.size
    if size is None:
        return [Finding(name, "it is missing")]
    if size != receipt.size:
        return [Finding(name, f"it has {size} bytes, and the receipt says {receipt.size}")]
    start = receipt.data_start
    if hexadecimal(xxh3(_head(path, start))) != receipt.header_xxh3:
        never = " It was never written" if not any(_head(path, min(start, 64))) else ""
        return [Finding(name, f"its header is not the one that was written.{never}")]
    regions = regions_of(path, start, size, threads, progress)
    wrong = [r for r, (own, said) in enumerate(zip(regions, receipt.regions, strict=False)) if hexadecimal(own) != said]
    if len(regions) != len(receipt.regions):
        return [Finding(name, f"it has {len(regions)} regions, and the receipt {len(receipt.regions)}")]
    if not wrong:
        return []
    first = start // REGION_BYTES
    spans = [(max(start, (first + r) * REGION_BYTES), min(size, (first + r + 1) * REGION_BYTES)) for r in wrong]
    tensors = tensors_in(read_header(path, 0).entries, spans)
    part = os.path.dirname(name)
    tensors = [f"{part}/{t}" if part else t for t in tensors]
    begin, end = spans[0][0], spans[-1][1]
    what = (
        f"its data is not what was written: {len(wrong)} of {counted(len(regions), 'part')} of 64 MiB "
        f"{'differs' if len(wrong) == 1 else 'differ'}, from byte {begin} to {end}, {_which_hold(tensors)}"
    )
    return [Finding(name, what + _holes(path, start, size), tuple(tensors))]


def _which_hold(tensors: Sequence[str]) -> str:
    return f"which hold {listed(tensors, _SHOWN)}"


def narrowed(finding: Finding, tensors: Sequence[str]) -> Finding:
    """A finding about the data of a file whose tensors were computed again: those are named that differ.

    tensors  of the file, that differ; if there are none, the finding stays
    """
    if not tensors or not finding.tensors:
        return finding
    what = finding.what.replace(_which_hold(finding.tensors), f"in {listed(tensors, _SHOWN)}")
    return Finding(finding.file, what, tuple(tensors))


def tensors_in(entries: Iterable[Entry], spans: Sequence[tuple[int, int]]) -> list[str]:
    """The names of the tensors with bytes in one of the spans."""
    return [
        e.name
        for e in entries
        if any(e.start < end and begin < max(e.start + e.nbytes, e.start + 1) for begin, end in spans)
    ]


def _check_small(path: Path, name: str, receipt: SmallFile) -> list[Finding]:
    size = file_size(path)
    if size is None:
        return [Finding(name, "it is missing")]
    if size != receipt.size:
        return [Finding(name, f"it has {size} bytes, and the receipt says {receipt.size}")]
    if small_file(pieces_of(str(path))) != receipt:
        return [Finding(name, "its content is not what was written")]
    return []


def _head(path: Path, size: int) -> bytes:
    with opened(str(path)) as file:
        return read_up_to(file, path, 0, size)


def _holes(path: Path, start: int, size: int) -> str:
    """The end of a message about data that was never written; nothing, if it was."""
    if remote.find(path) is not None:
        return ""
    with storage(path), open(path, "rb") as stream:
        missing = sum(end - begin for begin, end in holes_in(stream.fileno(), start, size))
    return f". {shown_size(missing)} were never written: the machine may have stopped before" if missing else ""


def _from(progress: Progress | None, done: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda at, _: progress(done + at, total)
