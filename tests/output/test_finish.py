"""The finish of an output folder: killed, interrupted or failing anywhere, it leaves one whole checkpoint."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, OutputError
from fastinterp.output.folder import OutFolder
from tests.support.written import GB, checkpoint, tree, write

STEPS = 24  # more renames and removals than any case below needs

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from tests.support.written import write
from fastinterp.output import folder as folder

class Os:  # the module's os, whose renames and removals count; after `left` of them the process dies
    def __getattr__(self, name):
        return getattr(os, name)
    def step(self, call, *args):
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        call(*args)
    def replace(self, *args):
        self.step(os.replace, *args)
    def unlink(self, *args):
        self.step(os.unlink, *args)

folder.os = Os()
for path in sys.argv[4:]:
    folder.os.left = int(path.rpartition("/")[2])
    child = os.fork()
    if not child:
        with folder.OutFolder(path, [], force=True) as out:
            write(out, limit=int(sys.argv[1]), value=bytes([int(sys.argv[2])]))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


OLD = {"": [], "abc": ["a", "b", "c"], "abcde": ["a", "b", "c", "d", "e"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "old", "new"),
    [
        ("", 0, 16),
        ("", 0, GB),
        ("abc", 16, 16),
        ("abc", GB, GB),
        ("abcde", 16, GB),
        ("abcde", GB, 16),
        ("abcde", 40, 16),
    ],
)
def test_killed_process_leaves_nothing_that_opens(tmp_path, names, old, new):
    """SIGKILL before any rename or removal: the old checkpoint, the new one in full, or nothing that opens.

    Old files that were moved aside stop the next run, and their names lead back to the old checkpoint. The next run
    finishes over what else is left, without --force if there was nothing before.
    """
    folders = [tmp_path / str(after) for after in range(STEPS)]
    if names:
        for folder in folders:
            checkpoint(folder, OLD[names], old)
    before = tree(folders[0])
    arguments = [str(new), "2", str(Path(__file__).parents[2]), *map(str, folders)]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.split()]
    killed = codes.count(-signal.SIGKILL)
    assert codes == [-signal.SIGKILL] * killed + [0] * (STEPS - killed) and 0 < killed < STEPS
    outcomes = []
    for after, folder in enumerate(folders[:killed]):
        try:
            found = open_checkpoint(str(folder))
        except CheckpointError:
            outcomes.append("nothing")
        else:
            data = {found.files[e.file].read_bytes()[e.start : e.start + e.nbytes] for e in found.tensors.values()}
            assert data in ({bytes(16)}, {b"\2" * 16})
            outcomes.append("old" if data == {bytes(16)} else "new")
            assert sorted(found.tensors) == (OLD[names] if outcomes[-1] == "old" else ["a", "b", "c"])
        if aside := [n for n in tree(folder) if ".old-" in n]:
            stopped(folder, aside)
            if outcomes[-1] == "nothing":
                put_back(folder, aside, before)
            else:
                for name in aside:
                    (folder / name).unlink()
        with OutFolder(folder, [], force=bool(names) or after > 0) as out:
            write(out)
        assert not [n for n in tree(folder) if "partial" in n]
        assert sorted(open_checkpoint(str(folder)).tensors) == ["a", "b", "c"]
    assert outcomes[0] == ("old" if names else "nothing") and "nothing" in outcomes and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "nothing", "new"].index)


def stopped(folder: Path, aside: list[str]) -> None:
    """No run removes old files that another one moved aside, with force or without."""
    held = tree(folder)
    for force in (False, True):
        with pytest.raises(OutputError, match=r"a merge died here while it replaced a checkpoint: `\.") as caught:
            OutFolder(folder, [], force=force).__enter__()
        assert f"`{aside[0]}`" in str(caught.value) and "rename each `.NAME.old-...` to `NAME`" in str(caught.value)
        assert tree(folder) == held


def put_back(folder: Path, aside: list[str], before: dict[str, bytes]) -> None:
    """Do what the refusal says; the folder is then as it was."""
    for name in aside:
        (folder / name).rename(folder / name[1 : name.rindex(".old-")])
    newer = [n for n in tree(folder) if n not in before and not n.startswith(".")]
    assert all(n.endswith((".safetensors", ".index.json")) for n in newer)
    for name in newer:
        (folder / name).unlink()
    assert {n: data for n, data in tree(folder).items() if ".partial-" not in n} == before


class Failing:
    """The module's os, whose renames and removals are counted; those of the numbers `at` fail.

    late   fail after the deed, not before it
    then   what all but the first failure raise
    """

    def __init__(self, error, at: range, late: bool = False, then=None):
        self.error, self.at, self.late, self.then, self.count = error, at, late, then or error, 0

    def __getattr__(self, name):
        return getattr(os, name)

    def step(self, call, *args):
        self.count += 1
        fails = self.count - 1 in self.at
        if self.late or not fails:
            call(*args)
        if fails:
            raise (self.error if self.count - 1 == self.at[0] else self.then)(5, "Input/output error")

    def replace(self, *args):
        self.step(os.replace, *args)

    def unlink(self, *args):
        self.step(os.unlink, *args)


SHARDED_AND_SINGLE = [("abc", 16, 16), ("abc", GB, GB), ("abcde", 16, GB), ("abcde", GB, 16), ("abcde", 40, 16)]


def commit_failing(folder: Path, new: int, failing: Failing, monkeypatch, *, durable: bool = False) -> str | None:
    """What the failure raised over the checkpoint in `folder`, or None."""
    with monkeypatch.context() as patch:
        try:
            with OutFolder(folder, [], force=True, durable=durable) as out:
                patch.setattr("fastinterp.output.folder.os", failing)
                write(out, limit=new)
        except (OutputError, KeyboardInterrupt) as error:
            return str(error)
    return None


@pytest.mark.parametrize(("error", "late"), [(OSError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True)])
@pytest.mark.parametrize(("names", "old", "new"), SHARDED_AND_SINGLE)
def test_failure_in_the_finish_keeps_one_checkpoint(tmp_path, monkeypatch, names, old, new, error, late):
    """An error or an interrupt at any rename or removal: the folder is as it was, or holds the new checkpoint only."""
    outcomes = []
    for at in range(STEPS):
        folder = checkpoint(tmp_path / str(at), OLD[names], old)
        (folder / "README.md").write_text("the user's")
        before = tree(folder)
        raised = commit_failing(folder, new, Failing(error, range(at, at + 1), late), monkeypatch)
        if raised is None:
            break
        if tree(folder) == before:
            outcomes.append("old")
            continue
        outcomes.append("new")
        if error is OSError:  # what could not be removed is named, and stays
            assert "the output is complete, but its finish failed: Input/output error" in raised
            assert "What it replaces is kept: `." in raised or not list(folder.glob("*.old-*"))
            for path in folder.glob(".*"):
                path.unlink()
        found = open_checkpoint(str(folder))
        assert {found.files[e.file].read_bytes()[e.start : e.start + e.nbytes] for e in found.tensors.values()} == {
            b"\1" * 16
        }
        assert sorted(found.tensors) == ["a", "b", "c"] and not list(folder.glob(".*"))
    assert raised is None and outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"old", "new"}


@pytest.mark.parametrize(("names", "old", "new"), SHARDED_AND_SINGLE)
def test_failing_disk_loses_no_old_file(tmp_path, monkeypatch, names, old, new):
    """From some rename on nothing works, taking back neither: the old files are there, aside, and the error says so."""
    kept = 0
    for at in range(STEPS):
        folder = checkpoint(tmp_path / str(at), OLD[names], old)
        before = tree(folder)
        raised = commit_failing(folder, new, Failing(OSError, range(at, STEPS * 9)), monkeypatch)
        if raised is None:
            break
        aside = [n for n in tree(folder) if ".old-" in n]
        kept += bool(aside)
        if aside:
            stopped(folder, aside)
            told = re.findall(r"`(\.[^.`]+\.[^`]*\.old-\d[^`]*)`", raised)
            assert len(told) == min(3, len(aside)) and set(told) <= set(aside) and "What it replaces is kept" in raised
        if "the output cannot be finished" in raised:
            put_back(folder, aside, before)
    assert raised is None and kept


@pytest.mark.slow
@pytest.mark.parametrize(("error", "renamed"), [(KeyboardInterrupt, True), (OSError, False)])
def test_interrupt_while_taking_back(tmp_path, monkeypatch, error, renamed):
    """Interrupted while a failed finish is taken back: no old file is lost, and no part of them opens.

    renamed: the old shards have names of which only their index says how many there are.
    """
    for first in range(10):
        for second in range(first + 1, first + 20):
            folder = checkpoint(tmp_path / f"{first}-{second}", limit=16)
            index = folder / "model.safetensors.index.json"
            for number in "123" * renamed:
                (folder / f"model-0000{number}-of-00003.safetensors").rename(folder / f"{number}.safetensors")
            if renamed:
                index.write_text(re.sub(r"model-0000(.)-of-00003", r"\1", index.read_text()))
            before = tree(folder)
            failing = Failing(error, range(first, second + 1, second - first), then=KeyboardInterrupt)
            assert commit_failing(folder, 16, failing, monkeypatch) is not None
            with suppress(CheckpointError):  # the old one, or all shards of the new one, which need no index
                found = open_checkpoint(str(folder))
                assert sorted(found.tensors) == ["a", "b", "c"]
                assert len({p.name.startswith("model-") for p in found.files}) == 1
            put_back(folder, [n for n in tree(folder) if ".old-" in n], before)


def test_order_of_the_finish(tmp_path, monkeypatch):
    """Old shards move aside before their index, the new index comes last, and only then the old files are removed."""
    folder = checkpoint(tmp_path / "out", ["a", "b", "c"], 16)
    log = []

    def logged(kind):
        real = getattr(os, kind)

        def call(*args):
            log.append((kind, Path(args[-1]).name))
            real(*args)

        return call

    for kind in ("replace", "unlink"):
        monkeypatch.setattr(f"fastinterp.output.folder.os.{kind}", logged(kind))
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with OutFolder(folder, [], force=True) as out:
        write(out, limit=16)
    index = "model.safetensors.index.json"
    aside = [out._aside[n].name for n in (*shards, index, "config.json")]
    assert log[:-1] == [
        *(("replace", n) for n in (*aside, "config.json", *shards, index)),
        *(("unlink", n) for n in aside),
    ]


def test_durable_syncs_before_renaming(tmp_path, monkeypatch):
    """Every file is synced before any gets its name, and the folder before and after the last name."""
    log = []
    names: dict[int, str] = {}

    def note(kind):
        real = getattr(os, kind)

        def call(*args):
            log.append((kind, Path(names.get(args[0], args[0])).name if kind == "fsync" else Path(args[-1]).name))
            return real(*args)

        return call

    real_open = os.open

    def opened(path, *args, **options):
        fd = real_open(path, *args, **options)
        names[fd] = os.fspath(path)
        return fd

    for kind in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(f"fastinterp.output.folder.os.{kind}", note(kind))
    monkeypatch.setattr("fastinterp.output.folder.os.open", opened)
    with OutFolder(tmp_path / "out", [], durable=True) as out:
        write(out)
    kinds = [k for k, _ in log]
    assert kinds == ["fsync", "fsync", "replace", "fsync", "replace", "unlink", "fsync", "fsync"]
    assert [n for k, n in log if k == "replace"] == ["config.json", "model.safetensors"]
    assert [n for k, n in log if k == "fsync"][2:] == ["out", "out", tmp_path.name]
    # Over an old checkpoint: the folder also before the first new name, and before the old files are removed.
    log.clear()
    with OutFolder(tmp_path / "out", [], durable=True, force=True) as out:
        write(out)
    assert [k for k, _ in log] == [
        "fsync", "fsync", "replace", "replace", "fsync", "replace", "fsync", "replace", "fsync", "unlink", "unlink",
        "unlink", "fsync",
    ]  # fmt: skip


def test_failing_sync_after_the_last_name_keeps_both(tmp_path, monkeypatch):
    """The new names may not be on the disk yet, so the old files stay."""
    folder = checkpoint(tmp_path / "out", limit=16)
    fail = iter([*[False] * 7, True, *[False] * 9])  # 5 files, the folder twice, then after the last name
    real = os.fsync

    def fsync(fd):
        if next(fail):
            raise OSError(5, "Input/output error")
        real(fd)

    monkeypatch.setattr("fastinterp.output.folder.os.fsync", fsync)
    with (
        pytest.raises(OutputError, match=r"the output is complete, but its finish failed: Input/output error\. What"),
        OutFolder(folder, [], durable=True, force=True) as out,
    ):
        write(out, limit=16)
    aside = [n for n in tree(folder) if ".old-" in n]
    assert len(aside) == 5 and len(open_checkpoint(str(folder)).tensors) == 3
    stopped(folder, aside)
