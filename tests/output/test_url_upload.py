"""Outputs at addresses: the bytes of those here, all or nothing, never over what is there; uploads that fail."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem

import fastinterp
from fastinterp.checkpoint.url_store import place_of
from fastinterp.cli import commands
from fastinterp.errors import OutputError, UsageError
from fastinterp.ops.dtypes import F32
from fastinterp.output.url_upload import Destination
from tests.support.checkpoints import tensor, write
from tests.support.hub_server import TOKEN, environment, hub_server

pytestmark = pytest.mark.slow(3)

A, B = np.arange(2000) / 1000, np.arange(2000) / -500


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """fsspec's file system in memory, empty; `a` and `b` are models here, and `tmp` is for temporary files."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for name, values in (("a", A), ("b", B)):
        write(tmp_path / name, {"w": tensor(values[:1000], F32), "x": tensor(values[1000:], F32)})
        (tmp_path / name / "config.json").write_text("{}")
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def run(*arguments: str) -> str:
    """What a command prints on stdout."""
    result = CliRunner().invoke(commands, [*arguments])
    assert result.exit_code == 0, result.output
    return result.output


def files(fs, folder: str) -> dict[str, bytes]:
    return {path.removeprefix(f"/{folder}/"): fs.cat(path) for path in fs.find(f"/{folder}")}


def local(folder: str) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def test_the_bytes_of_a_local_output(memory, tmp_path):
    """A folder, in shards; nothing stays here."""
    report = fastinterp.interpolate("a", "b", 0.25, "memory://o/out", max_shard_size=4000)[0]
    fastinterp.interpolate("a", "b", 0.25, "out", max_shard_size=4000)
    assert files(memory, "o/out") == local("out") and len(local("out")) == 6
    assert report.output == "memory://o/out"
    assert os.listdir("tmp") == []
    assert fastinterp.verify("memory://o/out", full=True).ok


def test_one_file_and_several_points(memory):
    fastinterp.interpolate("a", "b", 0.25, "memory://o/x.safetensors")
    fastinterp.interpolate("a", "b", 0.25, "x.safetensors")
    assert memory.cat("/o/x.safetensors") == Path("x.safetensors").read_bytes()
    reports = fastinterp.interpolate("a", "b", [0.25, 0.5], "memory://o/points")
    fastinterp.interpolate("a", "b", [0.25, 0.5], "points")
    assert files(memory, "o/points") == local("points")
    assert [r.output for r in reports] == ["memory://o/points/alpha_0.25", "memory://o/points/alpha_0.5"]
    points = fastinterp.sweep("a", "b", [0.25, 0.5], "memory://o/sweep")
    assert files(memory, "o/sweep").keys() == local("points").keys()
    assert [(p.path, p.report and p.report.output) for p in points] == [
        (None, f"memory://o/sweep/{p.name}") for p in points
    ]
    assert os.listdir("tmp") == []


def test_commands(memory):
    """merge, average, replay and extract-lora from the command line."""
    Path("r.yml").write_text(
        "merge_method: linear\nmodels:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 2}}\n"
    )
    for arguments in (["merge", "r.yml", "memory://o/m"], ["average", "a", "b", "--in-order", "-o", "memory://o/v"],
                      ["replay", "memory://o/m", "memory://o/r", "--models", "a=a", "--models", "b=b"]):  # fmt: skip
        assert "memory://o/" in run(*arguments)
    assert files(memory, "o/r") == files(memory, "o/m") and files(memory, "o/v")


