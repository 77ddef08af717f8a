"""What messages say about weights that are not read, followed to the letter."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastinterp import interpolate
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from tests.support.remedies import commands, follow

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(name))
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tmp_path, monkeypatch, tied):
    """Beside a model in safetensors. Where the package is installed that transformers reads GGUF with; a tied head
    stays tied.
    """
    gguf = pytest.importorskip("gguf", reason="the package gguf, which transformers reads such files with")
    monkeypatch.chdir(tmp_path)
    Path("OLD").mkdir()
    writer = gguf.GGUFWriter("OLD/x.gguf", "llama")
    sizes = {"context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 64}
    sizes |= {"head_count": 2, "head_count_kv": 2, "rope_dimension_count": 16, "vocab_size": 40}
    tokens = {"token_list": [f"t{i}" for i in range(40)], "token_scores": [0.0] * 40, "token_types": [1] * 40}
    for key, value in {**sizes, "layer_norm_rms_eps": 1e-5, "tokenizer_model": "llama", **tokens}.items():
        getattr(writer, f"add_{key}")(value)
    shapes = {"token_embd": (40, 32), "output_norm": (32,), "blk.0.attn_norm": (32,), "blk.0.ffn_norm": (32,)}
    shapes |= {f"blk.0.attn_{n}": (32, 32) for n in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64)}
    shapes |= {} if tied else {"output": (40, 32)}
    rng = np.random.default_rng(0)
    arrays = {f"{name}.weight": rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(arrays, "other.safetensors")
    for name in ("OLD", "OLD/x.gguf"):
        with pytest.raises(CheckpointError, match="is in GGUF, and other") as caught:
            interpolate(name, "other.safetensors", 0.5, "out")
        follow(str(caught.value), monkeypatch)
    got = load_file("NEW/model.safetensors")
    np.testing.assert_array_equal(got["model.embed_tokens.weight"], arrays["token_embd.weight"])
    np.testing.assert_array_equal(got["model.layers.0.mlp.down_proj.weight"], arrays["blk.0.ffn_down.weight"])
    assert json.loads(Path("NEW/config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in got) != tied and len(open_checkpoint("NEW").tensors) == len(got)


def test_arrays_of_numpy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("x.npz", a=np.ones((2, 3), "f4").T, b=np.arange(3))
    message = refusal("x.npz")
    follow(message, monkeypatch)
    assert sorted(open_checkpoint(message.rpartition("then name ")[2]).tensors) == ["a", "b"]
    for name in ("tf_model.h5", "flax_model.msgpack", "model.onnx"):
        (tmp_path / name).touch()
        assert "this format is not read" in refusal(name) and not commands(refusal(name))


def framed(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin: int, end: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


A, B = np.array([1, 2], "f4"), np.array([3, 4, 5], "f4")
DAMAGED = {
    "trailing bytes": framed({"a": entry(0, 8), "b": entry(8, 20)}, A.tobytes() + B.tobytes() + bytes(5)),
    "a hole": framed({"a": entry(0, 8), "b": entry(16, 28)}, A.tobytes() + bytes(8) + B.tobytes()),
    "a hole in front": framed({"b": entry(16, 28), "a": entry(8, 16)}, bytes(8) + A.tobytes() + B.tobytes()),
    "a number in the metadata": framed(
        {"__metadata__": {"format": "pt", "step": 3}, "a": entry(0, 8), "b": entry(8, 20)}, A.tobytes() + B.tobytes()
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_files_that_safetensors_refuses(tmp_path, monkeypatch, case):
    """The remedy writes a file that it reads, with the same tensors."""
    monkeypatch.chdir(tmp_path)
    Path("it's.safetensors").write_bytes(DAMAGED[case])
    with pytest.raises(Exception, match="Error while deserializing header"), safe_open("it's.safetensors", "numpy"):
        pass
    message = refusal("it's.safetensors")
    assert "The safetensors library refuses it, too" in message
    follow(message, monkeypatch)
    got = load_file("NEW.safetensors")
    np.testing.assert_array_equal(got["a"], A)
    np.testing.assert_array_equal(got["b"], B)
    Path("NEW.safetensors").replace("it's.safetensors")
    found = open_checkpoint("it's.safetensors")
    assert found.metadata == ({"format": "pt", "step": "3"} if "number" in case else {})
    save_file({"a": A * 3, "b": B * 3}, "other.safetensors")
    interpolate("it's.safetensors", "other.safetensors", 0.5, "out")
    np.testing.assert_array_equal(load_file("out/model.safetensors")["a"], A * 2)


def test_commands_are_not_wrapped(tmp_path, monkeypatch):
    """`check` breaks long lines, but no command."""
    from fastinterp.inspect.check import check

    monkeypatch.chdir(tmp_path)
    Path("x.safetensors").write_bytes(DAMAGED["a hole"])
    save_file({"a": A}, "y.safetensors")
    text = str(check({"merge_method": "linear", "models": [{"model": f"{n}.safetensors"} for n in "xy"]}))
    assert all(command in text for command in commands(refusal("x.safetensors")))
    assert all(len(line) <= 100 for line in text.splitlines() if "python" not in line)
