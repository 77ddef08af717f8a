"""Files of torch.save: the tensors that torch loads, byte for byte, and which tensors of a file are chosen."""

from __future__ import annotations

import argparse
import io
import os
import pathlib
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastinterp.checkpoint.open import Checkpoint, open_checkpoint
from fastinterp.errors import CheckpointError
from tests.support import torch_files as made
from tests.support.remedies import commands, follow
from tests.support.torch_files import mapping, pickled, view

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")

DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e8m0fnu"),
    *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool", "complex64"),
)


def refusal(path: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    return str(caught.value)


def raw(tensor: Any) -> bytes:
    """The elements of a tensor of torch, one after the other."""
    whole = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())  # contiguous, whatever `tensor` is
    if not whole.numel():
        return b""
    data: bytes = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def found(path: Path) -> tuple[dict[str, bytes], Checkpoint]:
    """The bytes of every tensor, as they are read, and the checkpoint."""
    checkpoint = open_checkpoint(str(path))
    content = path.read_bytes()
    tensors = {}
    for name, e in checkpoint.tensors.items():
        plain = content[e.start : e.start + e.nbytes]
        tensors[name] = plain if e.conversion is None else b"".join(e.conversion.pieces(str(path)))
        assert len(tensors[name]) == e.nbytes == e.dtype.nbytes(e.numel)
    return tensors, checkpoint


def assert_read(path: Path, state: dict[str, Any] | None = None) -> Checkpoint:
    """The file has the tensors that torch loads, or these, by the same names."""
    want = torch.load(path, map_location="cpu", weights_only=True) if state is None else state
    tensors, checkpoint = found(path)
    assert tensors == {name: raw(t) for name, t in want.items() if torch.is_tensor(t)}
    for name, e in checkpoint.tensors.items():
        assert (f"torch.{e.dtype.library_name}", e.shape) == (str(want[name].dtype), tuple(want[name].shape))
    return checkpoint


def numbers(dtype: str, *shape: int) -> Any:
    bits = torch.randint(0, 2, shape, dtype=torch.uint8) if dtype == "bool" else None
    if bits is not None:
        return bits.bool()
    kind = getattr(torch, dtype)
    size = torch.empty(0, dtype=kind).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(kind)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def state_dict() -> dict[str, Any]:
    """Tensors of every dtype, and of every way to view a storage."""
    state: dict[str, Any] = {f"dtypes.{d}": numbers(d, 3, 4) for d in DTYPES}
    a, cube = torch.randn(7, 12), torch.randn(3, 4, 5, 6)
    state |= {
        "a": a, "tied": a, "row": a[2], "rows": a[2:5], "column": a[:, 3], "columns": a[:, 3:9], "transposed": a.T,
        "every second": a[::2, 1::3], "cube": cube, "permuted": cube.permute(2, 0, 3, 1), "half": cube[1:, :, 2:, ::2],
        "channels last": cube.to(memory_format=torch.channels_last), "expanded": a[:, :1].expand(7, 5),
        "expanded outside": a[0].expand(3, 2, 12), "one row": a[:1].T, "windows": torch.randn(20).unfold(0, 6, 2),
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "empty view": a[7:], "single": a[3:4, 4:5],
        "parameter": torch.nn.Parameter(a[1:3]), "buffer": torch.nn.Buffer(a[3:4]),
        "bool view": numbers("bool", 4, 4).T,
        "complex view": numbers("complex64", 4, 4).T, "bf16 view": numbers("bfloat16", 64, 65)[1:, ::2].T,
        "an odd näme\n": torch.ones(2), "": torch.ones(3),
    }  # fmt: skip
    state["with attributes"] = torch.ones(2)
    state["with attributes"].kind = "note"
    state["number"] = torch.nn.Parameter(torch.tensor(1.0), requires_grad=False)
    return state


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_and_view(tmp_path, protocol):
    """Protocols other than 2 are read as well, by torch only without weights_only."""
    state = state_dict()
    torch.save(state, tmp_path / "x.pt", pickle_protocol=protocol)
    assert_read(tmp_path / "x.pt", None if protocol < 4 else state)


