"""The output folder: what it refuses, before it has changed anything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastinterp.checkpoint.journal_file import journal_path
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, OutputError
from fastinterp.output.earlier import held
from fastinterp.output.folder import OutFolder
from fastinterp.output.journal import begin
from tests.support.written import checkpoint, tree, write


def refused(folder: object, inputs=(), **options) -> str:
    """The message of a refusal, which must not have changed anything, nor left a new folder."""
    around = Path(str(folder))
    while not around.is_dir():
        around = around.parent
    before = tree(around)
    with pytest.raises(OutputError) as caught:
        OutFolder(str(folder), inputs, **options).__enter__()
    assert tree(around) == before
    return str(caught.value)


def test_existing_output(tmp_path):
    """An empty folder is fine; a full one needs --force; a file is never replaced."""
    (tmp_path / "empty").mkdir()
    with OutFolder(tmp_path / "empty", []) as out:
        write(out)
    message = refused(tmp_path / "empty")
    assert "the folder is not empty: `config.json`, `model.safetensors`. Add --force" in message
    (tmp_path / "file").write_text("x")
    assert "this is not a folder, and it will not be replaced" in refused(tmp_path / "file", force=True)
    (tmp_path / "link").symlink_to("nowhere")
    assert "this is not a folder" in refused(tmp_path / "link", force=True)
    assert "the folder cannot be created: Not a directory" in refused(tmp_path / "file" / "out")


def test_inputs_are_never_touched(tmp_path):
    """Output equal to, above, inside, or linked to an input folder: refused, even with force."""
    model = checkpoint(tmp_path / "models" / "base")
    inputs = open_checkpoint(str(model)).inputs
    (tmp_path / "alias").symlink_to(model)
    (tmp_path / "models" / "new").symlink_to(model / "sub")
    (model / "sub").mkdir()
    for folder, expected in (
        (model, f"the output is the input folder `{model}`"),
        (f"{model}/../base/.", "the output is the input folder"),
        (tmp_path / "alias", "the output is the input folder"),
        (model / "out" / "deep", "the output lies inside the input folder"),
        (tmp_path / "alias" / "out", "the output lies inside the input folder"),
        (tmp_path / "models" / "new", "the output lies inside the input folder"),
        (tmp_path / "models", f"the output folder holds the input `{model}`"),
        (tmp_path, "the output folder holds the input"),
    ):
        message = refused(folder, inputs, force=True)
        assert expected in message and "inputs are never overwritten, whatever the options" in message
    with OutFolder(tmp_path / "models" / "out", inputs) as out:
        write(out)
    assert open_checkpoint(str(tmp_path / "models" / "out")).nbytes == 48


def test_single_file_inputs(tmp_path):
    """Beside single files an output folder is fine; their own folder is not, nor one that links to them."""
    save_file({"a": np.ones(1, "f4")}, tmp_path / "a.safetensors")
    inputs = open_checkpoint(str(tmp_path / "a.safetensors")).inputs
    assert "the output folder holds the input" in refused(tmp_path, inputs, force=True)
    hard, soft = tmp_path / "hard", tmp_path / "soft"
    hard.mkdir(), soft.mkdir()
    os.link(tmp_path / "a.safetensors", hard / "model.safetensors")
    (soft / "model.safetensors").symlink_to(tmp_path / "a.safetensors")
    for folder in (hard, soft):
        message = refused(folder, inputs, force=True)
        assert f"`model.safetensors` there is the same file as the input `{tmp_path}/a.safetensors`" in message
    with OutFolder(tmp_path / "out", inputs) as out:
        write(out)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_output_folder_may_be_a_link(tmp_path):
    """A link to a folder on another disk is followed; links inside the folder are replaced, never written through."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "disk" / "config.json").symlink_to(tmp_path / "precious")
    (tmp_path / "out").symlink_to("disk")
    with OutFolder(tmp_path / "out", [], force=True) as out:
        write(out)
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "disk" / "config.json").read_text() == "{}" and (tmp_path / "out").is_symlink()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", "the name of the output folder is empty. Give the name of a new folder"),
        ("x" * 300, "this path cannot be used: File name too long"),
        ("new/" + "x" * 300, "the folder cannot be created: File name too long"),
        ("x" * 300 + ".safetensors", "this path cannot be used: File name too long"),
        ("new/" + "x" * 300 + ".safetensors", "this path cannot be used: File name too long"),
        ("/".join(["x" * 200] * 25), "this path cannot be used: File name too long"),
        ("a\0b", "this path cannot be used: embedded null byte"),
        ("a\ud800b", "this path cannot be used: 'utf-8' codec can't encode character"),
    ],
    ids=["empty", "long", "long below", "long file", "long file below", "long path", "NUL", "not Unicode"],
)
def test_names_that_no_folder_can_have(tmp_path, monkeypatch, name, expected):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError) as caught:
        OutFolder(name, [], force=True).__enter__()
    assert expected in str(caught.value) and "\0" not in str(caught.value)
    assert tree(tmp_path) == {}


