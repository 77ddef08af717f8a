"""The journal of an output that is not finished: records, torn ends, and who is alive."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from binascii import crc32
from pathlib import Path

import msgspec
import pytest

from fastinterp.checkpoint.journal_file import (
    ASIDE,
    BEGIN,
    FINISHING,
    PARTIAL,
    PLACED,
    Begin,
    Finishing,
    journal_path,
    line_of,
    state_of,
    temporary,
    temporary_of,
)
from fastinterp.errors import CheckpointError, OutputError
from fastinterp.output.journal import Busy, begin, boot, started, take_over, this_process

ROOT = Path(__file__).parents[2]


class Round(msgspec.Struct, frozen=True):
    number: int
    tensors: dict[str, float]


def test_records_are_read_back(tmp_path):
    path = journal_path(tmp_path)
    own = begin(path, "abc")
    rounds = [Round(k, {f"t{k}\n": 0.1 * k}) for k in range(3)]
    for one in rounds:
        own.append("round", one, sync=True)
    assert own.read("round", Round) == rounds and own.finishing is None and own.notes
    own.close()
    assert path.read_bytes().startswith(b"%08x begin {" % crc32(path.read_bytes().split(b"\n")[0][9:]))
    again = take_over(path)
    assert again is not None and again.read("round", Round) == rounds and again.same_boot
    assert again.begun == own.begun == Begin(again.run, "abc", os.getpid(), started(os.getpid()), boot())
    commit = Finishing(("a\udcff", "b"), ("c",), True)  # a name that is no valid Unicode
    again.append(FINISHING, commit)
    again.close()
    last = take_over(path)
    assert last is not None and last.finishing == commit and last.run == own.run
    last.remove()
    assert not list(tmp_path.iterdir()) and take_over(path) is None


def test_finish_that_is_withdrawn(tmp_path):
    """What the run noted stays."""
    own = begin(journal_path(tmp_path))
    own.append("round", Round(1, {}))
    before = own.path.read_bytes()
    own.append(FINISHING, Finishing(("a",)))
    own.append(PLACED, None)
    assert own.placed and state_of(own.path) == PLACED
    own.withdraw()
    assert (own.finishing, own.read(PLACED, object), own.path.read_bytes()) == (None, [], before)
    own.append("round", Round(2, {}))
    own.close()
    found = take_over(own.path)
    assert found is not None and [r.number for r in found.read("round", Round)] == [1, 2]
    found.remove()


def test_every_torn_end_is_ignored(tmp_path):
    """The journal cut at any byte, or with any byte of its last line changed: the records before it are there, and the
    next one follows them."""
    path = journal_path(tmp_path)
    own = begin(path)
    own.append("round", Round(1, {}))
    kept = path.stat().st_size
    own.append(FINISHING, Finishing(("a",)))
    own.close()
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in range(kept, len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(kept, len(whole))]
    damaged += [whole[:kept] + bytes(100), whole[:kept] + whole[kept + 5 :]]
    for content in damaged:
        path.write_bytes(content)
        assert state_of(path) == BEGIN
        found = take_over(path)
        assert found is not None and found.finishing is None and found.read("round", Round) == [Round(1, {})]
        found.append("round", Round(2, {}))
        found.close()
        found = take_over(path)
        assert found is not None and [r.number for r in found.read("round", Round)] == [1, 2]
        found.close()
    path.write_bytes(whole)
    assert state_of(path) == FINISHING


@pytest.mark.parametrize("content", [b"", b"\n", b"x" * 100, line_of("round", b"{}"), line_of(BEGIN, b"{}")[:-1]])
def test_journal_without_a_begin_says_nothing(tmp_path, content):
    path = journal_path(tmp_path)
    path.write_bytes(content)
    found = take_over(path)
    assert found is not None and (found.run, found.notes, found.finishing) == ("", False, None)
    found.close()
    assert state_of(path) == BEGIN


def test_record_of_another_version_is_refused(tmp_path):
    path = journal_path(tmp_path)
    path.write_bytes(line_of(BEGIN, b'{"run": 5}'))
    with pytest.raises(OutputError, match="has a record `begin` that is not read: Expected `str`, got `int`"):
        take_over(path)


def test_state_is_read_from_the_end_alone(tmp_path):
    """Also where the last line is longer than what is read first, and the journal than memory."""
    path = journal_path(tmp_path)
    assert state_of(path) is None
    names = tuple(f"{'n' * 90}{k}" for k in range(10000))
    last = line_of(FINISHING, msgspec.json.encode(Finishing(names)))
    with open(path, "wb") as stream:
        stream.truncate(1 << 40)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\n" + last)
    assert state_of(path) == FINISHING
    with pytest.raises(OutputError, match="this is no journal"):
        take_over(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        state_of(path)


def test_second_process_is_refused_until_the_first_dies(tmp_path):
    """However it dies: SIGKILL here. Its number, or that of its machine, plays no part."""
    path = journal_path(tmp_path)
    program = "import sys; from pathlib import Path; from fastinterp.output.journal import begin\n"
    program += "j = begin(Path(sys.argv[1])); print(j.run, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        run = process.stdout.readline().strip()
        for force in (False, True):
            with pytest.raises(Busy, match=f"process {process.pid} is writing here: `.fastinterp-journal`"):
                take_over(path, force=force)
        with pytest.raises(Busy, match="another process begins to write"):
            begin(path)
        assert path.exists()
        process.kill()
    found = take_over(path)
    assert found is not None and found.run == run
    found.remove()


def test_threads_of_one_process_are_told_apart(tmp_path):
    own = begin(journal_path(tmp_path))
    with pytest.raises(Busy, match=f"process {os.getpid()} is writing here"):
        take_over(own.path)
    own.close()
    found = take_over(own.path)
    assert found is not None
    found.remove()


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_start_of_the_process_tells(tmp_path, monkeypatch):
    monkeypatch.setattr("fastinterp.output.journal.fcntl.flock", no_locks)
    path = journal_path(tmp_path)
    own = begin(path)
    with pytest.raises(Busy, match=f"process {os.getpid()} is writing here"):
        take_over(path)
    own.close()
    mine = this_process(own.run)
    for pid, start, boot_id, dead in (
        (os.getpid(), mine.started + 1, mine.boot, True),  # a restarted container gives the same numbers
        (os.getppid(), started(os.getppid()), mine.boot, False),
        (2**22 + 5, 77, mine.boot, True),
        (os.getppid(), 0, mine.boot, False),  # a system that does not tell when processes began
        (os.getpid(), mine.started, "another", False),
    ):
        path.write_bytes(line_of(BEGIN, msgspec.json.encode(Begin("0" * 12, "", pid, start, boot_id))))
        if dead:
            found = take_over(path)
        else:
            with pytest.raises(Busy):
                take_over(path)
            if boot_id == mine.boot:
                continue
            found = take_over(path, force=True)
        assert found is not None
        found.close()


def test_failing_append_leaves_whole_records(tmp_path, monkeypatch):
    own = begin(journal_path(tmp_path))
    before = own.path.read_bytes()
    real, calls = os.write, []

    def write(fd, data):
        calls.append(1)
        if len(calls) % 2:
            return real(fd, bytes(data)[:9])
        if len(calls) == 4:
            return 0
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastinterp.output.journal.os.write", write)
    for why in ("No space left on device", "the system wrote 0 bytes"):
        with pytest.raises(OutputError, match=f"the journal cannot be written: {why}"):
            own.append("round", Round(1, {}))
        assert own.path.read_bytes() == before and not own.notes
    own.remove()


def test_temporary_names():
    folder = Path("/x")
    long = "n" * 240 + ".safetensors"
    for name in ("model.safetensors", "unet/config.json", long, "ü" * 125):
        for what in (PARTIAL, ASIDE):
            path = temporary(folder, name, what, "0123456789ab")
            assert (temporary_of(str(path)) or ())[1:] == (what, "0123456789ab") and len(os.fsencode(path.name)) <= 255
            assert path.parent == (folder / name).parent
    assert temporary(folder, "a", PARTIAL, "0123456789ab").name == ".a.partial-0123456789ab"
    assert temporary_of("a.partial-0123456789ab") is None and temporary_of(".a.partial-0123456789") is None
    assert journal_path(folder).name == ".fastinterp-journal"
    assert journal_path(folder, "m.safetensors").name == ".m.safetensors.fastinterp-journal"
    assert journal_path(folder, long).name != journal_path(folder, long.replace("n", "m")).name
