"""Folders with files of torch.save: which are read, what becomes of the others, and that libraries load the output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastinterp
from fastinterp.checkpoint import hub
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from fastinterp.output.receipt import RECEIPT
from tests.support.hub_server import hub_server, in_this_process

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def put(folder: Path, file: str, *names: str, value: float = 1.0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: torch.full((2, 3), value) for name in names}
    if file.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file(state, folder / file, {"format": "pt"})
    else:
        torch.save(state, folder / file)
    return folder


def put_index(folder: Path, file: str, weight_map: dict[str, str]) -> None:
    (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opened(folder: Path) -> tuple[list[str], str]:
    checkpoint = open_checkpoint(str(folder))
    return [p.name for p in checkpoint.files], " ".join(checkpoint.remarks)


def refusal(path: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    return str(caught.value)


TRAINER = (
    "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "scaler.pt",
    "random_states_0.pkl", "optimizer_1.bin", "custom_checkpoint_0.pkl", "zero_pp_rank_0_mp_rank_00_optim_states.pt",
)  # fmt: skip

# Files of a folder, its config.json, and which are read.
CHOICES: dict[str, tuple[list[str], dict[str, Any], list[str]]] = {
    "one": (["pytorch_model.bin"], {}, ["pytorch_model.bin"]),
    "safetensors first": (["pytorch_model.bin", "model.safetensors"], {}, ["model.safetensors"]),
    "any safetensors first": (["pytorch_model.bin", "x.safetensors"], {}, ["x.safetensors"]),
    "state of a training run": (["pytorch_model.bin", *TRAINER], {}, ["pytorch_model.bin"]),
    "a variant beside": (["pytorch_model.bin", "pytorch_model.fp16.bin"], {}, ["pytorch_model.bin"]),
    "only a variant": (["pytorch_model.fp16.bin"], {}, ["pytorch_model.fp16.bin"]),
    "another program's beside": (["pytorch_model.bin", "consolidated.00.pth"], {}, ["pytorch_model.bin"]),
    "of diffusers": (["diffusion_pytorch_model.bin"], {"_class_name": "X"}, ["diffusion_pytorch_model.bin"]),
    "two libraries": (
        ["diffusion_pytorch_model.bin", "pytorch_model.bin"], {"_class_name": "X"}, ["diffusion_pytorch_model.bin"]
    ),
    "transformers": (["diffusion_pytorch_model.bin", "pytorch_model.bin"], {"model_type": "x"}, ["pytorch_model.bin"]),
    "one of any name": (["last.ckpt"], {}, ["last.ckpt"]),
    "of Meta": (["consolidated.00.pth"], {}, ["consolidated.00.pth"]),
    "named": (["a.bin", "b.bin"], {"transformers_weights": "b.bin"}, ["b.bin"]),
    "shards without an index": (
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], {},
        ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_which_files_are_read(tmp_path, case):
    files, config, want = CHOICES[case]
    for i, file in enumerate(files):
        put(tmp_path, file, f"t{i}")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    read, remarks = opened(tmp_path)
    assert read == want
    left = [f for f in files if f not in (*want, *TRAINER) and not (f == "pytorch_model.bin" and "first" in case)]
    assert all(f"`{file}`" in remarks for file in left) and not any(f"`{file}`" in remarks for file in TRAINER)


def test_not_clear(tmp_path):
    put(tmp_path, "v1-5-pruned.ckpt", "a")
    put(tmp_path, "v1-5-emaonly.ckpt", "a")
    message = refusal(tmp_path)
    assert "it is not clear which files make the model: `v1-5-emaonly.ckpt`, `v1-5-pruned.ckpt`" in message
    assert list(open_checkpoint(message.partition("Name one: ")[2]).tensors) == ["a"]
    put(tmp_path / "two", "consolidated.00.pth", "a")
    put(tmp_path / "two", "consolidated.01.pth", "a")
    assert "tensor `a` is in `consolidated.00.pth` and in `consolidated.01.pth`" in refusal(tmp_path / "two")


@pytest.mark.parametrize("index", ["pytorch_model.bin.index.json", "pytorch_model.bin.index.fp16.json"])
def test_indexes(tmp_path, index):
    """As transformers and diffusers read them; a missing shard, a tensor that is not there, a shard alone."""
    folder = tmp_path / "m"
    stem = "pytorch_model.fp16" if "fp16" in index else "pytorch_model"
    shards = [f"{stem}-{i:05d}-of-00002.bin" for i in (1, 2)]
    put(folder, shards[0], "a", "b")
    put(folder, shards[1], "c")
    put_index(folder, index, {"a": shards[0], "b": shards[0], "c": shards[1]})
    for name in (folder, folder / index):
        checkpoint = open_checkpoint(str(name))
        assert list(checkpoint.tensors) == ["a", "b", "c"] and checkpoint.index_name == index
    assert "is one of 2 shards" in open_checkpoint(str(folder / shards[1])).remarks[0]
    other = put(tmp_path / "other", "x.pt", "a", "b", "c") / "x.pt"
    fastinterp.interpolate(folder, other, 0.5, tmp_path / "out", max_shard_size=30)
    got = {p.name for p in (tmp_path / "out").iterdir()}
    assert index.replace(f"{stem.partition('.')[0]}.bin", "model.safetensors") in got
    assert {f"{stem.replace('pytorch_', '')}-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)} <= got
    put_index(folder, index, {"a": shards[0], "d": shards[1]})
    assert "tensor `d` is in" in refusal(folder)
    (folder / shards[1]).unlink()
    assert "1 of 2 files that" in refusal(folder) and "Download or copy them again" in refusal(folder)


def test_indexes_beside_one_file(tmp_path):
    """transformers takes the file, as with safetensors."""
    put(tmp_path, "pytorch_model.bin", "a")
    put(tmp_path, "pytorch_model-00001-of-00001.bin", "b")
    put_index(tmp_path, "pytorch_model.bin.index.json", {"b": "pytorch_model-00001-of-00001.bin"})
    read, remarks = opened(tmp_path)
    assert read == ["pytorch_model.bin"] and "because transformers loads `pytorch_model.bin`" in remarks


def test_an_adapter_beside_a_model(tmp_path):
    put(tmp_path, "adapter_model.safetensors", "base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight")
    put(tmp_path, "pytorch_model.bin", "w")
    assert list(open_checkpoint(str(tmp_path)).tensors) == ["w"]
    (tmp_path / "adapter_config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "has an adapter, `adapter_model.safetensors`, beside `pytorch_model.bin`" in message
    assert list(open_checkpoint(message.partition("without it, name ")[2]).tensors) == ["w"]


STEMS = {
    "pytorch_model.bin": "model.safetensors",
    "pytorch_model.fp16.bin": "model.fp16.safetensors",
    "diffusion_pytorch_model.bin": "diffusion_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
    "consolidated.00.pth": "consolidated.safetensors",
    "last.ckpt": "last.safetensors",
}


@pytest.mark.parametrize("file", STEMS)
def test_names_and_side_cars_of_the_output(tmp_path, file):
    """The name for which libraries look; configuration and tokenizer are copied, the trainer's state is not."""
    for k, name in enumerate("ab"):
        put(tmp_path / name, file, "w", value=float(k))
        (tmp_path / name / "config.json").write_text('{"torch_dtype": "float32"}')
        (tmp_path / name / "tokenizer.json").write_text("{}")
        for state in TRAINER:
            (tmp_path / name / state).write_bytes(b"\x80\x02.")
    report = fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")[0]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        STEMS[file],
        "config.json",
        "tokenizer.json",
        "README.md",
        RECEIPT,
    }
    assert set(report.left_out["state of a training run"]) == set(TRAINER)
    assert list(open_checkpoint(str(tmp_path / "out")).tensors) == ["w"]


