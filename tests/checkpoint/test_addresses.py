"""Models at addresses: read where they are, with the bytes of files; what changes, is missing, refused is an error."""

from __future__ import annotations

import json
import os
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
from fastinterp.checkpoint import retries
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, RecipeError, StorageError, UsageError
from fastinterp.ops.dtypes import F32
from tests.support.checkpoints import tensor, words, write
from tests.support.file_server import file_server
from tests.support.hub_server import hub_server, in_this_process

pytestmark = pytest.mark.slow(3)

ROWS = 300


def model(folder: Path, seed: int, shards: bool = False) -> Path:
    """A model with a large tensor and small ones, in one file or two."""
    values = (words(seed, ROWS * 512) % np.uint64(2001)).astype("f8") / 1000 - 1
    tensors = {"a": tensor(values[:7], F32), "big": tensor(values, F32, [ROWS, 512])}
    if not shards:
        write(folder, tensors)
    else:
        folder.mkdir()
        names = {"a": "model-00001-of-00002.safetensors", "big": "model-00002-of-00002.safetensors"}
        for key, name in names.items():
            write(folder / "part", {key: tensors[key]})
            (folder / "part" / "model.safetensors").rename(folder / name)
        (folder / "part").rmdir()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (folder / "config.json").write_text("{}")
    return folder


def data(folder: str | Path) -> bytes:
    """The data of the file of weights, without its header, which names the models."""
    raw = (Path(folder) / "model.safetensors").read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def ties(*names: str):
    parameters = {"weight": 0.3, "density": 0.5}
    others = [{"model": name, "parameters": parameters} for name in names[1:]]
    return {"merge_method": "ties", "base_model": names[0], "models": others}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The models `a` and, in two shards, `b`; and the folder for temporary files, `tmp`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    model(tmp_path / "a", 1)
    model(tmp_path / "b", 2, shards=True)
    return tmp_path


def clear(fs):
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def memory(here):
    """fsspec's file system in memory, with these models in /m."""
    fs = fsspec.filesystem("memory")
    clear(fs)
    for name in ("a", "b"):
        fs.put(str(here / name), f"/m/{name}", recursive=True)
    yield fs
    clear(fs)


@pytest.fixture
def server(here):
    with file_server(here) as files:
        yield files


def largest(folder: Path) -> int:
    return max((p.stat().st_size for p in folder.rglob("*") if p.is_file()), default=0)


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bytes_from_memory(memory, here, threads):
    """Also of a method that reads twice; no weights are stored, and the receipt has versions."""
    fastinterp.merge(ties("a", "b"), "local")
    fastinterp.merge(ties("memory://m/a", "memory://m/b"), "out", threads=threads)
    assert data("out") == data("local")
    assert largest(here / "tmp") < 1000
    inputs = json.loads(Path("out/fastinterp_receipt.json").read_text())["inputs"]
    assert list(inputs) == ["memory://m/a", "memory://m/b"]
    assert all(file["version"].startswith("created ") for files in inputs.values() for file in files)


@pytest.mark.parametrize("listing", [True, False])
def test_same_bytes_from_http(server, here, listing):
    """From folders with pages, and without; from a file and an index."""
    server.listing = listing
    fastinterp.merge(ties("a", "b"), "local")
    fastinterp.merge(ties(f"{server.url}/a", f"{server.url}/b/"), "out")
    assert data("out") == data("local")
    assert largest(here / "tmp") < 1000
    fastinterp.merge(ties(f"{server.url}/a/model.safetensors", f"{server.url}/b/model.safetensors.index.json"), "out2")
    assert data("out2") == data("local")
    assert Path("out2/config.json").read_text() == "{}"


def test_commands_that_read(memory):
    """What the other functions say is what they say of files."""
    assert str(fastinterp.compare("memory://m/a", "memory://m/b")) == str(fastinterp.compare("a", "b"))
    assert fastinterp.check(ties("memory://m/a", "memory://m/b")).ok
    assert "memory://m/b" in str(fastinterp.explain(ties("memory://m/a", "memory://m/b")))
    loaded, local = fastinterp.load("memory://m/b"), fastinterp.load("b")
    assert {k: v.tolist() for k, v in loaded.items()} == {k: v.tolist() for k, v in local.items()}
    fastinterp.interpolate("a", "b", 0.3, "local")
    fastinterp.interpolate("memory://m/a", "b", 0.3, "out")
    assert data("out") == data("local")
    fastinterp.average("memory://m/?", "mean", in_order=True)
    fastinterp.average(["a", "b"], "local_mean", in_order=True)
    assert data("mean") == data("local_mean")
    with pytest.raises(UsageError, match=r"nothing matches 'memory://m/x"):
        fastinterp.average("memory://m/x*", "no")


