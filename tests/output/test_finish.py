"""The finish of an output: its order, its syncs; failing or interrupted anywhere, it leaves one whole checkpoint.

test_kills.py has the processes that are killed.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from fastinterp.checkpoint.journal_file import BEGIN, FINISHING, PLACED, Finishing, journal_path, state_of, temporary
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, OutputError
from fastinterp.output.folder import OutFolder
from fastinterp.output.journal import begin
from fastinterp.output.several import commit_all
from tests.support.written import GB, checkpoint, tree, write, write_files

STEPS = 40  # more renames and removals than any case below needs
OLD = {"abc": ["a", "b", "c"], "abcde": ["a", "b", "c", "d", "e"]}
SHARDED_AND_SINGLE = [("abc", 16, 16), ("abc", GB, GB), ("abcde", 16, GB), ("abcde", GB, 16), ("abcde", 40, 16)]
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "model.safetensors.index.json"


class Failing:
    """The module `os`, whose renames, removals and syncs are counted; those of the numbers `at` fail.

    late   fail after the deed, not before it
    then   what all but the first failure raise
    """

    def __init__(self, error, at: range, late: bool = False, then=None):
        self.error, self.at, self.late, self.then, self.count = error, at, late, then or error, 0

    def install(self, patch) -> None:
        for name in ("replace", "unlink", "fsync", "write"):
            patch.setattr(f"os.{name}", self.step(getattr(os, name)))

    def step(self, call):
        def counted(*args):
            self.count += 1
            fails = self.count - 1 in self.at
            if self.late or not fails:
                result = call(*args)
            if fails:
                raise (self.error if self.count - 1 == self.at[0] else self.then)(5, "Input/output error")
            return result

        return counted


def commit_failing(folder: Path, new: int, failing: Failing, monkeypatch, *, durable: bool = False) -> str | None:
    """What the failure raised over the checkpoint in `folder`, or None."""
    with monkeypatch.context() as patch:
        try:
            with OutFolder(folder, [], force=True, durable=durable) as out:
                write_files(out, limit=new)
                failing.install(patch)
                out.commit()
        except (OutputError, KeyboardInterrupt) as error:
            return str(error) or "interrupted"
    return None


def is_new(folder: Path) -> None:
    found = open_checkpoint(str(folder))
    data = {found.files[e.file].read_bytes()[e.start : e.start + e.nbytes] for e in found.tensors.values()}
    assert data == {b"\1" * 16} and sorted(found.tensors) == ["a", "b", "c"] and not list(folder.glob(".*"))


@pytest.mark.parametrize(("error", "late"), [(OSError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True)])
@pytest.mark.parametrize(("names", "old", "new"), SHARDED_AND_SINGLE)
def test_failure_in_the_finish_keeps_one_checkpoint(tmp_path, monkeypatch, names, old, new, error, late):
    """An error or an interrupt at any rename, removal, write or sync: the folder is as it was, or holds the new
    checkpoint only; there is no third state.
    """
    outcomes = []
    for at in range(STEPS):
        folder = checkpoint(tmp_path / str(at), OLD[names], old)
        (folder / "README.md").write_text("the user's")
        before = tree(folder)
        raised = commit_failing(folder, new, Failing(error, range(at, at + 1), late), monkeypatch)
        if raised is None:
            break
        outcomes.append("old" if tree(folder) == before else "new")
        if outcomes[-1] == "new":
            is_new(folder)
        if error is OSError:
            assert raised.endswith("Input/output error")
            new_one = "the output is complete, but its finish failed: "
            assert (new_one if outcomes[-1] == "new" else "the output cannot be finished: ") in raised
    assert raised is None and outcomes == sorted(outcomes, reverse=True) and set(outcomes) == {"old", "new"}


@pytest.mark.parametrize(("names", "old", "new"), SHARDED_AND_SINGLE)
def test_disk_that_fails_for_good_loses_nothing(tmp_path, monkeypatch, names, old, new):
    """From some call on nothing works, taking back neither. What remains opens as the old checkpoint, or not at all,
    and says why; the next run needs nobody.
    """
    seen = set()
    for at in range(STEPS):
        folder = checkpoint(tmp_path / str(at), OLD[names], old)
        before = tree(folder)
        raised = commit_failing(folder, new, Failing(OSError, range(at, STEPS * 9)), monkeypatch)
        if raised is None:
            break
        state = state_of(folder / ".fastinterp-journal")
        if state == FINISHING:
            with pytest.raises(CheckpointError, match="the folder is neither the old nor the new checkpoint"):
                open_checkpoint(str(folder))
            assert "and the next run into it puts it in place: run this again" in raised
        else:
            found = open_checkpoint(str(folder))
            complete = "the output is complete, but its finish failed" in raised  # at the very last sync
            assert sorted(found.tensors) == (["a", "b", "c"] if complete else OLD[names])
            before = tree(folder) if complete else before
        seen.add(state)
        with OutFolder(folder, [], force=True) as out:
            assert bool(out.mended) == (state in (FINISHING, PLACED))
        if out.mended:
            is_new(folder)
        else:
            assert tree(folder) == before
    assert raised is None and seen == {BEGIN, FINISHING, PLACED, None}


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_interrupt_while_taking_back(tmp_path, monkeypatch, error):
    """Interrupted while a failed finish is taken back: no part of two checkpoints opens, and the next run ends with
    the new one, or the old one is there.
    """
    for first in range(10):
        for second in range(first + 1, first + 20):
            folder = checkpoint(tmp_path / f"{first}-{second}", limit=16)
            before = tree(folder)
            failing = Failing(error, range(first, second + 1, second - first), then=KeyboardInterrupt)
            assert commit_failing(folder, 16, failing, monkeypatch) is not None
            with suppress(CheckpointError):
                data = {path.read_bytes()[-16:] for path in open_checkpoint(str(folder)).files}
                assert data in ({b"\0" * 16}, {b"\1" * 16})
            with OutFolder(folder, [], force=True) as out:
                pass
            if out.mended or tree(folder) != before:
                is_new(folder)


# ---- order and syncs ------------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch):
    """(call, name of the file) of every rename, removal, sync, and record of the journal."""
    calls: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    def note(kind):
        real = getattr(os, kind)

        def call(*args):
            if kind == "write":
                calls.append((bytes(args[1]).split()[1].decode(), ""))
            else:
                calls.append((kind, Path(names.get(args[0], args[0]) if kind == "fsync" else args[-1]).name))
            return real(*args)

        return call

    real_open = os.open

    def opened(path, *args, **options):
        fd = real_open(path, *args, **options)
        names[fd] = os.fspath(path)
        return fd

    for kind in ("fsync", "replace", "unlink", "write"):
        monkeypatch.setattr(f"os.{kind}", note(kind))
    monkeypatch.setattr("os.open", opened)
    return calls


def test_order_of_the_finish(tmp_path, log):
    """Of a new output: a record, then the names, the index last; no sync."""
    with OutFolder(tmp_path / "out", []) as out:
        write(out, limit=16)
    assert log == [
        ("begin", ""), ("finishing", ""), *(("replace", n) for n in ("config.json", *SHARDS, INDEX)),
        ("unlink", ".fastinterp-journal"),
    ]  # fmt: skip


@pytest.mark.parametrize("durable", [False, True])
def test_order_of_the_finish_over_another(tmp_path, log, durable):
    """Data is synced before names, the folder after them; old shards move aside before their index, and are removed
    when the new names are on the disk. With or without --durable.
    """
    folder = checkpoint(tmp_path / "out", ["a", "b", "c"], 16)
    with OutFolder(folder, [], force=True, durable=durable) as out:
        write(out, limit=16)
        run = out.journal.run if out.journal else ""
    new = ["config.json", *SHARDS, INDEX]
    aside = [temporary(folder, n, "old", run).name for n in (*SHARDS, INDEX, "config.json")]
    assert log == [
        ("begin", ""),
        *(("fsync", temporary(folder, n, "partial", run).name) for n in new),
        ("fsync", "out"), ("finishing", ""), ("fsync", ".fastinterp-journal"),
        *(("replace", n) for n in (*aside, *new)),
        ("fsync", "out"), ("placed", ""), ("fsync", ".fastinterp-journal"),
        *(("unlink", n) for n in aside), ("fsync", "out"),
        ("unlink", ".fastinterp-journal"), ("fsync", "out"),
    ]  # fmt: skip


def test_durable_syncs_folders_that_it_makes(tmp_path, log):
    with OutFolder(tmp_path / "new" / "out", [], durable=True) as out:
        out.temp("unet/model.safetensors").write_bytes(b"1")
        out.commit()
        run = out.journal.run if out.journal else ""
    assert [c for c in log if c[0] != "subfolder"] == [
        ("begin", ""), ("fsync", f".model.safetensors.partial-{run}"), ("fsync", "unet"), ("fsync", "out"),
        ("fsync", tmp_path.name), ("fsync", "new"), ("fsync", "out"), ("finishing", ""),
        ("fsync", ".fastinterp-journal"), ("replace", "model.safetensors"), ("fsync", "unet"), ("fsync", "out"),
        ("unlink", ".fastinterp-journal"), ("fsync", "out"),
    ]  # fmt: skip


def test_file_replaces_another_at_once(tmp_path, log):
    """One rename: there is never none. What it replaces makes it sync."""
    path = tmp_path / "out.safetensors"
    for force in (False, True):
        log.clear()
        with OutFolder(path, [], force=force) as out:
            out.temp("").write_bytes(b"1")
            out.commit()
        assert [k for k, _ in log] == (
            ["begin", "fsync", "fsync", "finishing", "fsync", "replace", "fsync", "unlink", "fsync"]
            if force else ["begin", "finishing", "replace", "unlink"]
        )  # fmt: skip
    assert tree(tmp_path) == {"out.safetensors": b"1"}


def test_failing_sync_of_the_data_is_no_success(tmp_path, monkeypatch):
    folder = checkpoint(tmp_path / "out", limit=16)
    before = tree(folder)

    def fsync(fd):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(OutputError, match="the output cannot be finished: Input/output error"):  # noqa: SIM117
        with OutFolder(folder, [], force=True) as out:
            write(out, limit=16)
    assert tree(folder) == before


# ---- several outputs of one run -------------------------------------------------------------------------------------


def three(root: Path, stack) -> list[OutFolder]:
    folders = [stack.enter_context(OutFolder(root / n, [], force=True)) for n in "xyz"]
    for folder in folders:
        write_files(folder)
    return folders


@pytest.mark.parametrize(("error", "late"), [(OSError, False), (KeyboardInterrupt, False), (KeyboardInterrupt, True)])
def test_several_outputs_say_which_are_in_place(tmp_path, monkeypatch, error, late):
    """An error anywhere: each output is whole or not there, and the message names those that are. An interrupt: all of
    them or none.
    """
    seen = set()
    for at in range(STEPS):
        root = tmp_path / str(at)
        raised = None
        with monkeypatch.context() as patch:
            try:
                with ExitStack() as stack:
                    folders = three(root, stack)
                    Failing(error, range(at, at + 1), late).install(patch)
                    commit_all(folders)
            except (OutputError, KeyboardInterrupt) as problem:
                raised = str(problem)
        there = [n for n in "xyz" if (root / n).exists()]
        for name in there:
            is_new(root / name)
        if raised is None:
            break
        seen.add(len(there))
        if error is OSError and there:
            named = raised.split("finished before that: ")[-1]
            failed = next(n for n in "xyz" if raised.startswith(f"{root / n}:"))
            assert named == ", ".join(str(root / n) for n in there if n != failed)
    assert raised is None and there == ["x", "y", "z"]
    assert seen == ({0, 1, 2, 3} if error is OSError else {0, 3})


# ---- journals that are not to be trusted ----------------------------------------------------------------------------


def left(folder: Path, record: Finishing, files: dict[str, bytes]) -> str:
    """A folder as a run leaves it that dies in its finish."""
    folder.mkdir(exist_ok=True)
    journal = begin(journal_path(folder), "merge", "0123456789ab")
    journal.append(FINISHING, record)
    journal.close()
    for name, content in files.items():
        temporary(folder, name, "partial", "0123456789ab").write_bytes(content)
    return journal.owner.boot


def test_finish_that_was_not_synced_is_not_trusted_after_a_crash_of_the_machine(tmp_path):
    """The names may be on the disk without the data. What has its name already counts as unfinished, too."""
    for boot, trusted in (("another", False), (None, True)):
        folder = tmp_path / str(boot)
        files = {"config.json": b"{}", "model.safetensors": b"1"}
        own = left(folder, Finishing((), ()), {})
        (folder / ".fastinterp-journal").unlink()
        left(folder, Finishing(tuple(files), (), False, boot or own), files)
        os.rename(temporary(folder, "config.json", "partial", "0123456789ab"), folder / "config.json")
        with OutFolder(folder, [], merge="merge") as out:
            assert (out.finished, out.resumed) == (trusted, not trusted)
            if trusted:
                assert tree(folder) == files
            else:
                assert {n for n in tree(folder) if "journal" not in n} == {f".{n}.partial-0123456789ab" for n in files}
    files = {"model.safetensors": b"1"}
    left(tmp_path / "synced", Finishing(tuple(files), (), True, "another"), files)
    with OutFolder(tmp_path / "synced", [], merge="merge") as out:
        assert out.finished and tree(tmp_path / "synced") == files


def test_finish_whose_files_are_gone_is_taken_back(tmp_path):
    """Somebody removed a temporary file to get its space: the old checkpoint gets its names again."""
    folder = checkpoint(tmp_path / "out")
    before = tree(folder)
    own = left(folder, Finishing(("config.json", "new.safetensors"), ("model.safetensors", "config.json"), True), {})
    assert own
    os.rename(folder / "model.safetensors", temporary(folder, "model.safetensors", "old", "0123456789ab"))
    with OutFolder(folder, [], force=True) as out:
        assert not out.mended
    assert tree(folder) == before


@pytest.mark.parametrize("name", ["../precious", "/etc/precious", "linked/precious", "a/../../precious"])
@pytest.mark.parametrize("field", ["names", "aside"])
def test_planted_journal_moves_nothing_outside(tmp_path, name, field):
    (tmp_path / "elsewhere").mkdir()
    for place in (tmp_path, tmp_path / "elsewhere"):
        (place / "precious").write_text("precious")
        (place / ".precious.partial-0123456789ab").write_text("evil")
        (place / ".precious.old-0123456789ab").write_text("evil")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    record = Finishing((name,), ()) if field == "names" else Finishing((), (name,))
    left(folder, Finishing(record.names, record.aside, True), {})
    before = tree(tmp_path)
    with pytest.raises(OutputError, match="the journal was not written by this program"):
        OutFolder(folder, [], force=True).__enter__()
    assert tree(tmp_path) == before
