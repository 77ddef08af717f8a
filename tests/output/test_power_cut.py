"""The machine stops in the middle of a run with --durable, or of one that replaces an older output.

After it starts again, readers find the old or the new checkpoint, or are refused; the next run ends with the new one.
Once as a model of what file systems promise, and once on ext4, whose device is cut off.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import fastinterp
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.checkpoint.regular_file import fsync
from fastinterp.errors import CheckpointError
from fastinterp.output.folder import OutFolder
from tests.output.test_kills import KINDS, Kind, again, expected, loaded, model, opened, pipeline
from tests.support.crashes import Crashes
from tests.support.kills import die, killed
from tests.support.models import save
from tests.support.written import GB, checkpoint, tree, write

OLD = bytes(16)
NEW = b"\1" * 16


def found_in(out: Path) -> set[bytes] | None:
    """The different contents of the tensors; None, if it is refused."""
    try:
        found = open_checkpoint(str(out))
    except CheckpointError:
        return None
    return {found.files[e.file].read_bytes()[e.start : e.start + e.nbytes] for e in found.tensors.values()}


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False], ids=["names in order", "any names"])
@pytest.mark.parametrize(
    ("old", "new"), [(None, GB), (None, 16), (16, 16), (GB, GB), (16, GB), (GB, 16), ("file", "file"), (None, "file")]
)
def test_what_the_disk_may_hold(tmp_path, monkeypatch, old, new, ordered):
    """Every state of the model, sampled: each call, eight times."""

    def run(root: Path) -> None:
        path = root / "m.safetensors" if new == "file" else root / "out"
        with OutFolder(path, [], force=old is not None, durable=old is None, merge="m") as out:
            if not out.finished and new == "file":
                source = checkpoint(tmp_path / "one") / "model.safetensors"
                out.temp("").write_bytes(source.read_bytes()[:-48] + NEW * 3)
                out.commit()
            elif not out.finished:
                write(out, limit=int(new))

    root = tmp_path / "disk"
    root.mkdir()
    if old == "file":
        shutil.copy(checkpoint(tmp_path / "one") / "model.safetensors", root / "m.safetensors")
    elif old:
        checkpoint(root / "out", limit=old)
    recorded = Crashes(root)
    with monkeypatch.context() as patch:
        recorded.start(patch)
        run(root)
    whole = tree(root)
    draw = random.Random(1)
    out = "m.safetensors" if new == "file" else "out"
    outcomes = []
    boots = iter(range(10**9))
    monkeypatch.setattr("fastinterp.output.journal.boot", lambda: str(next(boots)))
    monkeypatch.setattr("fastinterp.output.finish.boot", lambda: str(next(boots)))
    for count in range(len(recorded.events) + 1):
        for attempt in range(8):
            to = tmp_path / f"{count}-{attempt}"
            recorded.after(count, to, draw, ordered=ordered)
            data = found_in(to / out)
            assert data in (None, {OLD}, {NEW}), (count, recorded.events[:count])
            outcomes.append(data)
            if tree(to) != whole or old is not None:
                run(to)
            assert tree(to) == whole, (count, recorded.events[:count])
            shutil.rmtree(to)
    assert outcomes[-1] == {NEW} and ({OLD} in outcomes) == (old is not None) and (None in outcomes) == (old != "file")


# ---- ext4 -----------------------------------------------------------------------------------------------------------

SHUTDOWN = 0x8004587D  # FS_IOC_SHUTDOWN
NO_FLUSH = 2  # neither data nor the file system's journal


class Disk:
    """A file system of 32 MB that can be cut off."""

    def __init__(self, folder: Path):
        self.image, self.at = folder / "image", folder / "disk"
        self.at.mkdir()
        with open(self.image, "wb") as stream:
            stream.truncate(32 << 20)
        self._do("mkfs.ext4", "-q", "-F", self.image)
        self.mount()

    def _do(self, *command: object) -> None:
        subprocess.run([str(part) for part in command], check=True, capture_output=True)

    def mount(self) -> None:
        self._do("mount", "-o", "loop", self.image, self.at)

    def unmount(self) -> None:
        self._do("umount", self.at)

    def cut(self) -> None:
        fd = os.open(self.at, os.O_RDONLY)
        fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", NO_FLUSH))
        os.close(fd)


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk]:
    try:
        made = Disk(tmp_path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"this machine mounts no file systems: {error}")
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", str(made.at)], check=True)  # also if a failed test has files open


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    ["durable", "over shards by the same", "over one by shards", "over a file", "over a pipeline", "over several"],
)
def test_disk_that_is_cut_off(disk, tmp_path, name, monkeypatch):
    kind: Kind = KINDS[name]
    models = tmp_path / "models"
    model(models / "a", 1, 0)
    model(models / "b", 1, 0.5)
    pipeline(models / "pa", 0)
    pipeline(models / "pb", 0.5)
    whole, states = expected(kind, models, tmp_path / "whole")
    folder, seen = disk.at / "f", set()
    for at in range(1, 999):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind.before(models, folder)
        os.sync()
        ended = not _cut(partial(kind.run, models, folder), at, disk)
        if ended:
            disk.cut()  # --durable has said that it is there
        disk.unmount()
        disk.mount()
        with monkeypatch.context() as patch:
            for module in ("journal", "finish"):
                patch.setattr(f"fastinterp.output.{module}.boot", lambda: "another")
            for out, (old, new, _) in zip(kind.outs, states, strict=True):
                ours, theirs = opened(folder / out), loaded(folder / out)
                assert theirs in (old, new, None) and ours in (theirs, None), (at, out)
                seen.add("nothing" if theirs is None else "new" if theirs == new else "old")
            if ended:
                assert tree(folder) == whole
                break
            again(kind, models, folder, whole)
            assert tree(folder) == whole, at
    assert ended and "new" in seen and ("old" in seen) == name.startswith("over")


def _cut(action: Callable[[], object], at: int, disk: Disk) -> bool:
    """Run an action, and cut the disk off at its call number `at`. False, if it ended before."""

    def cut() -> None:
        disk.cut()
        die()

    return killed(action, at, die=cut)


@pytest.mark.slow
def test_torn_output_is_evident(disk, tmp_path):
    """Without --durable the disk may hold names without data after success. Then inspect or verify say so, and the same
    command with --force makes it whole.
    """
    models, draw = tmp_path / "models", random.Random(0)
    for name in "ab":
        rng = np.random.default_rng(ord(name))
        save(models / name, {f"layer.{k}.weight": rng.random((1 << 16,)).astype("f4") for k in range(16)})
    merge = partial(
        fastinterp.interpolate, models / "a", models / "b", 0.5, disk.at / "out", device="cpu", max_shard_size="256KiB"
    )
    outcomes = []
    for attempt in range(8):
        merge(force=True)
        right = tree(disk.at / "out")
        shutil.rmtree(disk.at / "out")
        os.sync()
        merge()
        files = sorted(path for path in (disk.at / "out").iterdir() if path.is_file())
        for path in draw.sample(files, attempt * len(files) // 8):  # what the system happens to write, names too
            fsync(path)
        disk.cut()
        disk.unmount()
        disk.mount()
        if not (disk.at / "out").exists():
            outcomes.append("nothing")
        elif tree(disk.at / "out") == right:
            outcomes.append("whole")
        else:
            outcomes.append("torn")
            with suppress(CheckpointError):
                open_checkpoint(str(disk.at / "out"))
                assert not fastinterp.verify(disk.at / "out").ok
        merge(force=True)
        assert tree(disk.at / "out") == right
    assert "torn" in outcomes