def test_adapters(memory, here):
    """A base and its adapter, both at addresses: the bytes of files."""
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["big"]}
    factors = {
        "base_model.model.big.lora_A.weight": tensor(np.arange(1024) / 512, F32, [2, 512]),
        "base_model.model.big.lora_B.weight": tensor(np.arange(2 * ROWS) / ROWS, F32, [ROWS, 2]),
    }
    write(here / "base", {"big.weight": tensor(np.arange(ROWS * 512) / 1000, F32, [ROWS, 512])})
    write(here / "lora", factors)
    (here / "lora" / "model.safetensors").rename(here / "lora" / "adapter_model.safetensors")
    (here / "lora" / "adapter_config.json").write_text(json.dumps(peft))
    memory.put(str(here / "base"), "/m/base", recursive=True)
    memory.put(str(here / "lora"), "/m/lora", recursive=True)
    for out, base, lora in (("local", "base", "lora"), ("out", "memory://m/base", "memory://m/lora")):
        fastinterp.merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{lora}:0.5"}]}, out)
    assert data("out") == data("local") != data("base")


def test_components(memory, here):
    """Of a pipeline, folders are read too."""
    for name, seed in (("p", 1), ("q", 2)):
        (here / name).mkdir()
        model(here / name / "unet", seed)
        (here / name / "unet" / "model.safetensors").rename(
            here / name / "unet" / "diffusion_pytorch_model.safetensors"
        )
        index = {"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"]}
        (here / name / "model_index.json").write_text(json.dumps(index))
        memory.put(str(here / name), f"/m/{name}", recursive=True)
    fastinterp.interpolate("p", "q", 0.5, "local")
    fastinterp.interpolate("memory://m/p", "memory://m/q", 0.5, "out")
    name = "unet/diffusion_pytorch_model.safetensors"
    assert Path("out", name).read_bytes()[-1000:] == Path("local", name).read_bytes()[-1000:]


def test_the_hub_by_addresses(here):
    """hf:// and its pages are Hub ids; a file there is a file."""
    with hub_server() as hub, in_this_process(hub, here / "cache"):
        commit = hub.add("org/a", here / "a")
        for name in ("hf://org/a", f"hf://org/a@{commit}", "https://huggingface.co/org/a", "hf://org/a/model.safetensors",
                     f"https://huggingface.co/org/a/blob/{commit}/model.safetensors"):  # fmt: skip
            found = open_checkpoint(name)
            assert (
                list(found.tensors) == ["a", "big"] and found.snapshot is not None and found.snapshot.commit == commit
            )
        fastinterp.interpolate("hf://org/a", "b", 0.5, "out", stream=True)
        fastinterp.interpolate("a", "b", 0.5, "local")
        assert data("out") == data("local")
        assert largest(here / "cache") < 1000
        with pytest.raises(CheckpointError, match="hf://org/none: the Hub has no such model"):
            open_checkpoint("hf://org/none")


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_faults_that_pass(server, monkeypatch):
    """Of every range the first answer is 503, and the second ends early."""
    seen: dict = {}

    def fail(path, span):
        seen[path, span] = count = seen.get((path, span), 0) + 1
        return {1: 503, 2: 70_000}.get(count) if span and span[1] - span[0] > 1000 else None

    server.fail = fail
    monkeypatch.setattr("fastinterp.checkpoint.http_ranges.time.sleep", lambda seconds: None)
    fastinterp.interpolate("a", "b", 0.5, "local")
    fastinterp.interpolate(f"{server.url}/a", "b", 0.5, "out")
    assert data("out") == data("local")
    assert max(seen.values()) >= 3


def test_tries_are_told_once(server, monkeypatch):
    """On stderr, with the reason and how many are left; no more often, however many requests fail; not if --quiet."""
    told = retries._told
    monkeypatch.setattr("fastinterp.checkpoint.http_ranges.time.sleep", lambda seconds: None)
    server.fail = lambda path, span: 503
    for more, lines in (([], 1), ([], 0), (["--quiet"], 0)):
        if lines or more:
            told.clear()
        done = CliRunner().invoke(
            commands, ["interpolate", f"{server.url}/a", f"{server.url}/b", "--alpha", "0.5", "-o", "out", *more]
        )
        said = " ".join(done.stderr.split())
        assert done.exit_code == 4 and said.count("Trying again") == lines, said
        assert "503 Service Unavailable, 5 times in a row. Try again later" in said
        if lines:
            assert f"{server.url}/a: the server answers 503 Service Unavailable. Trying again, 4 times at most" in said
    told.clear()
    done = CliRunner().invoke(commands, ["inspect", "http://127.0.0.1:1/a"])
    assert "http://127.0.0.1:1/a: Connection refused. Trying again, 4 times at most" in " ".join(done.stderr.split())


