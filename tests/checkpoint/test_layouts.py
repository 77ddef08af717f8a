"""Which files of a folder make the model: what transformers and diffusers would load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fastinterp import interpolate
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError
from tests.support.remedies import follow

INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def put(folder: Path, name: str, *tensors: str, value: float = 0.0) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    save_file({t: np.full((2, 2), value + i, "f4") for i, t in enumerate(tensors)}, folder / name, {"format": "pt"})


def put_index(folder: Path, weight_map: dict[str, str], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def put_config(folder: Path, **config: object) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(name))
    return str(caught.value)


def opened(folder: Path) -> tuple[list[str], str]:
    """The names of the files that are read, and the remarks."""
    found = open_checkpoint(str(folder))
    return [p.name for p in found.files], "; ".join(found.remarks)


# Files of several stems


@pytest.mark.parametrize("config", [None, {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}])
@pytest.mark.parametrize("other", ["consolidated.safetensors", "open_clip_model.safetensors", "model_1.safetensors"])
def test_another_stem_beside_the_model(tmp_path, config, other):
    put(tmp_path, "model.safetensors", "model.w")
    put(tmp_path, other, "w")
    if config:
        put_config(tmp_path, **config)
    (tmp_path / "consolidated.00.pth").touch()
    files, remarks = opened(tmp_path)
    assert files == ["model.safetensors"]
    assert remarks == f"left out of {tmp_path}: `{other}`, because transformers loads `model.safetensors`"


def test_consolidated_beside_shards(tmp_path):
    """With an index, which names the shards, and without."""
    for number, file in enumerate(SHARDS):
        put(tmp_path, file, f"model.{number}")
    put(tmp_path, "consolidated.safetensors", "w")
    files, remarks = opened(tmp_path)
    assert files == SHARDS and "left out" in remarks and "`consolidated.safetensors`, because the model is" in remarks
    put_index(tmp_path, {"model.0": SHARDS[0], "model.1": SHARDS[1]})
    files, remarks = opened(tmp_path)
    assert files == SHARDS
    assert remarks == f"left out of {tmp_path}: `consolidated.safetensors`, because transformers loads `{INDEX}`"


def test_vendor_files_alone(tmp_path):
    """One stem needs no name that a library knows; nor do files numbered in another way."""
    put(tmp_path / "one", "consolidated.safetensors", "a")
    assert opened(tmp_path / "one") == (["consolidated.safetensors"], "")
    put(tmp_path / "two", "consolidated.00.safetensors", "a")
    put(tmp_path / "two", "consolidated.01.safetensors", "b")
    assert opened(tmp_path / "two") == (["consolidated.00.safetensors", "consolidated.01.safetensors"], "")


def test_vendor_files_beside_pickles(tmp_path):
    """transformers would load the pickle: said, and the pickle is not read."""
    put(tmp_path, "consolidated.safetensors", "a")
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "optimizer.pt").touch()
    files, remarks = opened(tmp_path)
    assert files == ["consolidated.safetensors"]
    assert remarks == f"left out of {tmp_path}: `pytorch_model.bin`, because the model is `consolidated.safetensors`"


def test_two_stems_that_no_library_loads(tmp_path):
    put(tmp_path, "sd_xl.safetensors", "a")
    put(tmp_path, "vae.safetensors", "b")
    message = refusal(tmp_path)
    assert "it is not clear which files make the model: `sd_xl.safetensors`, `vae.safetensors`" in message
    named = message.partition("Name one: ")[2]
    assert list(open_checkpoint(named).tensors) == ["a"]


def test_the_models_of_two_libraries(tmp_path):
    """config.json says whose it is; without it that is not known."""
    put(tmp_path, "model.safetensors", "a")
    put(tmp_path, "diffusion_pytorch_model.safetensors", "b")
    assert "not clear" in refusal(tmp_path)
    put_config(tmp_path, _class_name="UNet2DModel")
    files, remarks = opened(tmp_path)
    assert files == ["diffusion_pytorch_model.safetensors"] and "because diffusers loads" in remarks
    put_config(tmp_path, architectures=["CLIPModel"])
    assert opened(tmp_path)[0] == ["model.safetensors"]


def test_an_index_beside_a_single_file(tmp_path):
    """transformers takes the file, diffusers its index."""
    for stem, config, files in (
        ("model", {"model_type": "llama"}, ["model.safetensors"]),
        ("diffusion_pytorch_model", {"_class_name": "X"}, ["diffusion_pytorch_model-00001-of-00001.safetensors"]),
    ):
        folder = tmp_path / stem
        put(folder, f"{stem}.safetensors", "a")
        put(folder, f"{stem}-00001-of-00001.safetensors", "a")
        put_index(folder, {"a": f"{stem}-00001-of-00001.safetensors"}, f"{stem}.safetensors.index.json")
        put_config(folder, **config)
        found, remarks = opened(folder)
        assert found == files and "left out" in remarks
        assert len(open_checkpoint(str(folder / f"{stem}.safetensors.index.json")).tensors) == 1


def test_an_index_that_names_the_single_file(tmp_path):
    put(tmp_path, "model.safetensors", "a")
    put(tmp_path, "more.safetensors", "b")
    put_index(tmp_path, {"a": "model.safetensors", "b": "more.safetensors"})
    assert opened(tmp_path) == (["model.safetensors", "more.safetensors"], "")


def test_the_file_that_config_names(tmp_path):
    """transformers loads that and nothing else."""
    put(tmp_path, "model.safetensors", "a")
    put(tmp_path, "ema.safetensors", "b")
    put_config(tmp_path, transformers_weights="ema.safetensors")
    files, remarks = opened(tmp_path)
    assert files == ["ema.safetensors"] and remarks.endswith("because config.json names `ema.safetensors`")
    put_config(tmp_path, transformers_weights="../x.safetensors")
    assert opened(tmp_path)[0] == ["model.safetensors"]


# Variants


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "anything"])
def test_the_plain_file_counts(tmp_path, stem):
    for name in (stem, f"{stem}.fp16", f"{stem}.bf16", f"{stem}.non_ema"):
        put(tmp_path, f"{name}.safetensors", "a")
    put(tmp_path, f"{stem}.fp16-00001-of-00001.safetensors", "a")
    put(tmp_path, f"{stem}-00001-of-00001.fp16.safetensors", "a")
    for name in (f"{stem}.safetensors.index.fp16.json", f"{stem}.safetensors.fp16.index.json"):
        put_index(tmp_path, {"a": f"{stem}.fp16-00001-of-00001.safetensors"}, name)
        assert len(open_checkpoint(str(tmp_path / name)).tensors) == 1
    files, remarks = opened(tmp_path)
    assert files == [f"{stem}.safetensors"]
    assert "and 4 more, because" in remarks and f"`{stem}.safetensors`" in remarks


def test_variants_of_shards(tmp_path):
    put(tmp_path, SHARDS[0], "a")
    put(tmp_path, SHARDS[1], "b")
    put_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    put(tmp_path, "model.fp16-00001-of-00001.safetensors", "a", "b")
    put_index(
        tmp_path, dict.fromkeys("ab", "model.fp16-00001-of-00001.safetensors"), "model.safetensors.index.fp16.json"
    )
    files, remarks = opened(tmp_path)
    assert files == SHARDS and "`model.safetensors.index.fp16.json`, because transformers loads" in remarks


def test_variants_alone(tmp_path):
    """One is the model; of two, one has to be named."""
    put(tmp_path, "model.fp16.safetensors", "a")
    assert opened(tmp_path) == (["model.fp16.safetensors"], "")
    put(tmp_path, "model.bf16.safetensors", "a")
    message = refusal(tmp_path)
    assert "not clear which files make the model: `model.bf16.safetensors`, `model.fp16.safetensors`" in message
    assert open_checkpoint(message.partition("Name one: ")[2]).files[0].name == "model.bf16.safetensors"


# Indexes


def test_an_index_of_another_sharding(tmp_path, monkeypatch):
    put(tmp_path, SHARDS[0], "a")
    put(tmp_path, SHARDS[1], "b")
    put_index(tmp_path, {"a": "model-00001-of-00004.safetensors", "b": "model-00003-of-00004.safetensors"})
    message = refusal(tmp_path)
    assert "2 of 2 files that `model.safetensors.index.json` names are missing: `model-00001-of-00004" in message
    assert f"The shards `{SHARDS[0]}`, `{SHARDS[1]}` are all there" in message
    follow(message, monkeypatch)
    assert opened(tmp_path) == (SHARDS, "")


def test_an_index_without_its_files(tmp_path):
    put(tmp_path, "x.safetensors", "a")
    put_index(tmp_path, {"a": "x-00001-of-00004.safetensors"}, "x.safetensors.index.json")
    (tmp_path / "x.safetensors").rename(tmp_path / "y.safetensors")
    assert "are missing: `x-00001-of-00004.safetensors`. Download or copy" in refusal(
        tmp_path / "x.safetensors.index.json"
    )
    (tmp_path / "y.safetensors").rename(tmp_path / "x.safetensors")
    message = refusal(tmp_path / "x.safetensors.index.json")
    assert len(open_checkpoint(message.partition("instead, name ")[2]).tensors) == 1


def test_two_complete_sets_of_shards(tmp_path):
    for count in (1, 2):
        for number in range(1, count + 1):
            put(tmp_path, f"model-{number:05d}-of-{count:05d}.safetensors", f"{number}.{count}")
    assert "two complete sets of shards are there, and no index" in refusal(tmp_path)
    (tmp_path / SHARDS[0]).unlink()
    assert opened(tmp_path)[0] == ["model-00001-of-00001.safetensors"]


def test_one_shard_is_remarked(tmp_path):
    put(tmp_path, SHARDS[0], "a")
    found = open_checkpoint(str(tmp_path / SHARDS[0]))
    assert found.remarks == (f"{found.name} is one of 2 shards: the tensors of the others are not read",)


# As the libraries load it


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A language model in two shards."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("layouts") / "tiny"
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32,
        tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def moved(source: Path, folder: Path) -> Path:
    """A copy of the model, all weights halved."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        save_file({name: x / 2 for name, x in load_file(path).items()}, path, {"format": "pt"})
    return folder