# --- libraries -------------------------------------------------------------------------------------------------------


def pickle_weights(folder: Path) -> None:
    """The safetensors files of a folder saved by a library become files of torch.save, with their old names."""
    from safetensors.torch import load_file

    for path in [*folder.rglob("*.safetensors")]:
        name = path.name.removesuffix(".safetensors")
        torch.save(load_file(path), path.parent / f"{'pytorch_model' if name == 'model' else name}.bin")
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification"])
def test_models_of_transformers(tmp_path, name):
    """Tied weights are in the file by both names, as `state_dict()` has them: nothing is missing or unexpected."""
    transformers = pytest.importorskip("transformers")
    config = {
        "GPT2LMHeadModel": lambda: transformers.GPT2Config(
            n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=8
        ),
        "BertForSequenceClassification": lambda: transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_labels=5,
        ),
    }[name]()
    kind, states = getattr(transformers, name), []
    for seed, folder in enumerate("ab"):
        torch.manual_seed(seed)
        model = kind(config)
        model.save_pretrained(tmp_path / folder)
        (tmp_path / folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / folder / "pytorch_model.bin")
        states.append(model.state_dict())
    assert ("lm_head.weight" in states[0]) == (name == "GPT2LMHeadModel")
    report = fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")[0]
    assert not report.warnings
    again, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, x in again.state_dict().items():
        a, b = states[0][key], states[1][key]
        want = (a.double() + 0.5 * (b - a).double()).float() if a.is_floating_point() else a
        assert x.equal(want)
    # Beside a model that was saved without the copy of the tied head.
    model.save_pretrained(tmp_path / "c")
    mixed = fastinterp.interpolate(tmp_path / "a", tmp_path / "c", 0.5, tmp_path / "mixed")[0]
    again, info = kind.from_pretrained(tmp_path / "mixed", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not mixed.warnings


@pytest.mark.slow
def test_pipelines_of_diffusers(tmp_path):
    """Each component from its own file, one of them in safetensors."""
    diffusers = pytest.importorskip("diffusers")
    states = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2)
        unet = diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=2, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",), layers_per_block=1,
        )  # fmt: skip
        unet.save_pretrained(tmp_path / name / "unet")
        vae.save_pretrained(tmp_path / name / "vae")
        pickle_weights(tmp_path / name / "unet")
        index = {"_class_name": "X", "unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "AutoencoderKL"]}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
        states.append(unet.state_dict())
    assert (tmp_path / "a" / "unet" / "diffusion_pytorch_model.bin").exists()
    fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    again, info = diffusers.UNet2DModel.from_pretrained(tmp_path / "out" / "unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for key, x in again.state_dict().items():
        assert x.equal((states[0][key].double() + 0.5 * (states[1][key] - states[0][key]).double()).float())
    diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")


@pytest.mark.slow
def test_models_of_sentence_transformers(tmp_path):
    """The transformer at the root and a Dense module, both in files of torch.save."""
    st, transformers = pytest.importorskip("sentence_transformers"), pytest.importorskip("transformers")
    from sentence_transformers.models import Dense, Pooling, Transformer  # type: ignore[import-not-found]

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]))
    states = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        transformers.BertModel(transformers.BertConfig(vocab_size=7, **layer)).save_pretrained(tmp_path / "bert")
        transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
        parts = [Transformer(str(tmp_path / "bert")), Pooling(16), Dense(16, 4)]
        model = st.SentenceTransformer(modules=parts, device="cpu")
        model.save_pretrained(str(tmp_path / name))
        states.append(model.state_dict())
        pickle_weights(tmp_path / name)
    assert not [*tmp_path.glob("[ab]/**/*.safetensors")]
    report = fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")[0]
    assert set(report.files) >= {"model.safetensors", "2_Dense/model.safetensors"}
    again = st.SentenceTransformer(str(tmp_path / "out"), device="cpu").state_dict()
    assert again.keys() == states[0].keys()
    for key, x in again.items():
        a, b = states[0][key], states[1][key]
        assert x.equal((a.double() + 0.5 * (b - a).double()).float() if a.is_floating_point() else a)


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder as a model on the Hub, and what has been asked for of its files."""
    there = tmp_path / "there"
    there.mkdir()
    monkeypatch.chdir(tmp_path)
    with hub_server() as server, in_this_process(server, tmp_path / "cache"):
        server.mirror("org/name", there)
        yield there, lambda: server.fetched("org/name")


def test_a_repository_without_safetensors(repository):
    """Files of torch.save are fetched then, by the names that libraries load, and that is said."""
    there, asked = repository
    put(there, "pytorch_model.bin", "w")
    for other in ("pytorch_model.fp16.bin", "training_args.bin", "optimizer.bin", "sub/pytorch_model.bin", "x.pt"):
        (there / other).parent.mkdir(exist_ok=True)
        (there / other).touch()
    (there / "config.json").write_text("{}")
    checkpoint = open_checkpoint("org/name@main")
    assert asked() == ["config.json", "pytorch_model.bin"] and list(checkpoint.tensors) == ["w"]
    assert checkpoint.remarks == (
        "org/name@main: the repository has no .safetensors files in their place: `pytorch_model.bin`",
    )


def test_shards_of_a_repository(repository):
    there, asked = repository
    shards = [f"pytorch_model-{i:05d}-of-00002.bin" for i in (1, 2)]
    put(there, shards[0], "a")
    put(there, shards[1], "b")
    put_index(there, "pytorch_model.bin.index.json", dict(zip("ab", shards, strict=True)))
    assert list(open_checkpoint("org/name").tensors) == ["a", "b"]
    assert asked() == [*shards, "pytorch_model.bin.index.json"]


def test_nothing_more_is_fetched_beside_safetensors(repository):
    there, asked = repository
    put(there, "model.safetensors", "a")
    put(there, "pytorch_model.bin", "a")
    assert open_checkpoint("org/name").remarks == () and asked() == ["model.safetensors"]


def test_components_of_a_repository(repository):
    """Only those with a configuration and without safetensors."""
    there, asked = repository
    index = {"_class_name": "X", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"], "tokenizer": ["t", "T"]}
    (there / "model_index.json").write_text(json.dumps(index))
    (there / "v1-5-pruned.ckpt").touch()
    put(there / "unet", "diffusion_pytorch_model.bin", "a")
    put(there / "vae", "diffusion_pytorch_model.safetensors", "b")
    put(there / "vae", "diffusion_pytorch_model.bin", "b")
    for folder, file in (("unet", "config.json"), ("vae", "config.json"), ("tokenizer", "vocab.json")):
        (there / folder).mkdir(exist_ok=True)
        (there / folder / file).write_text("{}")
    checkpoint = open_checkpoint("org/name")
    assert list(checkpoint.tensors) == ["unet/a", "vae/b"]
    weights = ["unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"]
    assert [name for name in asked() if not name.endswith("json")] == weights
    assert "no .safetensors files in their place: `unet/diffusion_pytorch_model.bin`" in checkpoint.remarks[-1]


def test_a_repository_with_files_of_other_names(repository):
    there, asked = repository
    put(there, "weights.ckpt", "a")
    (there / "config.json").write_text("{}")
    message = refusal("org/name@v1")
    assert "`hf download org/name FILE --revision v1`, and name the path that it prints" in message
    assert asked() == ["config.json"]


def test_names_of_files_are_no_ids():
    assert hub.parse("org/model") and hub.parse("org/v1.5")
    suffixes = (".bin", ".pt", ".pth", ".ckpt", ".safetensors", ".gguf", ".onnx")
    assert not any(hub.parse(f"org/model{suffix}") for suffix in suffixes)