def test_ordered_dicts_with_metadata(tmp_path):
    """The state dict of a module, as torch makes it."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module.state_dict(), tmp_path / "x.bin")
    checkpoint = assert_read(tmp_path / "x.bin")
    assert sorted(checkpoint.tensors) == sorted(module.state_dict()) and checkpoint.remarks == ()


def test_tied_tensors_are_read_from_one_place(tmp_path):
    a = torch.randn(5, 4)
    torch.save({"a": a, "b": a, "c": a[1:]}, tmp_path / "x.bin")
    tensors = assert_read(tmp_path / "x.bin").tensors
    assert tensors["a"].start == tensors["b"].start == tensors["c"].start - 16
    assert all(tensors[n].conversion is None and tensors[n].start % 64 in (0, 16) for n in "abc")


@pytest.mark.parametrize("cut", ["rows", "columns", "both"])
def test_views_larger_than_a_piece(tmp_path, monkeypatch, cut):
    """Converted in pieces: the same bytes, from reads and writes of a bounded size."""
    from fastinterp.checkpoint.pytorch import strided

    monkeypatch.setattr(strided, "_PIECE", 5000)
    monkeypatch.setattr(strided, "_PAGE", 64)
    x = torch.randn(60, 70, 3)
    pick = {"rows": x.permute(2, 1, 0), "columns": x.permute(1, 0, 2)[:, :, :2], "both": x.permute(1, 2, 0)[::2]}[cut]
    state = {"x": pick, "y": torch.randn(90, 40).T, "z": torch.randn(3, 40).T, "w": torch.randn(300, 300)[:, 7],
             "e": torch.randn(1, 500).expand(50, 500), "far": torch.randn(20, 3000)[:, :30]}  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    tensors = assert_read(tmp_path / "x.pt").tensors
    sizes = [len(p) for e in tensors.values() if e.conversion for p in e.conversion.pieces(str(tmp_path / "x.pt"))]
    assert max(sizes) <= 5000 and len(sizes) > 20


def test_a_view_that_is_truncated_meanwhile(tmp_path):
    torch.save({"x": torch.randn(64, 64).T}, tmp_path / "x.pt")
    conversion = open_checkpoint(str(tmp_path / "x.pt")).tensors["x"].conversion
    assert conversion is not None
    os.truncate(tmp_path / "x.pt", 2000)
    with pytest.raises(CheckpointError, match=r"are left at byte \d+: it was truncated or replaced"):
        list(conversion.pieces(str(tmp_path / "x.pt")))


@pytest.mark.parametrize("tool", ["stored by zipfile", "64 bits", "with folders"])
def test_zip_files_of_other_programs(tmp_path, tool):
    """Unpacked and packed again without compression, storages at any offset."""
    state = {"a": torch.randn(3, 5), "b": torch.randn(5, 5).T, "c": torch.arange(3)}
    torch.save(state, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        if tool == "with folders":
            new.mkdir("x")
        for name in old.namelist():
            with new.open(name, "w", force_zip64=tool == "64 bits") as stream:
                stream.write(old.read(name))
    tensors, _ = found(tmp_path / "y.pt")
    assert tensors == {name: raw(t) for name, t in state.items()}


def test_offsets_of_more_than_32_bits(tmp_path):
    """A storage behind a hole of 5 GB, which takes no room on the disk."""
    pickle, order, storage, version = made.archive(pickled(mapping({"w": view()})), {"0": bytes(range(16))})
    content = made.zipped([pickle, order, version, storage], wide=True)
    body, hole = content.rindex(b"PK\3\4"), 5 * 2**30
    rest = bytearray(content[body:])
    # The offset of the storage's header, of the directory, and of the directory's end.
    for at in (rest.rindex(struct.pack("<HH", 1, 24)) + 20, rest.index(b"PK\6\6") + 48, rest.index(b"PK\6\7") + 8):
        struct.pack_into("<Q", rest, at, struct.unpack_from("<Q", rest, at)[0] + hole)
    with open(tmp_path / "x.pt", "wb") as stream:
        stream.write(content[:body])
        stream.seek(hole, os.SEEK_CUR)
        stream.write(rest)
    entry = open_checkpoint(str(tmp_path / "x.pt")).tensors["w"]
    with open(tmp_path / "x.pt", "rb") as stream:
        assert entry.start > hole and os.pread(stream.fileno(), entry.nbytes, entry.start) == bytes(range(16))


# --- which tensors are the weights -----------------------------------------------------------------------------------

W = {"w": torch.ones(2), "b": torch.zeros(1)}
OTHER = {"w": torch.zeros(3)}
OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
CHOSEN: dict[str, tuple[Any, str]] = {
    "plain": (W, ""),
    "state_dict": (
        {"state_dict": W, "epoch": 3, "optimizer": OPTIMIZER},
        "its `state_dict` is read; left out: `epoch`",
    ),
    "model": ({"model": W, "rng_state": torch.get_rng_state(), "loss": torch.tensor(0.5)}, "its `model` is read"),
    "module": ({"module": W, "optimizer": {"m": torch.ones(5)}, "lr_scheduler": {}}, "its `module` is read"),
    "params_ema": ({"params_ema": OrderedDict(W)}, "its `params_ema` is read"),
    "any name": ({"generator": W, "iteration": 5, "best_acc": torch.tensor(0.5)}, "its `generator` is read"),
    "embedding": ({"string_to_token": {"*": 265}, "string_to_param": W, "name": "x", "step": 3}, "`string_to_param`"),
    "beside numbers": (
        {**W, "step": 3, "note": "x", "no": None, "list": [1]},
        "no tensors: `step`, `note`, `no`, `list`",
    ),
    "beside an optimizer": ({**W, "optimizer": {"m": torch.ones(5)}}, "no tensors: `optimizer`"),
    "integers": ({"ids": torch.arange(3)}, ""),
    "one of the config": ({"config": W, "step": 3}, "its `config` is read"),
}


@pytest.mark.parametrize("case", CHOSEN)
def test_what_is_chosen(tmp_path, case):
    value, remark = CHOSEN[case]
    torch.save(value, tmp_path / "x.ckpt")
    checkpoint = open_checkpoint(str(tmp_path / "x.ckpt"))
    assert set(checkpoint.tensors) == ({"ids"} if case == "integers" else {"w", "b"})
    assert remark in " ".join(checkpoint.remarks) if remark else checkpoint.remarks == ()
    assert all(r.startswith(f"{tmp_path / 'x.ckpt'}: ") for r in checkpoint.remarks)


AMBIGUOUS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "average": ({"params": W, "params_ema": OTHER}, "`params` (2 tensors), `params_ema` (1 tensors)", ("w", "b")),
    "two": ({"generator": W, "it's": OTHER, "optimizer": OPTIMIZER}, "`generator` (2 tensors), `it's`", ("w", "b")),
    "top": ({"x": torch.ones(3), "sub": W}, "the top level (1 tensors), `sub` (2 tensors)", ("w", "b")),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_files(tmp_path, monkeypatch, case):
    """The message names the choices, and a command that saves the first alone."""
    value, expected, names = AMBIGUOUS[case]
    monkeypatch.chdir(tmp_path)
    torch.save(value, "it's.pt")
    message = refusal("it's.pt")
    assert f"it has weights in several places: {expected}" in message
    follow(message, monkeypatch)
    assert set(open_checkpoint(message.rpartition("then name ")[2]).tensors) == set(names)


def test_files_without_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value, expected in (
        ({}, "it has no tensors by name, at the top or one level below. It holds nothing"),
        ({"epoch": 3, "deep": {"er": {"w": torch.ones(2)}}}, "It holds `epoch`, `deep`"),
        ([torch.ones(2)], "it does not hold the tensors of a model by name, in a dict"),
        ({0: torch.ones(2), "w": torch.ones(2)}, "the name of a tensor, `0`, is no string"),
        (OPTIMIZER, "it has no tensors by name"),
    ):
        torch.save(value, "x.pt")
        assert expected in refusal("x.pt")
    torch.save(torch.ones(2), "x.pt")
    message = refusal("x.pt")
    assert "it holds one tensor without a name" in message
    follow(message, monkeypatch)
    assert list(open_checkpoint("NEW.pt").tensors) == ["weight"]


def test_objects_of_trainers_are_passed_over(tmp_path):
    """What torch.load refuses with weights_only, and never makes here: settings beside the weights."""
    path = tmp_path / "last.ckpt"
    settings = argparse.Namespace(lr=0.1, path=pathlib.Path("x"), nested={"a": [np.float64(2.5), np.arange(3)]})
    value = {"state_dict": W, "hyper_parameters": settings, "date": __import__("datetime").date(2024, 1, 1)}
    torch.save(value, path)
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    checkpoint = assert_read(path, W)
    remarks = " ".join(checkpoint.remarks)
    assert (
        "left out: `hyper_parameters`, `date`" in remarks and "passed over: objects of `argparse.Namespace`" in remarks
    )
    # As Lightning saves its callbacks: an object of a class, by the class.
    kind = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
    callbacks = b"}" + made.named(kind) + mapping({"best": b"N"}) + b"s"
    made.put(path, pickled(mapping({"state_dict": mapping({"w": view()}), "callbacks": callbacks})), {"0": bytes(16)})
    assert f"passed over: objects of `{kind}`" in open_checkpoint(str(path)).remarks[1]


def test_ambiguous_files_with_objects_of_trainers(tmp_path, monkeypatch):
    """The command says that it runs what the file says."""
    monkeypatch.chdir(tmp_path)
    torch.save({"a": W, "b": OTHER, "x": argparse.Namespace()}, "x.pt")
    message = refusal("x.pt")
    assert "weights_only=False" in message and "only if you trust who made it" in message
    follow(message, monkeypatch)
    assert set(open_checkpoint("NEW.pt").tensors) == set(W)


UNREAD: dict[str, tuple[Callable[[], Any], str]] = {
    "complex128": (lambda: torch.zeros(2, dtype=torch.complex128), "of the dtype of ComplexDoubleStorage"),
    "complex32": (lambda: torch.zeros(2, dtype=torch.complex32), "of the dtype torch.complex32"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "a quantised tensor of torch"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "a tensor without data, of torch's meta device"),
    "conjugate": (lambda: torch.ones(2, dtype=torch.complex64).conj(), "a conjugate or negative view of another"),
    "fp4": (
        lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "of the dtype torch.float4_e2m1fn_x2",
    ),
}


@pytest.mark.parametrize("case", UNREAD)
def test_tensors_that_are_not_read(tmp_path, case):
    """Each by its name; beside the weights they do not matter."""
    make, what = UNREAD[case]
    tensor = make()
    torch.save({"w": torch.ones(2), "odd": tensor}, tmp_path / "x.pt")
    assert refusal(tmp_path / "x.pt") == f"{tmp_path / 'x.pt'}: tensor `odd` is {what}: not read"
    torch.save({"model": W, "optimizer": {"x": tensor}}, tmp_path / "x.pt")
    assert_read(tmp_path / "x.pt", W)


# --- files of other forms --------------------------------------------------------------------------------------------


class Small(torch.nn.Module):  # type: ignore[name-defined]
    """A module whose class is known here only."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.arange(3.0))

    def forward(self, x: Any) -> Any:
        return x + self.w