def test_unreadable_sidecar_is_not_blamed_on_the_output(tmp_path):
    """A file to copy that is gone, or has become a pipe, is named itself."""
    source = tmp_path / "tokenizer.json"
    for expected in ("the file does not exist", "this is not a regular file"):
        with pytest.raises(CheckpointError) as caught, OutFolder(tmp_path / "out", []) as out:
            out.write("tokenizer.json", source)
        assert str(caught.value) == f"{source}: {expected}"
        if not source.exists():
            os.mkfifo(source)
    source.unlink()
    assert tree(tmp_path) == {}


def test_odd_old_index_is_replaced(tmp_path):
    """A pipe called like an index does not hang a --force, and gigabytes are not read."""
    folder = checkpoint(tmp_path / "out")
    os.mkfifo(folder / "model.safetensors.index.json")
    with open(folder / "pytorch_model.bin.index.json", "wb") as stream:
        stream.truncate(5 * 10**9)
    with OutFolder(folder, [], force=True) as out:
        write(out)
    assert sorted(tree(folder)) == ["config.json", "model.safetensors"]


def test_planted_link_is_not_written_through(tmp_path):
    """Somebody who swaps a temporary file for a link does not get another file overwritten."""
    (tmp_path / "precious").write_text("precious")
    with pytest.raises(OutputError, match=r"`config\.json` cannot be written"), OutFolder(tmp_path / "out", []) as out:
        temp = out.temp("config.json")
        temp.unlink()
        temp.symlink_to(tmp_path / "precious")
        out.write("config.json", b"{}")
    assert (tmp_path / "precious").read_text() == "precious"


def test_no_space_left(tmp_path, monkeypatch):
    """Refused before anything is made, with both numbers; a file system that reports no sizes is let pass."""
    message = refused(tmp_path / "new" / "out", needed=10**18)
    assert "not enough space: the output takes 1000000000000000000 bytes (1000000000.00 GB), but " in message
    disk = SimpleNamespace(f_bavail=5, f_frsize=4096, f_blocks=100)
    monkeypatch.setattr("fastinterp.output.folder.os.statvfs", lambda _: disk)
    assert "takes 20481 bytes (20.48 KB), but 20480 (20.48 KB) are free" in refused(
        tmp_path / "new" / "out", needed=20481
    )
    with OutFolder(tmp_path / "out", [], needed=20480) as out:
        write(out)
    disk.f_bavail = disk.f_blocks = 0
    with OutFolder(tmp_path / "other", [], needed=20480) as out:
        write(out)
    assert open_checkpoint(str(tmp_path / "other")).nbytes == 48


def test_space_that_an_earlier_run_has_taken(tmp_path):
    """It counts for the same merge alone, of all outputs: the first of them checks the space for all."""
    outs = [(tmp_path / "a", ["x"]), (tmp_path / "b", ["part/x"]), (tmp_path / "c.safetensors", [])]
    assert held(outs, "mine") == 0
    for path, names in outs:
        with OutFolder(path, [], merge="mine") as out:
            for name in names or ["c.safetensors"]:
                out.temp(name).write_bytes(bytes(8192))
            out.leave()
    taken = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob(".*.partial-*"))
    assert taken >= 3 * 8192 and held(outs, "mine") == taken
    assert held(outs, "another") == 0


READ_ONLY = """
import os, sys
from fastinterp.errors import OutputError
from fastinterp.output.folder import OutFolder
if os.getuid() == 0:  # root may write everywhere; nobody may not
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
for path in sys.argv[1:]:
    try:
        OutFolder(path, []).__enter__()
    except OutputError as error:
        print(error)
"""


