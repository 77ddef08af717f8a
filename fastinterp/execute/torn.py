"""Refuses outputs of fastinterp whose data did not reach the disk before the machine stopped, or was damaged since.

What was reserved and never written is a hole in the file, which costs nothing to find. A hole alone proves nothing: a
sparse copy has them where the zeros are true. So the regions with holes are compared with their checksums.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastinterp.backends.cpu import REGION_BYTES, checksum
from fastinterp.checkpoint import remote
from fastinterp.checkpoint.checksum import stated_checksum
from fastinterp.checkpoint.file_kinds import read_header
from fastinterp.checkpoint.names import quote, shell_word
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.regular_file import CHANGED
from fastinterp.errors import CheckpointError, UnreadableError
from fastinterp.execute.sources import storage
from fastinterp.messages import size as shown_size
from fastinterp.output.receipt import RECEIPT, WeightsFile, hexadecimal, read_receipt
from fastinterp.presence import is_file


def refuse_torn(checkpoint: Checkpoint, sampled: int = 0) -> None:
    """Raises: CheckpointError, saying which file is damaged and what to do, if one of a checkpoint that fastinterp
    wrote is not what its receipt says, as far as that shows at little cost; StorageError, if one cannot be read.

    sampled  how many regions of 64 MiB are read even if there are no holes, of different files
    """
    for part in checkpoint.parts:
        own = part.checkpoint
        if stated_checksum(own.metadata) is None:
            continue
        starts: dict[int, int] = {}
        for entry in own.tensors.values():
            starts[entry.file] = min(entry.start, starts.get(entry.file, entry.start))
        receipt = _weights_of(checkpoint.root, own.root)
        for i, start in sorted(starts.items()):
            path = own.files[i]
            if remote.find(path) is not None:  # nothing of it was written here
                continue
            refuse_torn_file(path, start, receipt.get(os.path.relpath(path, checkpoint.root)), checkpoint, sampled > 0)
            sampled -= 1


def _weights_of(root: Path, part: Path) -> Mapping[str, WeightsFile]:
    """The files of weights that the receipt of a folder lists; none, if there is no receipt that can be read."""
    for folder in dict.fromkeys((root, part)):
        if is_file(folder / RECEIPT):
            try:
                return read_receipt(str(folder / RECEIPT)).weights
            except UnreadableError:
                raise
            except CheckpointError:
                return {}
    return {}


def refuse_torn_file(
    path: Path, start: int, receipt: WeightsFile | None, checkpoint: Checkpoint, sampled: bool
) -> None:  # fmt: skip
    """start: of its data section. receipt: of this file, if there is one; else the checksum in its header counts."""
    with storage(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(fd).st_size
            holes = list(holes_in(fd, start, size))
            if not holes and not sampled:
                return
            if receipt is not None and receipt.data_start == start and receipt.size == size:
                first = start // REGION_BYTES
                numbers = sorted(
                    {r for begin, end in holes for r in range(begin // REGION_BYTES, -(-end // REGION_BYTES))}
                )
                numbers = numbers or [_chosen(first, -(-size // REGION_BYTES), path.name)]
                for number in numbers:
                    begin, end = max(start, number * REGION_BYTES), min(size, (number + 1) * REGION_BYTES)
                    if begin < end and hexadecimal(sum(checksum(fd, begin, end))) != receipt.regions[number - first]:
                        raise _torn(path, holes, begin, end, checkpoint)
                return
            if not holes and size > REGION_BYTES:
                return  # it is one number for the whole file, which is not read unless there is a reason
            stated = stated_checksum(read_header(path, 0).metadata)
            if stated is not None and sum(checksum(fd, start, size)) % 2**64 != stated:
                raise _torn(path, holes, start, size, checkpoint)
        except ValueError:
            raise UnreadableError(CHANGED, file=str(path)) from None
        finally:
            os.close(fd)


def holes_in(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of the parts of a file that have no place on the disk; none where the system cannot tell."""
    at = start
    while at < end:
        try:
            begin = os.lseek(fd, at, os.SEEK_HOLE)
        except OSError:
            return
        if begin >= end:
            return
        try:
            at = os.lseek(fd, begin, os.SEEK_DATA)
        except OSError:  # nothing but the hole is left
            at = end
        yield begin, min(at, end)


def _chosen(first: int, end: int, name: str) -> int:
    """One of the regions, the same each time."""
    import binascii

    return first + binascii.crc32(name.encode()) % max(1, end - first)


def _torn(path: Path, holes: list[tuple[int, int]], begin: int, end: int, checkpoint: Checkpoint) -> CheckpointError:
    missing = sum(b - a for a, b in holes)
    if missing:
        what = (
            f"{shown_size(missing)} of its data were never written, from byte {holes[0][0]} on: the machine stopped "
            "before they were on the disk"
        )
    else:
        what = f"its data is not what was written: bytes {begin} to {end} have another checksum than the receipt says"
    root, new = checkpoint.name, "NEW" if checkpoint.whole_folder else f"NEW{path.suffix}"
    if checkpoint.adapter is not None:  # it has no receipt
        what = what.replace("the receipt says", "its header says")
        return CheckpointError(f"{what}. Copy it again, or make it again as it was made", file=str(path))
    return CheckpointError(
        f"{what}. Copy it again, or make it again: `fastinterp replay {shell_word(root)} -o {new}`; "
        f"`fastinterp verify {shell_word(root)}` tells which tensors of {quote(path.name)} differ",
        file=str(path),
    )