class Flaky(MemoryFileSystem):
    """Every read fails some times, or for ever."""

    protocol, cachable = "flaky", False
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    failures, asked = 0, 0
    error: Exception = TimeoutError("no answer from flaky://me:5ec4e7@h/x?sig=5ec4e7")

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://"))

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.asked += 1
        if Flaky.asked <= Flaky.failures:
            raise Flaky.error
        return super().cat_file(path, start, end, **kwargs)


@pytest.fixture
def flaky(here, monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(Flaky, "asked", 0)
    monkeypatch.setattr("fastinterp.checkpoint.url_store.time.sleep", lambda seconds: None)
    fs = Flaky()
    clear(fs)
    fs.put(str(here / "a"), "/m/a", recursive=True)
    return fs


def test_a_store_that_fails_some_times(flaky, monkeypatch):
    monkeypatch.setattr(Flaky, "failures", 4)
    assert list(open_checkpoint("flaky://m/a").tensors) == ["a", "big"]


def test_a_store_that_stays_away(flaky, monkeypatch):
    """Its error is told without what it may not say."""
    monkeypatch.setattr(Flaky, "failures", 10**9)
    with pytest.raises(StorageError, match=r"flaky://m/a/.*: no answer from .*, 5 times in a row. Try again") as error:
        open_checkpoint("flaky://m/a")
    assert "5ec4e7" not in str(error.value)


@pytest.mark.parametrize("error", [PermissionError("Forbidden"), OSError("An error: AccessDenied")])
def test_a_store_that_refuses(flaky, monkeypatch, error):
    """At once."""
    monkeypatch.setattr(Flaky, "failures", 10**9)
    monkeypatch.setattr(Flaky, "error", error)
    with pytest.raises(StorageError, match=r"flaky://m/a/.*: access is refused"):
        open_checkpoint("flaky://m/a")
    assert Flaky.asked <= 2


def test_a_file_that_changes(memory, monkeypatch):
    """In fsspec's stores it shows when all is read, over HTTP with every answer: nothing is written."""
    from fastinterp.checkpoint.url_store import FsspecFile

    read = FsspecFile.read_into
    changed: list = []

    def replace(file, view, offset):
        read(file, view, offset)
        if len(view) > 100_000 and not changed:
            changed.append(memory.pipe("/m/a/model.safetensors", memory.cat("/m/a/model.safetensors")))

    monkeypatch.setattr(FsspecFile, "read_into", replace)
    with pytest.raises(CheckpointError, match=r"memory://m/a/model.safetensors: it changed while it was being read"):
        fastinterp.interpolate("memory://m/a", "memory://m/b", 0.5, "out")
    assert changed and not os.path.exists("out")


def test_an_input_that_changed_since_the_merge(memory):
    """verify and the receipt: the same bytes, in another version."""
    fastinterp.interpolate("memory://m/a", "memory://m/b", 0.5, "out")
    assert fastinterp.verify("out", full=True).ok
    memory.pipe("/m/a/model.safetensors", memory.cat("/m/a/model.safetensors"))
    assert "model.safetensors is another version there" in fastinterp.verify("out").summary()


def test_a_server_without_ranges(server):
    server.ranges = False
    with pytest.raises(StorageError, match=r"/a/model.safetensors: the server does not send parts of files"):
        fastinterp.interpolate(f"{server.url}/a/model.safetensors", "b", 0.5, "out")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("memory://m/none", "memory://m/none: there is no such file or folder"),
        ("memory://m/a/none.safetensors", "there is no such file or folder"),
        ("memory://", "memory://: this address names no model"),
        ("memory://m/a/config.json", "this file is not a checkpoint"),
        ("s3:/m/a", "there is no such folder or file. Did you mean `s3://m/a`"),
        ("memroy://m/a", "fsspec knows no protocol `memroy`. Did you mean `memory://`"),
        ("http://127.0.0.1:1/a", "it cannot be reached: Connection refused"),
        ("http://SERVER/none", "/none: the server lists no files there"),
        ("http://SERVER/none.safetensors", "404 Not Found: there is no such file"),
    ],
)
def test_names_of_nothing(memory, server, monkeypatch, name, message):
    monkeypatch.setattr("fastinterp.checkpoint.http_ranges.time.sleep", lambda seconds: None)
    with pytest.raises((CheckpointError, StorageError), match=message):
        open_checkpoint(name.replace("SERVER", server.url.partition("://")[2]))


