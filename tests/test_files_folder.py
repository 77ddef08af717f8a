"""The output folder: all or nothing, also when killed; --force leaves no mixture and takes nothing unrelated."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastinterp.errors import CheckpointError, OutputError
from fastinterp.files.checkpoint import open_checkpoint
from fastinterp.files.folder import OutFolder
from tests.written import GB, checkpoint, tree, write


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("limit", [GB, 16])
def test_commit(tmp_path, durable, limit):
    """All files under their names, nothing temporary left, missing parents made."""
    folder = tmp_path / "new" / "deep" / "out"
    with OutFolder(folder, [], durable=durable, needed=1000) as out:
        write(out, limit=limit)
    assert sorted(open_checkpoint(str(folder)).tensors) == ["a", "b", "c"]
    expected = {"config.json", "model.safetensors"} if limit == GB else {
        "config.json", "model.safetensors.index.json", *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    }  # fmt: skip
    assert set(tree(folder)) == expected and out.removed == ()


def test_umask_decides_the_mode(tmp_path):
    old = os.umask(0o027)
    try:
        with OutFolder(tmp_path / "out", []) as out:
            write(out)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out" / "model.safetensors").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exception_leaves_nothing(tmp_path, error):
    """Neither files nor the folders that were made for them."""
    with pytest.raises(error), OutFolder(tmp_path / "new" / "out", []) as out:
        out.temp("model.safetensors").write_bytes(b"half")
        out.write("config.json", b"{}")
        raise error
    assert tree(tmp_path) == {}


def test_no_commit_leaves_what_was_there(tmp_path):
    """Forgetting to commit, or failing with --force over an old checkpoint, changes nothing."""
    before = tree(checkpoint(tmp_path / "out", limit=16))
    with OutFolder(tmp_path / "out", [], force=True) as out:
        out.temp("model.safetensors").write_bytes(b"half")
    assert tree(tmp_path / "out") == before


def test_failing_rename_leaves_nothing(tmp_path, monkeypatch):
    """If the third rename fails, the first two are taken back."""
    real, calls = os.replace, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 3:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr("fastinterp.files.folder.os.replace", failing)
    with pytest.raises(OutputError, match="the output cannot be finished: Input/output error"):  # noqa: SIM117
        with OutFolder(tmp_path / "out", []) as out:
            write(out, limit=16)
    assert tree(tmp_path) == {}


STEPS = 14  # more renames and removals than any case below needs

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from tests.written import write
from fastinterp.files import folder

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

    The next run finishes over what is left, without --force if there was nothing before.
    """
    folders = [tmp_path / str(after) for after in range(STEPS)]
    if names:
        for folder in folders:
            checkpoint(folder, OLD[names], old)
    arguments = [str(new), "2", str(Path(__file__).parents[1]), *map(str, folders)]
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
        with OutFolder(folder, [], force=bool(names) or after > 0) as out:
            write(out)
        assert not [n for n in tree(folder) if "partial" in n]
        assert sorted(open_checkpoint(str(folder)).tensors) == ["a", "b", "c"]
    assert outcomes[0] == ("old" if names else "nothing") and "nothing" in outcomes and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "nothing", "new"].index)


def test_order_of_the_finish(tmp_path, monkeypatch):
    """The old index dies first, then the old shards; small files come before the new shards, the new index is last."""
    folder = checkpoint(tmp_path / "out", ["a", "b", "c"], 16)
    log = []

    def logged(kind):
        real = getattr(os, kind)

        def call(*args):
            log.append((kind, Path(args[-1]).name))
            real(*args)

        return call

    for kind in ("replace", "unlink"):
        monkeypatch.setattr(f"fastinterp.files.folder.os.{kind}", logged(kind))
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    with OutFolder(folder, [], force=True) as out:
        write(out, limit=16)
    index = "model.safetensors.index.json"
    assert log[:-1] == [
        *(("unlink", n) for n in (index, *shards)),
        *(("replace", n) for n in ("config.json", *shards, index)),
    ]


