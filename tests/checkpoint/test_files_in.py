"""Checkpoints in: folders, indexes, Hub names."""

from __future__ import annotations

import json
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fastinterp.checkpoint import hub
from fastinterp.checkpoint.header import read_header
from fastinterp.checkpoint.open import changed_since, open_checkpoint
from fastinterp.errors import CheckpointError, OutputError
from fastinterp.output import hub_upload


def put(folder: Path, name: str, *tensors: str) -> None:
    folder.mkdir(exist_ok=True)
    save_file({t: np.full(2, i, "f4") for i, t in enumerate(tensors)}, folder / name)


def put_index(folder: Path, weight_map: object, name: str = "model.safetensors.index.json") -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = tmp_path / "sharded"
    put(folder, SHARDS[0], "a", "b")
    put(folder, SHARDS[1], "c")
    put_index(folder, {"c": SHARDS[1], "a": SHARDS[0], "b": SHARDS[0]})
    return folder


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(name))
    return str(caught.value)


def test_open_folder_with_index(sharded):
    found = open_checkpoint(str(sharded))
    assert found.name == str(sharded) and found.root == sharded and found.index and found.nbytes == 24
    assert [p.name for p in found.files] == SHARDS
    assert {n: e.file for n, e in found.tensors.items()} == {"a": 0, "b": 0, "c": 1}
    assert found.inputs == (sharded, *found.files)
    assert open_checkpoint(f"{sharded}/model.safetensors.index.json").tensors == found.tensors


def test_open_single_file_and_its_folder(tmp_path):
    """A folder with one file and the file itself give the same tensors; only the first claims the folder."""
    put(tmp_path / "m", "weights.safetensors", "a")
    folder, file = open_checkpoint(str(tmp_path / "m")), open_checkpoint(str(tmp_path / "m" / "weights.safetensors"))
    assert folder.tensors == file.tensors and folder.files == file.files == file.inputs
    assert not file.index and file.root == tmp_path / "m" and folder.inputs[0] == tmp_path / "m"


def test_open_other_index_name_and_home(tmp_path, monkeypatch):
    """Diffusers calls its index otherwise; `~` is the home folder."""
    put(tmp_path / "m", "diffusion_pytorch_model-00001-of-00001.safetensors", "a")
    put_index(
        tmp_path / "m",
        {"a": "diffusion_pytorch_model-00001-of-00001.safetensors"},
        "diffusion_pytorch_model.safetensors.index.json",
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(open_checkpoint("~/m").tensors) == ["a"]


def test_open_several_files_without_index(tmp_path):
    """Files whose names differ in a number are one checkpoint; metadata is the first one's where they disagree."""
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"a": np.ones(1, "f4")}, folder / "weights.00.safetensors", metadata={"k": "1"})
    save_file({"b": np.ones(1, "f4")}, folder / "weights.01.safetensors", metadata={"k": "2", "l": "3"})
    found = open_checkpoint(str(folder))
    assert sorted(found.tensors) == ["a", "b"] and not found.index and found.metadata == {"k": "1", "l": "3"}


def test_same_tensor_in_two_files(tmp_path):
    put(tmp_path / "m", "rank0.safetensors", "a", "b")
    put(tmp_path / "m", "rank1.safetensors", "b")
    message = refusal(tmp_path / "m")
    assert "tensor `b` is in `rank0.safetensors` and in `rank1.safetensors`, and no index says which counts" in message
    assert "If each has a piece of every tensor, join them first" in message


def test_shards_without_index_must_be_complete(sharded):
    """Without its index a complete set of shards opens, and an incomplete one does not, were it one single file."""
    (sharded / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(str(sharded)).tensors) == 3
    (sharded / SHARDS[0]).unlink()
    assert f"1 of 2 shards are there, and no index; missing: `{SHARDS[0]}`" in refusal(sharded)