def test_folders_of_models(memory, server):
    """The message has the names of what is there."""
    for url in ("memory://m", server.url):
        with pytest.raises(CheckpointError, match="there are no files of weights, but the folders `a`, `b`"):
            open_checkpoint(url)


def test_damage_is_told_with_the_address(memory):
    memory.pipe("/m/a/model.safetensors", b"\0" * 100)
    with pytest.raises(CheckpointError, match=r"memory://m/a/model.safetensors: it begins with zeros"):
        open_checkpoint("memory://m/a")


def test_revisions_are_the_hubs(memory):
    model = {"path": "memory://m/a", "revision": "v1"}
    recipe = {"merge_method": "passthrough", "models": [{"model": {"model": model}}]}
    with pytest.raises(RecipeError, match=r"`revision` is that of a model on the Hub"):
        fastinterp.merge(recipe, "out")


def test_packages_that_are_missing(here):
    """The message has the command; nothing of fsspec is imported for other names."""
    code = """
import sys
sys.modules["s3fs"] = None
from fastinterp.checkpoint.open import open_checkpoint
open_checkpoint("a")
assert "fsspec" not in sys.modules
try:
    open_checkpoint("s3://bucket/a")
except Exception as error:
    print(error)
sys.modules["fsspec"] = None
try:
    open_checkpoint("memory://m/a")
except Exception as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "s3://bucket/a: this needs s3fs. Install it: `pip install s3fs`",
        "memory://m/a: this needs fsspec. Install it: `pip install fsspec`",
    ]


def test_offline(memory, server):
    from fastinterp.checkpoint import hub

    with hub.one_run():
        hub.refuse("--offline was given")
        assert open_checkpoint("memory://m/a").tensors
        with pytest.raises(CheckpointError, match=r"nothing is read from there: --offline was given"):
            open_checkpoint(f"{server.url}/a")
    done = CliRunner().invoke(commands, ["inspect", f"{server.url}/a", "--offline", "--json"])
    assert '"kind": "OfflineError"' in done.output and done.exit_code == 3
    assert server.asked == []


@pytest.mark.parametrize("command", [["verify", "out"], ["replay", "out", "again"]], ids=lambda words: words[0])
def test_receipts_ask_nobody_offline(server, here, command):
    """A receipt comes with an output, from whoever made that, and names addresses."""
    fastinterp.merge(ties(f"{server.url}/a", "b"), "out")
    server.asked.clear()
    done = CliRunner().invoke(commands, [*command, "--offline"])
    assert done.exit_code == 3 and "nothing is read from there: --offline was given" in done.output + done.stderr
    assert server.asked == [] and not (here / "again").exists()
    server.asked.clear()
    assert CliRunner().invoke(commands, command).exit_code == 0 and server.asked


# --- logins ----------------------------------------------------------------------------------------------------------


def test_logins_are_used_and_not_shown(server, here, capfd):
    """User and password, and a signature: in no file of the output, and in nothing that is printed."""
    server.login = "Basic bWU6NWVjNGU3"  # me:5ec4e7
    host = server.url.partition("://")[2]
    a, b = f"http://me:5ec4e7@{host}/a/model.safetensors?X-Amz-Signature=abcd5ec4e7", f"http://me:5ec4e7@{host}/b"
    (here / "recipe.yml").write_text(json.dumps(ties(a, b)))
    fastinterp.merge("recipe.yml", "out")
    fastinterp.merge(ties("a", "b"), "local")
    assert data("out") == data("local")
    assert all("X-Amz-Signature=abcd5ec4e7" in path for path, _ in server.asked if path.startswith("/a/model."))
    for path in Path("out").iterdir():
        assert b"5ec4e7" not in path.read_bytes()
    program = [sys.executable, "-m", "fastinterp"]
    missing = f"http://me:5ec4e7@{host}/none.safetensors"
    commands = (
        ["diff", a, b, "--json"],
        ["check", "recipe.yml"],
        ["inspect", missing],
        ["merge", a, b],
        ["inspect", "x", a],
    )
    for arguments in commands:
        done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
        assert done.stdout + done.stderr and "5ec4e7" not in done.stdout + done.stderr, arguments
    server.login = "Basic other"
    with pytest.raises(StorageError, match=r"401 .*: it needs a login") as error:
        open_checkpoint(a)
    assert "5ec4e7" not in str(error.value)


def test_temporary_folders_go(here, server):
    """When the program ends, also by an error."""
    environment = {**os.environ, "TMPDIR": str(here / "tmp")}
    for arguments, code in ((["inspect", f"{server.url}/a"], 0), (["diff", f"{server.url}/a", "none"], 3)):
        program = [sys.executable, "-m", "fastinterp", *arguments]
        done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == code, done.stderr
        assert os.listdir(here / "tmp") == []