def loaded(folder: Path) -> dict[str, np.ndarray]:
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    return {name: x.numpy() for name, x in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["model-overlay.safetensors", "a-first.safetensors"])
def test_an_overlay_is_read_as_transformers_reads_it(tmp_path, tiny, overlay):
    """The last file by name counts, whatever the index says."""
    for name in "ab":
        folder = moved(tiny, tmp_path / name) if name == "b" else shutil.copytree(tiny, tmp_path / name)
        index = json.loads((folder / INDEX).read_text())
        over = "model.layers.1.mlp.down_proj.weight"
        file = folder / overlay
        save_file({over: load_file(folder / index["weight_map"][over])[over] + 1}, file, {"format": "pt"})
        index["weight_map"][over] = overlay
        (folder / INDEX).write_text(json.dumps(index))
    (report,) = interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
    a, b, out = (loaded(tmp_path / name) for name in ("a", "b", "out"))
    for name, x in out.items():
        np.testing.assert_array_equal(x, (a[name] + b[name]) / 2, err_msg=name)
    remark = next(r for r in report.remarks if over in r and r.startswith(f"{tmp_path / 'a'}, {tmp_path / 'b'}: "))
    assert "in files before it: read from the last, as transformers does" in remark
    assert (f"although `{INDEX}` says `a-first.safetensors`" in remark) == (overlay == "a-first.safetensors")


