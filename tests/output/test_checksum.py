"""Checksums of files: the native ones are those of the definition, whatever the order and the cuts of writes."""

from __future__ import annotations

import os
import random
import threading
from itertools import pairwise

import pytest
import xxhash

from fastinterp import _C
from fastinterp._C import FileChecksum, checksum
from fastinterp.checkpoint.checksum import KEY, UNKNOWN, checksum_text, stated_checksum
from fastinterp.reference.checksum import CELL_BYTES, REGION_BYTES, file_checksum, region_checksums
from tests.support.backends import usable

ISAS = usable()


def oracle(content: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(content, seed=seed)


def expected(content: bytes, start: int) -> list[int]:
    return region_checksums(content, start, oracle)


@pytest.fixture
def file(tmp_path):
    """A file that is filled with bytes, open for reading and writing."""
    opened: list[int] = []

    def make(content: bytes) -> int:
        path = tmp_path / f"{len(opened)}.bin"
        path.write_bytes(content)
        opened.append(os.open(path, os.O_RDWR))
        return opened[-1]

    yield make
    for fd in opened:
        os.close(fd)


def test_constants_are_those_of_the_definition():
    assert (_C.CELL_BYTES, _C.REGION_BYTES) == (CELL_BYTES, REGION_BYTES)


@pytest.mark.parametrize("size", [0, 1, 3, 16, 17, 128, 240, 241, 1024, 4097, CELL_BYTES, CELL_BYTES + 1])
def test_xxh3_is_that_of_its_library(size):
    content = random.Random(size).randbytes(size)
    for seed in (0, 1, 2**64 - 1):
        assert _C.xxh3(content, seed) == oracle(content, seed)


SECTIONS = [
    (0, 0), (0, 1), (7, 7), (8, 100), (0, CELL_BYTES), (4096, CELL_BYTES), (4096, CELL_BYTES + 1),
    (CELL_BYTES, 3 * CELL_BYTES), (CELL_BYTES - 1, 5 * CELL_BYTES + 77), (123, 40 * CELL_BYTES + 5),
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("start", "size"), SECTIONS)
def test_checksum_of_a_file_is_that_of_the_definition(file, isa, start, size):
    content = random.Random(start + size).randbytes(size)
    for threads in (1, 3):
        assert checksum(file(content), start, size, threads, isa) == expected(content, start)


@pytest.mark.slow
def test_regions_add_up(file):
    """More than two regions, and each by itself."""
    start, size = 4096, 2 * REGION_BYTES + 3 * CELL_BYTES + 11
    content = random.Random(0).randbytes(size)
    fd, every = file(content), expected(content, start)
    assert len(every) == 3
    assert checksum(fd, start, size, 2) == every
    edges = [start, REGION_BYTES, 2 * REGION_BYTES, size]
    assert [checksum(fd, a, b)[0] for a, b in pairwise(edges)] == every
    assert file_checksum(every) == sum(every) % 2**64


def pieces(rng: random.Random, start: int, size: int, most: int) -> list[tuple[int, int]]:
    edges, at = [start], start
    while at < size:
        at = min(size, at + rng.randint(1, most))
        edges.append(at)
    return list(pairwise(edges))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("most", [3000, CELL_BYTES, 5 * CELL_BYTES])
@pytest.mark.parametrize("order", ["in order", "backwards", "shuffled", "twice", "half"])
def test_order_and_cuts_of_writes_do_not_matter(file, isa, most, order):
    start, size = 4096, 30 * CELL_BYTES + 333
    rng = random.Random(most)
    content = rng.randbytes(size)
    written = pieces(rng, start, size, most)
    if order == "backwards":
        written.reverse()
    elif order == "shuffled":
        rng.shuffle(written)
    elif order == "twice":
        written = [*written, *pieces(rng, start, size, most)]
    elif order == "half":
        written = written[::2]
    sums = FileChecksum(file(content), start, size, isa)
    for a, b in written:
        sums.add(a, content[a:b])
    assert sums.regions() == expected(content, start)


def test_what_was_hashed_is_not_read_again(file):
    """In order, all is hashed while it is written, however small the writes; the file is not looked at."""
    start, size = 4096, 10 * CELL_BYTES + 5
    content = random.Random(1).randbytes(size)
    sums = FileChecksum(file(bytes(size)), start, size)
    for a, b in pieces(random.Random(2), start, size, 5000):
        sums.add(a, content[a:b])
    assert sums.regions() == expected(content, start)


def test_threads_write_at_several_places(file):
    start, size = 512, 200 * CELL_BYTES + 1
    content = random.Random(3).randbytes(size)
    sums = FileChecksum(file(content), start, size)
    written = pieces(random.Random(4), start, size, 3 * CELL_BYTES)

    def work(number: int) -> None:
        for a, b in written[number::4]:
            sums.add(a, content[a:b])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums.regions(2) == expected(content, start)


def test_any_changed_byte_changes_the_checksum(file):
    start, size = 100, 3 * CELL_BYTES
    content = bytearray(random.Random(5).randbytes(size))
    before = file_checksum(checksum(file(bytes(content)), start, size))
    for at in (start, start + 1, CELL_BYTES - 1, CELL_BYTES, 2 * CELL_BYTES + 777, size - 1):
        content[at] ^= 1
        assert file_checksum(checksum(file(bytes(content)), start, size)) != before, at
        content[at] ^= 1


def test_exchanged_cells_change_the_checksum(file):
    """A cell in the wrong place is noticed, though the sum does not depend on the order: the place is its seed."""
    a, b = (random.Random(i).randbytes(CELL_BYTES) for i in (6, 7))
    assert checksum(file(a + b), 0, 2 * CELL_BYTES) != checksum(file(b + a), 0, 2 * CELL_BYTES)
    zeros = bytes(2 * CELL_BYTES)
    assert checksum(file(zeros), 0, 2 * CELL_BYTES) != [0]


def test_progress_is_taken_over(file):
    """By another process: what the first one hashed is not read, and can be compared with the file."""
    start, size = 4096, 9 * CELL_BYTES
    content = random.Random(8).randbytes(size)
    fd = file(content)
    first = FileChecksum(fd, start, size)
    first.add(2 * CELL_BYTES, content[2 * CELL_BYTES : 6 * CELL_BYTES + 10])
    total, hashed = first.progress(0)
    assert hashed[:2] == bytes([0b111100, 0]) and len(hashed) == REGION_BYTES // CELL_BYTES // 8
    second = FileChecksum(fd, start, size)
    second.restore(0, total, hashed)
    assert second.matches(0) and second.progress(0) == (total, hashed)
    os.pwrite(fd, b"\0\0\0\0", 6 * CELL_BYTES)  # not hashed yet
    assert second.matches(0)
    os.pwrite(fd, b"\0\0\0\0", 6 * CELL_BYTES - 4)
    assert not second.matches(0)
    os.pwrite(fd, content, 0)
    assert second.regions() == expected(content, start)


def test_errors(file):
    fd = file(bytes(10))
    with pytest.raises(ValueError, match="ends before"):
        checksum(fd, 0, 11)
    with pytest.raises(ValueError, match="section"):
        checksum(fd, 5, 4)
    with pytest.raises(OSError, match="Bad file descriptor"):
        checksum(-1, 0, 4)
    sums = FileChecksum(fd, 2, 8)
    for offset, content in ((1, b"x"), (2, b"1234567"), (-1, b"x")):
        with pytest.raises(ValueError, match="outside"):
            sums.add(offset, content)
    for region in (-1, 1):
        with pytest.raises(ValueError, match="outside"):
            sums.progress(region)
    with pytest.raises(ValueError, match="bit for each"):
        sums.restore(0, 1, b"x")


def test_stated_checksum():
    assert stated_checksum({KEY: checksum_text(0xABC)}) == 0xABC
    assert len(checksum_text(2**64 - 1)) == len(UNKNOWN)
    for text in (UNKNOWN, "", "abc", checksum_text(1).upper(), checksum_text(1) + "\n", "md5:0123456789abcdef"):
        assert stated_checksum({KEY: text}) is None
    assert stated_checksum({}) is None
