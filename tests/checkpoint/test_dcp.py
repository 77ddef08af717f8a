"""Checkpoints of torch.distributed.checkpoint: pieces of tensors, refused; and how they become whole."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastinterp import interpolate, load
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from tests.support.remedies import follow

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch warns of is its own


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(name))
    return str(caught.value)


# Two processes, each with half of the rows of every tensor.
_SAVE = """
import os, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for k, name in enumerate("ab"):
    full = {f"layers.{i}.weight": torch.arange(32.0).reshape(8, 4) * (k + i + 1) for i in range(2)}
    state = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in full.items()}
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(path=f"hf_{name}", save_distributed=True))
    dcp.save(state, checkpoint_id=f"dcp_{name}")
    dcp.save({"model": state, "step": 3}, checkpoint_id=f"nested_{name}")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # not through the destructors: on a busy machine, threads that gloo has left abort one exit in ten
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    pytest.importorskip("torch.distributed.checkpoint")
    folder = tmp_path_factory.mktemp("dcp")
    (folder / "save.py").write_text(_SAVE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "save.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def full(k: int) -> dict[str, np.ndarray]:
    return {f"layers.{i}.weight": np.arange(32, dtype="f4").reshape(8, 4) * (k + i + 1) for i in range(2)}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, x in got.items():
        np.testing.assert_array_equal(x, want[name])


@pytest.mark.slow
def test_pieces_are_joined_by_the_remedy(tmp_path, monkeypatch, saved):
    """The folder and each file in it; what torch joins merges."""
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copytree(saved / f"hf_{name}", f"hf_{name}")
    pieces = sorted(Path("hf_a").glob("*.safetensors"))
    assert len(pieces) == 2 and load_file(pieces[0])["layers.0.weight"].shape == (4, 4)
    message = refusal("hf_a")
    assert message.startswith(f"{pieces[0]}: it holds a piece of every tensor, as torch.distributed.checkpoint writes")
    assert refusal(pieces[0]) == message
    with pytest.raises(CheckpointError, match="it holds a piece of every tensor"):
        interpolate(pieces[1], Path("hf_b") / pieces[1].name, 0.5, "out")
    for k, name in enumerate("ab"):
        follow(refusal(f"hf_{name}"), monkeypatch, NEW=name)
        assert_same({n: x for f in Path(name).glob("*.safetensors") for n, x in load_file(f).items()}, full(k))
    interpolate("a", "b", 0.5, "out")
    merged = {n: x for f in Path("out").glob("*.safetensors") for n, x in load_file(f).items()}
    assert_same(merged, {n: (x + full(1)[n]) / 2 for n, x in full(0).items()})
    # Joined into their own folder, the joined file counts.
    follow(message, monkeypatch, NEW="hf_a")
    found = open_checkpoint("hf_a")
    assert [entry.shape for entry in found.tensors.values()] == [(8, 4)] * 2
    assert "left out of hf_a: `shard-00001-model-00001-of-00001.safetensors`" in found.remarks[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dcp", "nested", "trainer"])
def test_distcp_folders(tmp_path, monkeypatch, saved, kind):
    """Torch joins the files, and what it writes is read. FSDP's trainers put them into folders."""
    monkeypatch.chdir(tmp_path)
    if kind == "trainer":
        shutil.copytree(saved / "nested_a", "a/pytorch_model_fsdp_0")
        shutil.copytree(saved / "nested_b", "a/optimizer_0")
    else:
        shutil.copytree(saved / f"{kind}_a", "a")
    message = refusal("a")
    assert "the folder is a checkpoint of torch.distributed.checkpoint. Join its files first: " in message
    if kind != "trainer":
        assert refusal("a/__0_0.distcp").partition(": the")[2] == message.partition(": the")[2]
    follow(message, monkeypatch)
    named = message.rpartition("then name ")[2]
    assert len(open_checkpoint(named).tensors) == 2
    assert_same(load(named, framework="numpy"), full(0))


def test_pieces_are_known_by_their_metadata(tmp_path):
    """Whatever the file is called, and in a folder that has an index, too."""
    for name in ("model.safetensors", "x.safetensors"):
        save_file(
            {"w": np.ones((2, 2), "f4")}, tmp_path / name, {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'}
        )
        assert "it holds a piece of every tensor" in refusal(tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "x.safetensors"}}')
    (tmp_path / "model.safetensors").unlink()
    assert "it holds a piece of every tensor" in refusal(tmp_path)