def test_a_name_may_claim_any_number_of_shards(tmp_path):
    """Judged by counting: a set as large as the claim would take gigabytes. Numbers from 1 up, each there."""
    put(tmp_path / "m", "model-00001-of-20000000.safetensors", "a")
    tracemalloc.start()
    try:
        message = refusal(tmp_path / "m")
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert "1 of 20000000 shards are there, and no index; missing: `model-00002-of-20000000.safetensors`" in message
    for name in ("00000", "00002"):
        put(tmp_path / "zero", f"model-{name}-of-00002.safetensors", f"t{name}")
    assert "2 of 2 shards are there, and no index; missing: `model-00001-of-00002" in refusal(tmp_path / "zero")


def test_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    assert "1 of 2 files that `model.safetensors.index.json` names are missing: `model-00002" in refusal(sharded)


def test_dangling_link_is_a_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    (sharded / SHARDS[1]).symlink_to("gone")
    assert "are missing: `model-00002" in refusal(sharded)


def test_all_tensors_of_an_index_must_be_there(sharded):
    put_index(sharded, {"a": SHARDS[0], "b": SHARDS[0], "c": SHARDS[1], "d": SHARDS[1]})
    message = refusal(sharded)
    assert message.startswith(str(sharded / SHARDS[1]))
    assert "tensor `d` is in `model.safetensors.index.json` but not in this file" in message


@pytest.mark.parametrize(
    "target",
    ["../o/x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "a\\x.safetensors", "..", "", "a\0.safetensors"],
)
def test_weight_map_cannot_leave_the_folder(sharded, target):
    put_index(sharded, {"a": target})
    assert "`weight_map` puts tensor `a` into" in (message := refusal(sharded))
    assert "only a plain file name in the same folder is allowed" in message


def test_weight_map_of_odd_types(sharded):
    for weight_map, expected in (
        ([], "the index has no `weight_map` object"),
        ({"a": 5}, "`weight_map` puts tensor `a` into `5`, which is not a file name"),
        ({"a": "x.onnx"}, "expected a file of .safetensors, .bin, "),
        ({}, "the checkpoint has no tensors"),
    ):
        put_index(sharded, weight_map)
        assert expected in refusal(sharded)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "the index must start with"), (b"{", "the index is not JSON"), (b"{}", "the index has no `weight_map`"),
     (b'{"weight_map": {"a": "x", "a": "y"}}', "the index names `a` twice")],
)  # fmt: skip
def test_bad_index(sharded, content, expected):
    (sharded / "model.safetensors.index.json").write_bytes(content)
    message = refusal(sharded)
    assert message.startswith(str(sharded / "model.safetensors.index.json")) and expected in message


def test_index_that_is_no_file_or_too_large(sharded):
    """A named pipe neither hangs nor opens, and gigabytes are not read."""
    index = sharded / "model.safetensors.index.json"
    with open(index, "r+b") as stream:
        stream.truncate(5 * 10**9)
    assert f"{index}: the file has 5000000000 bytes, more than the allowed 100000000" in refusal(sharded)
    index.unlink()
    os.mkfifo(index)
    assert f"{index}: this is not a regular file" in refusal(sharded)
    index.unlink()
    index.symlink_to("/dev/zero")
    assert f"{index}: this is not a regular file" in refusal(sharded)


def test_two_indexes(sharded):
    """What could mean two checkpoints is refused; naming an index decides."""
    (sharded / "model.safetensors.index.json").rename(sharded / "x.safetensors.index.json")
    put_index(sharded, {"c": SHARDS[1]}, "y.safetensors.index.json")
    for file in SHARDS:
        (sharded / file).rename(sharded / file.replace("model", "x"))
    put_index(
        sharded,
        {t: f"x-0000{i}-of-00002.safetensors" for t, i in (("a", 1), ("b", 1), ("c", 2))},
        "x.safetensors.index.json",
    )
    message = refusal(sharded)
    assert "not clear which files make the model: `x.safetensors.index.json`, `y.safetensors.index.json`" in message
    assert message.endswith(f"Name one: {sharded / 'x.safetensors.index.json'}")
    assert len(open_checkpoint(str(sharded / "x.safetensors.index.json")).tensors) == 3