def test_adapters(memory):
    for name, factor in (("base", 0), ("tuned", 1)):
        values = np.outer(np.arange(16), np.arange(16)) * factor / 100
        write(Path(name), {"l.weight": tensor(np.ones((16, 16)) + values, F32, [16, 16])})
    report = fastinterp.extract_lora("tuned", "base", "memory://o/lora", rank=1)
    assert report.output == "memory://o/lora"
    assert sorted(files(memory, "o/lora")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_weights_first_and_the_index_last(memory, monkeypatch):
    order: list[str] = []
    put = Destination._put

    def noted(self, path, name):
        order.append(name)
        put(self, path, name)

    monkeypatch.setattr(Destination, "_put", noted)
    fastinterp.interpolate("a", "b", 0.25, "memory://o/out", max_shard_size=4000)
    assert sorted(order[:2]) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(order[-2:]) == ["config.json", "model.safetensors.index.json"]


def test_what_is_there_stays(memory):
    """Before the merge; with force it is replaced, and the other files there stay."""
    fastinterp.interpolate("a", "b", 0.25, "memory://o/out", max_shard_size=4000)
    memory.pipe("/o/out/notes.txt", b"mine")
    before = files(memory, "o/out")
    with pytest.raises(OutputError, match=r"memory://o/out: the folder is there already, with .*Add --force"):
        fastinterp.interpolate("a", "b", 0.5, "memory://o/out")
    assert files(memory, "o/out") == before
    fastinterp.interpolate("a", "b", 0.5, "memory://o/out", force=True)
    fastinterp.interpolate("a", "b", 0.5, "out")
    assert files(memory, "o/out") == local("out") | {"notes.txt": b"mine"}
    fastinterp.interpolate("a", "b", 0.5, "memory://o/x.safetensors")
    with pytest.raises(OutputError, match=r"memory://o/x.safetensors: the file is there already"):
        fastinterp.interpolate("a", "b", 0.5, "memory://o/x.safetensors")


def test_inputs_are_never_replaced(memory):
    memory.put("a", "/m/a", recursive=True)
    before = files(memory, "m/a")
    same = ("memory:///m/a", "MEMORY://m//a/", "memory://m/./a", "memory://m/x/../a")
    refused = "it is an input of the merge, or contains one, or is in one"
    for out in ("memory://m/a", "memory://m", "memory://m/a/sub", *same):
        with pytest.raises(OutputError, match=refused):
            fastinterp.interpolate("memory://m/a", "b", 0.5, out, force=True)
    for name in ("memory:///m/a", "simplecache::memory://m/a", "memory://m/a/model.safetensors"):
        with pytest.raises(OutputError, match=refused):
            fastinterp.interpolate(name, "b", 0.5, "memory://m/a", force=True)
    assert files(memory, "m/a") == before
    fastinterp.interpolate("memory://m/a", "b", 0.5, "memory://m/ab", force=True)


def test_places_of_addresses():
    """Protocols of one store, and stores of one protocol, as their file systems say."""
    store = type("S3FileSystem", (), {"storage_options": {}})
    assert place_of(store(), "bucket/m/a") == place_of(store(), "/bucket//m/./a/") != place_of(store(), "bucket/m/b")
    hosts = [type("SFTPFileSystem", (), {"storage_options": {"host": host}})() for host in ("one", "two", "ONE")]
    one, two, other = (place_of(host, "/m/a") for host in hosts)
    assert one == other != two


class Full(MemoryFileSystem):
    """A store that takes no more after some files."""

    protocol, cachable = "full", False
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    room, error = 1, OSError("no room")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("full://", "memory://"))

    def put_file(self, lpath, rpath, **kwargs):
        if len(self.store) >= Full.room:
            raise Full.error
        super().put_file(lpath, rpath, **kwargs)


@pytest.fixture
def full(memory, monkeypatch):
    fsspec.register_implementation("full", Full, clobber=True)
    monkeypatch.setattr("fastinterp.checkpoint.url_store.time.sleep", lambda seconds: None)
    fs = Full()
    fs.store.clear()
    return fs


