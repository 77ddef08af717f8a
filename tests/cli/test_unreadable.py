"""What the system cannot look at, list or read is an error that names it, and never taken for what is not there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastinterp import presence
from fastinterp.checkpoint import hub
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import OutputError, UnreadableError
from fastinterp.output.folder import OutFolder
from fastinterp.paths.average import average_of
from tests.support.fault_server import FaultServer
from tests.support.fault_survey import MODULES, Place, survey, traced
from tests.support.models import layers, save

PREDICATES = [presence.exists, presence.is_file, presence.is_folder, presence.file_size, presence.info_of]
NAMES = ["there", "there/not", "nowhere", "loop", "x" * 300, "a\0b", "\ud800", "broken"]


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with FaultServer(MODULES, limit_s=60) as running:
        yield running


@pytest.fixture
def failing(monkeypatch):
    """Let looks at a path fail."""

    def fail(path: Path, code: int) -> None:
        real = os.stat

        def stat(name, *args, **kwargs):
            if str(name) == str(path):
                raise OSError(code, os.strerror(code), str(name))
            return real(name, *args, **kwargs)

        monkeypatch.setattr(os, "stat", stat)

    return fail


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE, errno.ENOMEM], ids=errno.errorcode.get)
@pytest.mark.parametrize("predicate", PREDICATES)
def test_a_look_that_fails(tmp_path, failing, predicate, code):
    failing(tmp_path / "x", code)
    with pytest.raises(UnreadableError) as caught:
        predicate(tmp_path / "x")
    assert str(caught.value) == f"{tmp_path / 'x'}: it cannot be looked at: {os.strerror(code)}"
    with pytest.raises(OSError) if predicate is not presence.info_of else pytest.raises(UnreadableError):
        presence.is_there(tmp_path / "x") if predicate is not presence.info_of else predicate(tmp_path / "x")


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_what_can_be_said_is_said_as_by_os_path(tmp_path, name):
    (tmp_path / "there").write_bytes(b"abc")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "broken").symlink_to("gone")
    path = os.path.join(tmp_path, name)
    assert presence.exists(path) == os.path.exists(path)
    assert presence.is_file(path) == os.path.isfile(path)
    assert presence.is_folder(path) == os.path.isdir(path)
    assert presence.is_there(path) == os.path.lexists(path)
    assert presence.is_link(path) == os.path.islink(path)
    assert presence.is_real_folder(tmp_path) and not presence.is_real_folder(path)


def test_a_model_that_is_here_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, failing):
    monkeypatch.setattr(hub, "find", lambda *_: pytest.fail("it was looked up"))
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "org" / "model", layers(1))
    failing(Path("org/model"), errno.EACCES)
    with pytest.raises(UnreadableError, match=r"^org/model: it cannot be looked at: Permission denied$"):
        open_checkpoint("org/model")


def test_an_input_that_cannot_be_looked_at_is_not_written_over(tmp_path, failing):
    model = save(tmp_path / "model", layers(1))
    failing(model, errno.EIO)
    with pytest.raises(OutputError, match="model: it cannot be looked at"), OutFolder(tmp_path, [model]):
        pass


def test_a_file_that_cannot_be_looked_at_is_not_replaced(tmp_path, failing):
    (tmp_path / "out.safetensors").write_bytes(b"precious")
    failing(tmp_path / "out.safetensors", errno.EIO)
    with pytest.raises(OutputError, match="Input/output error"), OutFolder(tmp_path / "out.safetensors", []):
        pass
    assert (tmp_path / "out.safetensors").read_bytes() == b"precious"


def test_a_pattern_whose_folder_cannot_be_listed(tmp_path, monkeypatch):
    for run in "ab":
        save(tmp_path / f"run-{run}" / "checkpoint-1", layers(1))
    listdir = os.listdir

    def some(path):
        if str(path).endswith("run-b"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", some)
    with pytest.raises(UnreadableError, match="run-b: the folder cannot be read: Input/output error"):
        average_of([str(tmp_path / "run-*" / "checkpoint-*")], "uniform", None, None)


@pytest.mark.slow(3)
@pytest.mark.parametrize(
    ("name", "file", "rule"),
    [
        ("inspect", "a/model.safetensors", "stat:1+:EIO"),
        ("inspect", "a", "stat:1+:EACCES"),
        ("inspect", "a", "opendir:1+:EMFILE"),
        ("explain", "a", "opendir:1+:EACCES"),
        ("check", "a", "opendir:1+:EACCES"),
        ("explain", "b", "opendir:2+:EIO"),
        ("check", "b", "opendir:2+:EIO"),
        ("check", "b/config.json", "open:1+:EMFILE"),
        ("explain", "b/config.json", "stat:1+:EIO"),
    ],
)
def test_the_file_is_named(server, tmp_path, name, file, rule):
    place = Place(tmp_path / "place")
    before = place.a.joinpath("model.safetensors").read_bytes()
    run = server.run(place.commands[name], rule, [place.root / file])
    assert run.code in (3, 4), run
    said = run.out + run.err
    assert str(place.root / file) in said and (name == "check" or len(said.strip().splitlines()) == 1)
    assert "0 B" not in said and "has no config.json" not in said and "Traceback" not in said
    assert not place.out.exists() and place.a.joinpath("model.safetensors").read_bytes() == before


@pytest.mark.slow(20)
@pytest.mark.parametrize(
    ("name", "kinds", "last"),
    [
        ("explain", ("stat", "lstat", "opendir", "access"), 100),
        ("inspect", ("stat", "lstat", "opendir", "access"), 100),
        ("interpolate", ("pread",), 6),  # for the hashes of the inputs in the receipt
        ("extract-lora", ("pread", "close"), 3),  # for the checksum of what was written; of the inputs
    ],
)
def test_every_failure_of_a_kind(server, tmp_path, name, kinds, last):
    place = Place(tmp_path / "place")
    _, _, every = traced(server, place, name)
    picked = [call for kind in kinds for call in [c for c in every if c.name == kind][-last:]]
    tried = list(survey(server, place, name, picked))
    assert len(tried) > 5
    assert [str(bad) for bad in tried if bad is not None] == []