def test_links_to_files_outside_are_fine(sharded, tmp_path):
    """The Hub's cache keeps links to blobs in the folder."""
    (tmp_path / "blobs").mkdir()
    (sharded / SHARDS[0]).rename(tmp_path / "blobs" / "123abc")
    (sharded / SHARDS[0]).symlink_to("../blobs/123abc")
    assert len(open_checkpoint(str(sharded)).tensors) == 3


def test_folder_without_weights(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    assert "the folder has no .safetensors file; it is empty" in refusal(folder)
    (folder / ".model.safetensors.partial-0123456789ab").touch()
    assert "only those of a merge that did not finish" in refusal(folder)
    (folder / "notes.txt").touch()
    assert "the folder has no .safetensors file, only those of a merge" in refusal(folder)
    put(folder / "unet", "x.safetensors", "a")
    assert "but `unet` in it do: name one of them" in refusal(folder)
    (folder / "model.gguf").touch()
    assert "model.gguf: the file is empty" in refusal(folder)
    (folder / "model.gguf").unlink()
    (folder / "model.ggml").touch()
    assert "only `model.ggml`: this format is not read" in refusal(folder)
    (folder / "pytorch_model.bin").touch()
    assert "pytorch_model.bin: the file is empty" in refusal(folder)
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")
    assert "only `training_args.bin`, which by their names hold no weights. If one does: name" in refusal(folder)
    assert "this format is not read" in refusal(folder / "model.ggml")
    assert "this file is not a checkpoint" in refusal(folder / "notes.txt")


def test_empty_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert "the checkpoint has no tensors" in refusal(path)


def test_missing_folder_suggests_a_similar_path(tmp_path):
    put(tmp_path / "llama-base", "x.safetensors", "a")
    message = refusal(tmp_path / "lama-base")
    assert message == f"{tmp_path}/lama-base: there is no such folder or file. Did you mean `{tmp_path}/llama-base`?"
    put(tmp_path / "llama-base" / "ft1", "x.safetensors", "a")
    assert f"Did you mean `{tmp_path}/llama-base/ft1`?" in refusal(tmp_path / "lama-base" / "ft1")
    assert "there is no such folder or file" in refusal(tmp_path / "a" / "b" / "c")
    assert "there is no such folder or file" in refusal("")
    assert "there is no such folder or file" in refusal("a\0b")


def test_unreadable_file_is_an_error(tmp_path, monkeypatch):
    """Permission errors become CheckpointError (simulated: the tests may run as root)."""
    put(tmp_path / "m", "x.safetensors", "a")

    def denied(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastinterp.checkpoint.header.os.open", denied)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: the file cannot be opened: Permission denied"):
        read_header(tmp_path / "m" / "x.safetensors")


def test_changed_since(sharded):
    """Touched, replaced and removed files are all noticed; untouched ones are not."""
    found = open_checkpoint(str(sharded))
    assert changed_since(found) == []
    os.utime(found.files[0], ns=(1, 1))
    assert changed_since(found) == [found.files[0]]
    found = open_checkpoint(str(sharded))
    old = found.files[1].stat()
    replacement = sharded / "new"
    replacement.write_bytes(found.files[1].read_bytes())
    os.utime(replacement, ns=(old.st_atime_ns, old.st_mtime_ns))
    replacement.rename(found.files[1])
    assert changed_since(found) == [found.files[1]]
    found = open_checkpoint(str(sharded))
    old = found.files[1].stat()
    with open(
        found.files[1], "r+b"
    ) as stream:  # in place, with the old time: the time of the change of its inode tells
        stream.seek(-1, os.SEEK_END)
        stream.write(b"x")
    os.utime(found.files[1], ns=(old.st_atime_ns, old.st_mtime_ns))
    assert changed_since(found) == [found.files[1]]
    found.files[0].unlink()
    assert changed_since(found) == list(found.files)


# Hub names


def test_hub_names():
    assert hub.parse("org/name") == ("org/name", None)
    assert hub.parse("gpt2") == ("gpt2", None)
    assert hub.parse("org/name-7B.v1_x@refs/pr/3") == ("org/name-7B.v1_x", "refs/pr/3")
    for path in ("./x", "/x", "a/b/c", "../x", "~/x", "x/", "a//b", "", " ", "a b", "a..b/c", "a--b/c", "x@",
                 "org/x@/y", "x.safetensors", "org/x.safetensors", "a\nb", "-x", "org/" + "x" * 97):  # fmt: skip
        assert hub.parse(path) is None, path


SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline_cache(tmp_path, monkeypatch) -> Path:
    """A Hub cache with one model, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    repo = tmp_path / "cache" / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(SHA)
    (repo / "snapshots" / SHA).mkdir(parents=True)
    (repo / "blobs").mkdir()
    put(repo / "blobs", "1.safetensors", "a")
    (repo / "snapshots" / SHA / "model.safetensors").symlink_to("../../blobs/1.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return repo / "snapshots" / SHA


def test_hub_id_from_the_cache_when_offline(offline_cache):
    for name in ("org/name", "org/name@main", f"org/name@{SHA}"):
        found = open_checkpoint(name)
        assert list(found.tensors) == ["a"] and found.name == name and found.root == offline_cache


def test_hub_id_not_in_the_cache(offline_cache):
    message = refusal("org/other")
    assert message.startswith("org/other: there is no such folder here. As a Hub id: HF_HUB_OFFLINE is set, and")
    assert message.endswith("does not hold it. Download it first, where there is a connection: `hf download org/other`")


def test_a_local_folder_wins_over_the_hub(offline_cache, tmp_path):
    (tmp_path / "org").mkdir()
    put(tmp_path / "org" / "name", "x.safetensors", "local")
    assert list(open_checkpoint("org/name").tensors) == ["local"]


def test_a_mistyped_path_is_no_matter_of_the_hub(offline_cache, tmp_path):
    """One sentence, where the folder is here that it should be in, or a name that is like it; or without a `/`."""
    (tmp_path / "org").mkdir()
    put(tmp_path / "org" / "name", "x.safetensors", "local")
    assert refusal("org/nane") == "org/nane: there is no such folder or file. Did you mean `org/name`?"
    assert refusal("or/name") == "or/name: there is no such folder or file. Did you mean `org/name`?"
    assert refusal("org/other") == "org/other: there is no such folder or file."
    assert refusal("other") == "other: there is no such folder or file."
    assert "`hf download elsewhere/other`" in refusal("elsewhere/other")


def test_broken_connection_falls_back_to_the_cache(offline_cache, monkeypatch):
    """An error of the HTTP library itself, not of the Hub, is answered from the cache if it can be."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    asked = []

    def broken(self, repo, **_):
        asked.append(repo)
        raise ConnectionError("Got: ConnectError: proxy says no")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", broken)
    assert list(open_checkpoint("org/name").tensors) == ["a"]
    assert asked == ["org/name"]
    assert "the Hub cannot be reached (proxy says no)" in refusal("org/other")


def test_hub_client_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        hub.find("org/name")
    with pytest.raises(OutputError, match=r"org/name: this needs .* pip install huggingface_hub"):
        hub_upload.Upload("org/name", "out")


def test_small_files_of_the_hub():
    """Weights are none of them. Code that belongs to a model is fetched, and never run."""
    names = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "x.tiktoken", "sub/config.json",
             "model.safetensors.index.json", "modeling.py", "tokenizer.py", "LICENSE", "bpe.codes"]  # fmt: skip
    others = ["model.safetensors", "pytorch_model.bin", "x.pt", "m.gguf", "image.png", ".hidden.json"]
    assert [name for name in names + others if hub.is_small(name, 1)] == names
    assert not hub.is_small("vocab.json", 10**9)
