"""The output folder: all or nothing, also when killed; --force leaves no mixture and takes nothing unrelated."""

from __future__ import annotations

import json
import os
import resource
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import OutputError
from fastinterp.output.folder import OutFolder
from tests.support.written import GB, checkpoint, tree, write


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

    monkeypatch.setattr("fastinterp.output.folder.os.replace", failing)
    with pytest.raises(OutputError, match="the output cannot be finished: Input/output error"):  # noqa: SIM117
        with OutFolder(tmp_path / "out", []) as out:
            write(out, limit=16)
    assert tree(tmp_path) == {}


def test_planted_temporary_is_not_opened(tmp_path, monkeypatch):
    """Who guesses a temporary name and puts a link there does not get another file overwritten."""
    monkeypatch.setattr("fastinterp.output.folder.os.urandom", bytes)
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