@pytest.mark.slow
def test_tensors_that_the_index_does_not_name(tmp_path, tiny):
    """They are read, as by transformers; so is one that lies in another listed file than the index says."""
    folders = [shutil.copytree(tiny, tmp_path / "a"), moved(tiny, tmp_path / "b")]
    for folder in folders:
        index = json.loads((folder / INDEX).read_text())
        name = "model.norm.weight"
        file = index["weight_map"].pop("model.layers.0.mlp.up_proj.weight")
        index["weight_map"][name] = next(f for f in index["weight_map"].values() if f != index["weight_map"][name])
        (folder / INDEX).write_text(json.dumps(index))
        save_file({**load_file(folder / file), "mtp.weight": np.ones((2, 2), "f4")}, folder / file, {"format": "pt"})
    (report,) = interpolate(folders[0], folders[1], 0.5, tmp_path / "out")
    a, b, out = (loaded(tmp_path / name) for name in ("a", "b", "out"))
    for name, x in out.items():
        np.testing.assert_array_equal(x, (a[name] + b[name]) / 2, err_msg=name)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert any("mtp.weight" in load_file(file) for file in files)
    text = "\n".join(report.remarks)
    assert "`model.layers.0.mlp.up_proj.weight`, `mtp.weight` are not in" in text
    assert "which it names: read, as transformers does" in text
    assert "`model.norm.weight` is in" in text and "read from there" in text


@pytest.mark.slow
def test_consolidated_beside_a_model_merges_as_transformers_loads(tmp_path, tiny):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    model.save_pretrained(tmp_path / "a")
    moved(tmp_path / "a", tmp_path / "b")
    for name in "ab":
        put(tmp_path / name, "consolidated.safetensors", "layers.0.attention.wq.weight")
        (tmp_path / name / "tokenizer.json").write_text("{}")
    for left, right, out in (
        ("a", "b", "folders"),
        ("a/model.safetensors", "b/model.safetensors", "files"),  # configuration and tokenizer are those of its folder
    ):
        interpolate(tmp_path / left, tmp_path / right, 0.5, tmp_path / out)
        a, b, merged = (loaded(tmp_path / name) for name in ("a", "b", out))
        assert all(np.array_equal(x, (a[name] + b[name]) / 2) for name, x in merged.items())
        assert (tmp_path / out / "tokenizer.json").read_text() == "{}"
        assert list(load_file(tmp_path / out / "model.safetensors")) == list(
            load_file(tmp_path / "a" / "model.safetensors")
        )


@pytest.mark.slow
def test_diffusers_reads_its_index_first(tmp_path):
    """What is taken is what diffusers loads."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=2, attention_head_dim=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    unet.save_pretrained(tmp_path, max_shard_size="8KB")
    stem = "diffusion_pytorch_model"
    assert (tmp_path / f"{stem}.safetensors.index.json").exists()
    save_file({name: x.numpy() * 0 for name, x in unet.state_dict().items()}, tmp_path / f"{stem}.safetensors")
    save_file({name: x.numpy() * 0 for name, x in unet.state_dict().items()}, tmp_path / f"{stem}.fp16.safetensors")
    model = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert all(x.equal(unet.state_dict()[name]) for name, x in model.state_dict().items())
    files, remarks = opened(tmp_path)
    assert len(files) > 1 and f"{stem}.safetensors" not in files
    assert f"`{stem}.fp16.safetensors`, `{stem}.safetensors`, because diffusers loads" in remarks