def legacy(path: str) -> None:
    torch.save({"w": torch.arange(3.0)}, path, _use_new_zipfile_serialization=False)


def torch_script(path: str) -> None:
    torch.jit.save(torch.jit.trace(Small(), torch.ones(3)), path)


def compressed(path: str) -> None:
    torch.save({"w": torch.arange(3.0)}, "stored.pt")
    with zipfile.ZipFile("stored.pt") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def big_endian(path: str) -> None:
    storage = {"0": np.arange(3, dtype=">f4").tobytes()}
    tensor = view(made.storage(numel=3), 0, (3,), (1,))
    entries = made.archive(pickled(mapping({"w": tensor})), storage, order=b"big")
    Path(path).write_bytes(made.zipped(entries))


OTHER_FORMS = {
    legacy: "torch before 1.6 wrote this file",
    torch_script: "this is a TorchScript archive",
    compressed: "the entries of this zip file are compressed",
    big_endian: "its numbers are big-endian",
}


@pytest.mark.slow
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_remedies(tmp_path, monkeypatch, form):
    """The command writes a file that is read, with the same tensors."""
    monkeypatch.chdir(tmp_path)
    form("it's.pt")
    message = refusal("it's.pt")
    assert OTHER_FORMS[form] in message and len(commands(message)) == 1
    follow(message, monkeypatch)
    assert_read(Path(message.rpartition("then name ")[2]), {"w": torch.arange(3.0)})