def test_an_upload_that_fails_is_repeated_by_its_command(full, monkeypatch):
    """The output is kept here, neither index nor configuration are there, and the command in the message works."""
    with pytest.raises(OutputError, match=r"full://o/out: uploading .* failed: no room, 5 times in a row") as error:
        fastinterp.interpolate("a", "b", 0.25, "full://o/out", max_shard_size=4000)
    assert all(name.endswith(".safetensors") for name in files(full, "o/out"))
    command = re.search(r"The output is complete in \S+\. To upload it: `fastinterp (.*)`", str(error.value))
    assert command is not None
    monkeypatch.setattr(Full, "room", 100)
    run(*shlex.split(command[1]))
    fastinterp.interpolate("a", "b", 0.25, "out", max_shard_size=4000)
    assert files(full, "o/out") == local("out")


def test_a_store_that_refuses_writes(full, monkeypatch):
    """Before anything is computed."""

    def refuse(self, path, value=None, **kwargs):
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(Full, "pipe_file", refuse)
    with pytest.raises(OutputError, match="full://o/out: access is refused"):
        fastinterp.interpolate("a", "none", 0.25, "full://o/out")
    assert os.listdir("tmp") == []


def test_an_error_of_the_merge_leaves_nothing(memory):
    write(Path("c"), {"w": tensor(np.array([1.0]), F32)})
    with pytest.raises(fastinterp.ShapeError):
        fastinterp.interpolate("a", "c", 0.25, "memory://o/out")
    assert memory.find("/o") == [] and os.listdir("tmp") == []


def test_upload(memory):
    """The command: a folder or a file; what is none, or is there, is refused."""
    fastinterp.interpolate("a", "b", 0.25, "out")
    assert "memory://o/out: 4 files" in run("upload", "out", "memory://o/out")
    assert files(memory, "o/out") == local("out")
    run("upload", "out/model.safetensors", "memory://o")
    assert memory.cat("/o/model.safetensors") == local("out")["model.safetensors"]
    for arguments, code, message in (
        (["out", "memory://o/out"], 4, "Add --force"),
        (["none", "memory://o/none"], 3, "there is no such folder"),
        (["out", "elsewhere"], 2, "upload needs an address"),
        (["out", "hf://org/out"], 2, "hf upload org/out out . --private"),
        (["out", "https://h/out"], 2, "nothing can be written to addresses of HTTP"),
    ):
        result = CliRunner().invoke(commands, ["upload", *arguments])
        assert (result.exit_code, message in " ".join(result.output.split())) == (code, True), result.output


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("s3:/bucket/x", r"`s3:/bucket/x` is no address.* Did you mean `s3://bucket/x`"),
        ("https://h/x", "nothing can be written to addresses of HTTP"),
        ("file:///x", "is on this machine. Write /x"),
        ("memory://", "names no output"),
    ],
)
def test_names_that_are_none(memory, out, message):
    with pytest.raises((OutputError, UsageError), match=message):
        fastinterp.interpolate("a", "b", 0.25, out)


def test_the_hub(memory, tmp_path):
    """hf://org/name: a private model, as of --push-to."""
    fastinterp.interpolate("a", "b", 0.25, "out")
    with hub_server() as hub:
        env = environment(hub, tmp_path / "home") | {"HF_TOKEN": TOKEN, "TMPDIR": str(tmp_path / "tmp")}
        command = [sys.executable, "-m", "fastinterp", "interpolate", "a", "b", "hf://org/mixed", "--alpha", "0.25"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert done.returncode == 0 and "hf://org/mixed: 1 file" in done.stdout, done.stderr
        assert hub.repos["org/mixed"].private and hub.repos["org/mixed"].files == local("out")
        again = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
        assert again.returncode == 4 and "org/mixed: the model is there already" in again.stderr
        before = dict(hub.repos["org/mixed"].files)
        for name in ("org/mixed", "hf://org/mixed", "hf://org/mixed@main"):
            of_itself = [*command[:4], name, *command[5:], "--force"]
            done = subprocess.run(of_itself, capture_output=True, text=True, check=False, env=env)
            assert done.returncode == 4 and "org/mixed: it is an input of the merge" in done.stderr, done.stderr
        assert hub.repos["org/mixed"].files == before
    assert os.listdir("tmp") == []