def test_read_only_target():
    """No right to write: refused at the start, whether the folder is there or has to be made."""
    folder = Path(tempfile.mkdtemp())  # not tmp_path: pytest's folders are closed to other users
    out, missing, closed = folder / "out", folder / "new", folder / "closed"
    out.mkdir()
    closed.mkdir(0o700)
    for path in (out, folder):
        path.chmod(0o555)
    try:
        command = [sys.executable, "-c", READ_ONLY, str(out), str(missing), *[str(closed / "out")] * (os.getuid() == 0)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        assert done.stdout.splitlines() == [
            f"{out}: the folder cannot be written to: Permission denied",
            f"{missing}: the folder cannot be created: Permission denied",
            *[f"`{closed}/out`: this path cannot be used: Permission denied"] * (os.getuid() == 0),
        ]
        assert tree(folder) == {"out": b"", "closed": b""}
    finally:
        for path in (folder, out):
            path.chmod(0o755)
        shutil.rmtree(folder)


def test_names_must_lie_in_the_folder(tmp_path):
    """No name leads out of the folder, and a folder in the way is found before the merge, not after."""
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    with OutFolder(tmp_path / "out", [], force=True) as out:
        for name in ("../x", "a/../b", "a//b", "", "..", "/x", "a/", "a\\b"):
            with pytest.raises(OutputError, match=r"is not the name of a file in the folder"):
                out.temp(name)
        with pytest.raises(OutputError, match=r"`config\.json` is a folder there"):
            out.temp("config.json")


def test_two_runs_at_once(tmp_path):
    """The second run into the same folder is refused while the first lives, with force too."""
    with OutFolder(tmp_path / "out", []) as first:
        first.write("config.json", b"{}")
        for force in (False, True):
            message = refused(tmp_path / "out", force=force)
            assert f"process {os.getpid()} is writing here: `.fastinterp-journal`. Wait for it" in message
        write(first)
    assert sorted(tree(tmp_path / "out")) == ["config.json", "model.safetensors"]


def test_leftovers(tmp_path):
    """Of runs that died and left no journal, or an empty one: they are removed, and the folder is not called full. What
    belongs to others stays: other outputs, in the same folder, and what is called like an old file."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".model.safetensors.partial-0123456789ab").touch()
    (folder / ".fastinterp-journal").touch()
    with OutFolder(folder, []) as out:
        assert set(tree(folder)) == {".fastinterp-journal"}
        write(out)
    assert sorted(tree(folder)) == ["config.json", "model.safetensors"]
    (folder / ".model.safetensors.old-0123456789ab").touch()
    with OutFolder(folder, [], force=True) as out:
        write(out)
    assert ".model.safetensors.old-0123456789ab" in tree(folder)


def test_leftovers_of_other_outputs_in_the_folder_stay(tmp_path):
    """A file that is written there, or was: each output knows its own by their names."""
    with OutFolder(tmp_path / "a.safetensors", []) as a, OutFolder(tmp_path / "a.safetensors.safetensors", []) as b:
        for out in (a, b):
            out.temp("").write_bytes(b"1")
        (tmp_path / ".a.safetensors.partial-0123456789ab").touch()
        (tmp_path / ".model.safetensors.partial-0123456789ab").touch()
        before = tree(tmp_path)
        with OutFolder(tmp_path, [], force=True) as folder:
            write(folder)
        gone = {".model.safetensors.partial-0123456789ab"}
        assert set(tree(tmp_path)) == (set(before) - gone) | {"config.json", "model.safetensors"}
        for out in (a, b):
            out.commit()
    (tmp_path / ".a.safetensors.partial-0123456789ab").touch()
    with OutFolder(tmp_path / "a.safetensors.safetensors", [], force=True):
        assert ".a.safetensors.partial-0123456789ab" in tree(tmp_path)
    with OutFolder(tmp_path / "a.safetensors", [], force=True):
        assert ".a.safetensors.partial-0123456789ab" not in tree(tmp_path)


def test_unfinished_merge_of_another_kind_is_not_thrown_away(tmp_path):
    """If it noted what there is to resume from. The refusal says how it differs, and what ends it."""
    folder = tmp_path / "out"
    folder.mkdir()
    journal = begin(journal_path(folder), "ties")
    journal.append("round", {"number": 1})
    journal.close()
    (folder / f".model.safetensors.partial-{journal.run}").write_bytes(b"half")
    before = tree(folder)
    with pytest.raises(OutputError) as caught:
        OutFolder(folder, [], merge="linear", differs=lambda j: f"that was {j.begun.merge}").__enter__()
    assert str(caught.value) == (
        f"{folder}: another merge is not finished here (that was ties). To throw it away, add --force (in Python "
        "force=True); to finish it, run what wrote it once more, and that ends it"
    )
    assert tree(folder) == before
    with OutFolder(folder, [], merge="ties") as out:
        assert out.resumed and out.journal is not None and out.journal.read("round", dict) == [{"number": 1}]
        assert out.temp("model.safetensors").read_bytes() == b"half"
        out.journal.close()  # as if it were killed
        os.replace(folder / ".fastinterp-journal", tmp_path / "kept")
    os.replace(tmp_path / "kept", folder / ".fastinterp-journal")
    with OutFolder(folder, [], merge="linear", force=True) as out:
        assert not out.resumed and set(tree(folder)) == {".fastinterp-journal"}
        write(out)
    assert sorted(tree(folder)) == ["config.json", "model.safetensors"]