def test_other_forms_without_a_command(tmp_path):
    """A tar file of old torch is recognised: no torch of today reads one that is made here."""
    with tarfile.open(tmp_path / "x.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())
    assert "this is a tar file, as torch before 0.1.10 wrote" in refusal(tmp_path / "x.pt")
    torch.save(Small(), tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert f"it names `{Small.__module__}.Small`" in message and "torch.save(model.state_dict()" in message
    for content, expected in (
        (b"", "the file is empty"),
        (b"\x80\x04N.", "this is a pickle, not a file of torch.save, and pickles are never loaded"),
        (b"<!DOCTYPE html>", "this is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "this is a Git LFS pointer"),
        (b"garbage" * 100, "this is no zip file, as torch.save writes it"),
    ):
        (tmp_path / "x.pt").write_bytes(content)
        assert expected in refusal(tmp_path / "x.pt")


def test_called_by_the_wrong_suffix(tmp_path):
    torch.save(W, tmp_path / "x.pt")
    (tmp_path / "x.pt").rename(tmp_path / "x.safetensors")
    message = refusal(tmp_path / "x.safetensors")
    assert "this is a zip file, as torch.save writes" in message
    named = tmp_path / message.rpartition("Call it ")[2].strip("`")
    (tmp_path / "x.safetensors").rename(named)
    assert_read(named, W)
    (tmp_path / "x.pt").write_bytes(b"GGUF\3\0\0\0")
    assert "this is a GGUF file. Call it `x.gguf`" in refusal(tmp_path / "x.pt")
    from safetensors.torch import save_file

    save_file(W, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert "this is a safetensors file. Call it `x.safetensors`" in message
    (tmp_path / "x.pt").rename(tmp_path / "x.safetensors")
    assert set(open_checkpoint(str(tmp_path / "x.safetensors")).tensors) == set(W)


@pytest.mark.slow
def test_ten_thousand_tensors(tmp_path):
    """The header alone is read: no storage is."""
    state = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((2, 2), float(i)) for i in range(10_000)}
    torch.save(state, tmp_path / "x.bin")
    tensors = open_checkpoint(str(tmp_path / "x.bin")).tensors
    content = (tmp_path / "x.bin").read_bytes()
    assert len(tensors) == 10_000 and all(e.nbytes == 16 for e in tensors.values())
    assert all(content[tensors[n].start :][:16] == raw(t) for n, t in [*state.items()][::997])