def test_planted_temporary_is_not_opened(tmp_path, monkeypatch):
    """Who guesses a temporary name and puts a link there does not get another file overwritten."""
    monkeypatch.setattr("fastinterp.files.folder.os.urandom", bytes)
    (tmp_path / "precious").write_text("precious")
    with OutFolder(tmp_path / "out", []) as out:
        ending = out.temp("x").name.removeprefix(".x")
        (tmp_path / "out" / f".config.json{ending}").symlink_to(tmp_path / "precious")
        with pytest.raises(OutputError, match="the folder cannot be written to: File exists"):
            out.write("config.json", b"{}")
    assert (tmp_path / "precious").read_text() == "precious"


def test_force_over_more_shards_leaves_no_stale_one(tmp_path):
    """Old index, old shards, old chat template go and are reported; what belongs to the user stays."""
    folder = checkpoint(tmp_path / "out", [f"t{i}" for i in range(5)], 16)
    for name in ("chat_template.jinja", "notes.txt", "training_args.bin"):
        (folder / name).write_text("old")
    with OutFolder(folder, [], force=True) as out:
        write(out, limit=16)
    assert set(tree(folder)) == {
        "config.json", "model.safetensors.index.json", "notes.txt", "training_args.bin",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }  # fmt: skip
    assert sorted(open_checkpoint(str(folder)).tensors) == ["a", "b", "c"]
    assert out.removed == (*(f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)), "chat_template.jinja")


def test_force_over_pickled_shards(tmp_path):
    """Pickles go only if an index there names them; names in it that are not weights, or elsewhere, are left alone."""
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "safe.bin").touch()
    for name in ("pytorch_model-00001-of-00001.bin", "other.bin", "notes.txt"):
        (folder / name).touch()
    targets = ["pytorch_model-00001-of-00001.bin", "notes.txt", "../safe.bin", "gone.bin", 5]
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": dict(enumerate(targets))}))
    with OutFolder(folder, [], force=True) as out:
        write(out)
    assert set(tree(folder)) == {"config.json", "model.safetensors", "other.bin", "notes.txt"}
    assert (tmp_path / "safe.bin").exists()


def test_force_over_a_damaged_index(tmp_path):
    folder = checkpoint(tmp_path / "out", limit=16)
    (folder / "model.safetensors.index.json").write_text("{")
    with OutFolder(folder, [], force=True) as out:
        write(out)
    assert set(tree(folder)) == {"config.json", "model.safetensors"}


def test_force_does_not_remove_unrelated_weights(tmp_path):
    """A folder full of single-file models must not lose them to a --force."""
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("cat.safetensors", "dog.safetensors"):
        save_file({"a": np.ones(1, "f4")}, folder / name)
    before = tree(folder)
    with pytest.raises(OutputError, match=r"weights that no index there names: `cat.safetensors`, `dog.safetensors`"):
        OutFolder(folder, [], force=True).__enter__()
    assert tree(folder) == before


def test_failing_write_cleans_up(tmp_path):
    """The system refuses bytes in the middle of a small file (here: a limit on file sizes)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match=r"out: `README\.md` cannot be written: File too large"):  # noqa: SIM117
            with OutFolder(tmp_path / "out", []) as out:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
                out.write("README.md", bytes(2000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(tmp_path) == {}


def test_durable_syncs_before_renaming(tmp_path, monkeypatch):
    """Every file is synced before any gets its name, and the folder before and after the last name."""
    log = []
    names: dict[int, str] = {}

    def note(kind):
        real = getattr(os, kind)

        def call(*args):
            log.append((kind, Path(names.get(args[0], args[0])).name if kind == "fsync" else Path(args[1]).name))
            return real(*args)

        return call

    real_open = os.open

    def opened(path, *args, **options):
        fd = real_open(path, *args, **options)
        names[fd] = os.fspath(path)
        return fd

    for kind in ("fsync", "replace"):
        monkeypatch.setattr(f"fastinterp.files.folder.os.{kind}", note(kind))
    monkeypatch.setattr("fastinterp.files.folder.os.open", opened)
    with OutFolder(tmp_path / "out", [], durable=True) as out:
        write(out)
    kinds = [k for k, _ in log]
    assert kinds == ["fsync", "fsync", "replace", "fsync", "replace", "fsync", "fsync"]
    assert [n for k, n in log if k == "replace"] == ["config.json", "model.safetensors"]
    assert [n for k, n in log if k == "fsync"][2:] == ["out", "out", tmp_path.name]
