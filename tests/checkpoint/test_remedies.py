"""What messages say about weights that are not read, followed to the letter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fastinterp import interpolate
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from tests.support import tokens
from tests.support.remedies import commands, follow

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(name))
    return str(caught.value)


def small(name: str) -> Any:
    """A config of transformers."""
    import transformers

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip
    if name == "WhisperForConditionalGeneration":
        ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0)
        positions = {"max_source_positions": 20, "max_target_positions": 20}
        return transformers.WhisperConfig(vocab_size=32, num_mel_bins=8, **positions, **ids, **sizes)
    if name == "BertForSequenceClassification":
        layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.BertConfig(vocab_size=32, num_labels=5, **layer)
    return transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["WhisperForConditionalGeneration", "BertForSequenceClassification", "GPT2LMHeadModel"]
)
@pytest.mark.parametrize("spelling", ["folder", "file"])
def test_pickles_of_transformers(tmp_path, monkeypatch, name, spelling):
    """The class that config.json names: all weights arrive, the encoder's and the head's among them."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = getattr(transformers, name)(small(name))
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("OLD")
    Path("OLD/model.safetensors").unlink()
    torch.save(model.state_dict(), "OLD/pytorch_model.bin")
    torch.save({}, "OLD/optimizer.pt")
    message = refusal("OLD" if spelling == "folder" else "OLD/pytorch_model.bin")
    assert "pickled weights are never loaded" in message and f"transformers.{name}.from_pretrained" in message
    follow(message, monkeypatch)
    again, info = getattr(transformers, name).from_pretrained("NEW", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(x.equal(model.state_dict()[n]) for n, x in again.state_dict().items())
    assert len(open_checkpoint("NEW").tensors) >= len(list(model.parameters()))


@pytest.mark.slow
def test_pickles_of_diffusers(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    model = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
    model.save_pretrained("OLD", safe_serialization=False)
    message = refusal("OLD")
    assert "diffusers.AutoencoderKL.from_pretrained" in message
    follow(message, monkeypatch)
    assert load_file("NEW/diffusion_pytorch_model.safetensors").keys() == model.state_dict().keys()
    open_checkpoint("NEW")


@pytest.mark.slow
def test_pickles_of_sentence_transformers(tmp_path, monkeypatch):
    st = pytest.importorskip("sentence_transformers")
    import torch
    import transformers

    monkeypatch.chdir(tmp_path)
    transformers.BertModel(small("BertForSequenceClassification")).save_pretrained("bert")
    Path("bert/vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    transformers.BertTokenizer("bert/vocab.txt").save_pretrained("bert")
    st.SentenceTransformer("bert", device="cpu").save_pretrained("OLD")
    torch.save({n: torch.from_numpy(x) for n, x in load_file("OLD/model.safetensors").items()}, "OLD/pytorch_model.bin")
    Path("OLD/model.safetensors").rename("model.safetensors")
    message = refusal("OLD")
    follow(message, monkeypatch)
    assert Path("NEW/modules.json").exists() and Path("NEW/1_Pooling").is_dir()
    want = load_file("model.safetensors")
    assert all(np.array_equal(x, want[n]) for n, x in load_file("NEW/model.safetensors").items())
    open_checkpoint("NEW")


def states() -> dict[str, Any]:
    """State dicts, as they are nested in files; the tensor `b` shares its memory with `a`, `c` is not contiguous."""
    import torch

    a = torch.arange(12.0).reshape(3, 4)
    state = {"a": a, "b": a, "c": a.T, "n": torch.tensor(3)}
    return {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3, "optimizer_states": [{"x": a}]},
        "model": {"model": state, "optimizer": {"state": {0: {"m": a}}, "param_groups": [{"lr": 0.1}]}},
        "ema": {"params": state, "params_ema": {n: x + 1 for n, x in state.items()}, "iteration": 3},
    }


@pytest.mark.slow
@pytest.mark.parametrize("nested", ["plain", "state_dict", "model", "ema"])
@pytest.mark.parametrize("file", ["epoch=3.ckpt", "odd name's.pt", "open_clip_pytorch_model.bin"])
def test_pickles_without_a_configuration(tmp_path, monkeypatch, nested, file):
    """Only tensors are loaded, wherever in the file the state dict is; those that share memory become copies."""
    torch = pytest.importorskip("torch")
    state = states()[nested]
    torch.save(state, tmp_path / file)
    monkeypatch.chdir(tmp_path)
    messages = [refusal(file), refusal(tmp_path)]
    for message in messages:
        follow(message, monkeypatch)
        named = Path(message.rpartition("then name ")[2])
        got = load_file(named)
        assert sorted(got) == ["a", "b", "c", "n"]
        np.testing.assert_array_equal(got["b"], np.arange(12).reshape(3, 4))
        np.testing.assert_array_equal(got["c"], np.arange(12).reshape(3, 4).T)
        assert sorted(open_checkpoint(str(named)).tensors) == ["a", "b", "c", "n"]
        named.unlink()
    assert ("open_clip_model.safetensors" in messages[0]) == file.startswith("open_clip")


@pytest.mark.slow
def test_pickled_shards_without_a_class(tmp_path, monkeypatch):
    """A model with code of its own: all files at once, beside its configuration."""
    torch = pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    Path("[m]").mkdir()
    config = {"architectures": ["MyModel"], "auto_map": {"AutoModel": "modeling.MyModel"}}
    Path("[m]/config.json").write_text(json.dumps(config))
    for number, name in enumerate("ab", 1):
        torch.save({name: torch.ones(2)}, f"[m]/pytorch_model-{number:05d}-of-00002.bin")
    torch.save({}, "[m]/training_args.bin")
    message = refusal("[m]")
    follow(message, monkeypatch)
    assert message.endswith("then name [m] again")
    found = open_checkpoint("[m]")
    assert [p.name for p in found.files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert sorted(found.tensors) == ["a", "b"]


def test_pieces_of_meta(tmp_path):
    """One file converts; of several each has a piece of every tensor, and there is nothing that joins them."""
    (tmp_path / "consolidated.00.pth").touch()
    assert len(commands(refusal(tmp_path))) == 1
    (tmp_path / "consolidated.01.pth").touch()
    message = refusal(tmp_path)
    assert "each of these files has a piece of every tensor" in message and not commands(message)


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


def test_hub_models_without_safetensors(monkeypatch, tmp_path):
    """No pickle is downloaded, so the message goes by the configuration, and by the id."""
    from fastinterp.checkpoint import hub

    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    monkeypatch.setattr(hub, "fetch", lambda repo, revision=None: tmp_path)
    assert (
        'transformers.T5ForConditionalGeneration.from_pretrained("org/name", revision="main").save_pretrained("NEW")'
        in refusal("org/name@main")
    )
    (tmp_path / "config.json").write_text('{"architectures": ["os; x"]}')
    assert not commands(refusal("org/name"))


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


@pytest.mark.slow
def test_pickles_of_transformers_with_a_tokenizer(tmp_path, monkeypatch):
    """The command saves the tokenizer, too."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    model = transformers.GPT2LMHeadModel(small("GPT2LMHeadModel"))
    model.save_pretrained("OLD")
    Path("OLD/model.safetensors").unlink()
    torch.save(model.state_dict(), "OLD/pytorch_model.bin")
    assert "AutoTokenizer" not in refusal("OLD")
    tokens.words(Path("OLD"), ["<unk>", "cat", "dog"])
    for name in ("OLD", "OLD/pytorch_model.bin"):
        message = refusal(name)
        assert 'AutoTokenizer.from_pretrained("OLD").save_pretrained("NEW")' in message
        follow(message, monkeypatch)
        assert tokens.load(Path("NEW")).get_vocab() == {"<unk>": 0, "cat": 1, "dog": 2}
        assert transformers.AutoTokenizer.from_pretrained("NEW")("dog cat").input_ids == [2, 1]
        shutil.rmtree("NEW")
