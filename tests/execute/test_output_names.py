"""Names of the files of an output, how many there are, an output that is one file, and the metadata in headers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp.checkpoint.checksum import KEY, stated_checksum
from fastinterp.errors import OutputError, UsageError
from tests.support.written import tree

Arrays = dict[str, np.ndarray]


def arrays(seed: int, count: int = 4) -> Arrays:
    rng = np.random.default_rng(seed)
    return {f"t{i}.weight": rng.integers(-64, 64, (8, 8)).astype("f4") / 64 for i in range(count)}


def mean(a: Arrays, b: Arrays) -> Arrays:
    """Of multiples of 2^-6: exact."""
    return {name: (a[name] + b[name]) / 2 for name in a}


def equal(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


def model(
    folder: Path, seed: int, stem: str = "model", shards: int = 1, metadata: dict[str, str] | None = None
) -> Path:
    folder.mkdir(parents=True)
    every = arrays(seed)
    names = list(every)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        file = f"{stem}.safetensors" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {n: every[n] for n in names[i::shards]}
        save_file(part, folder / file, metadata)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / index_of(stem)).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def loaded(folder: Path) -> Arrays:
    return {n: x for p in folder.glob("*.safetensors") for n, x in load_file(p).items()}


def weights(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "safetensors" in p.name)


def index_of(stem: str) -> str:
    """A variant stands at another place in the name of an index: so transformers and diffusers look for it."""
    return "model.safetensors.index.fp16.json" if stem == "model.fp16" else f"{stem}.safetensors.index.json"


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "open_clip_model", "model.fp16", "flux1-dev"])
def test_the_output_has_the_stem_of_the_origin(tmp_path, stem):
    """One file, or shards with an index, whichever way it came and is asked for."""
    a, b = model(tmp_path / "a", 0, stem), model(tmp_path / "b", 1, stem)
    sharded = model(tmp_path / "sharded", 0, stem, shards=2)
    fastinterp.interpolate(a, b, 0.5, tmp_path / "one")
    assert weights(tmp_path / "one") == [f"{stem}.safetensors"]
    fastinterp.interpolate(a, b, 0.5, tmp_path / "cut", max_shard_size=600)
    assert weights(tmp_path / "cut") == [
        f"{stem}-00001-of-00002.safetensors", f"{stem}-00002-of-00002.safetensors", index_of(stem)
    ]  # fmt: skip
    fastinterp.interpolate(sharded, b, 0.5, tmp_path / "joined")
    assert weights(tmp_path / "joined") == [f"{stem}.safetensors"]
    for name in ("one", "cut", "joined"):
        assert equal(loaded(tmp_path / name), mean(arrays(0), arrays(1)))
        fastinterp.interpolate(a, b, 0.5, tmp_path / name, force=True, max_shard_size=300)  # and it can be replaced
        assert len(weights(tmp_path / name)) == 5


@pytest.mark.parametrize(
    ("file", "config", "stem"),
    [
        ("sdxl.safetensors", None, "model"),
        ("diffusion_pytorch_model.safetensors", None, "diffusion_pytorch_model"),
        ("unet-v2.safetensors", {"config.json": {"_class_name": "UNet", "_diffusers_version": "0.30"}},
         "diffusion_pytorch_model"),
        ("mine.safetensors", {"config.json": {"model_type": "llama"}}, "model"),
        ("mine.safetensors", {"open_clip_config.json": {}, "config.json": {"model_type": "clip"}}, "open_clip_model"),
    ],
    ids=["lone", "known", "diffusers", "transformers", "open_clip"],
)  # fmt: skip
def test_stem_of_a_file_that_was_named(tmp_path, file, config, stem):
    """A folder is written for the library that reads the configuration beside the file."""
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        save_file(arrays(seed), tmp_path / name / file)
        for config_name, content in (config or {}).items():
            (tmp_path / name / config_name).write_text(json.dumps(content))
    fastinterp.interpolate(tmp_path / "a" / file, tmp_path / "b" / file, 0.5, tmp_path / "out")
    assert weights(tmp_path / "out") == [f"{stem}.safetensors"]


def test_one_file_stays_one_file(tmp_path):
    """Larger than a shard's 5 GB: planned from sparse files, of which nothing is read."""
    for name in ("a", "b"):
        table, at = {}, 0
        for i in range(3):
            table[f"t{i}"] = {"dtype": "F16", "shape": [10**9], "data_offsets": [at, at := at + 2 * 10**9]}
        text = json.dumps(table).encode()
        with open(tmp_path / f"{name}.safetensors", "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + at)
    how = {
        "merge_method": "linear", "parameters": {"weight": 1},
        "models": [{"model": str(tmp_path / f"{n}.safetensors")} for n in "ab"],
    }  # fmt: skip
    assert [f["name"] for f in fastinterp.explain(how).as_dict()["files"]] == ["model.safetensors"]
    cut = fastinterp.explain(how, max_shard_size="5GB").as_dict()
    assert len(cut["files"]) == 2 and cut["indexes"] == ["model.safetensors.index.json"]


# --- an output that is one file ---------------------------------------------------------------------------------------


def files(folder: Path) -> tuple[Path, Path]:
    for seed, name in enumerate("ab"):
        save_file(arrays(seed), folder / f"{name}.safetensors", {"format": "pt"})
    return folder / "a.safetensors", folder / "b.safetensors"


def test_output_file_beside_its_inputs(tmp_path):
    """Nothing but the file appears, the receipt is in its header, and the inputs are as they were."""
    a, b = files(tmp_path)
    before = tree(tmp_path)
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "new" / "mixed.safetensors")[0]
    assert report.files == ("mixed.safetensors",) and report.output == str(tmp_path / "new" / "mixed.safetensors")
    fastinterp.interpolate(a, b, 0.5, tmp_path / "mixed.safetensors")
    assert tree(tmp_path).keys() - before.keys() == {"mixed.safetensors", "new", "new/mixed.safetensors"}
    assert before.items() <= tree(tmp_path).items()
    assert equal(load_file(tmp_path / "mixed.safetensors"), mean(arrays(0), arrays(1)))
    with safe_open(tmp_path / "mixed.safetensors", "np") as opened:
        assert json.loads(opened.metadata()["fastinterp"])["method"] == "linear"


def test_output_file_of_shards(tmp_path):
    """A model of several files goes into one file, if one is named."""
    a, b = model(tmp_path / "a", 0, shards=2), model(tmp_path / "b", 1)
    out = tmp_path / "x.safetensors"
    how = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 1}}
    fastinterp.merge(how, out)
    assert equal(load_file(out), mean(arrays(0), arrays(1)))
    with pytest.raises(UsageError, match="one file, but --max-shard-size 300 makes 4 of it"):
        fastinterp.merge(how, tmp_path / "y.safetensors", max_shard_size=300)
    assert not (tmp_path / "y.safetensors").exists()


def test_several_output_files(tmp_path):
    a, b = files(tmp_path)
    reports = fastinterp.interpolate(a, b, [0, 0.5], tmp_path / "x.safetensors")
    assert [Path(r.output).name for r in reports] == ["x_alpha_0.safetensors", "x_alpha_0.5.safetensors"]
    assert equal(load_file(tmp_path / "x_alpha_0.safetensors"), arrays(0))
    point = fastinterp.sweep(a, b, [0.5, 1], tmp_path / "y.safetensors")[1]
    assert point.path and equal(load_file(point.path), arrays(1)) and point.path.name == "y_alpha_1.safetensors"
    with pytest.raises(UsageError, match="recipes are written into a folder"):
        fastinterp.sweep(a, b, [0.5], tmp_path / "z.safetensors", virtual=True)


def test_what_an_output_file_replaces(tmp_path):
    """--force replaces a regular file that is no input; a folder, a link and a pipe it leaves alone."""
    a, b = files(tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"old")

    def refused(path: Path, force: bool = True) -> str:
        before = tree(tmp_path)
        with pytest.raises(OutputError) as caught:
            fastinterp.interpolate(a, b, 0.5, path, force=force)
        assert tree(tmp_path) == before
        return str(caught.value)

    assert "this file exists already. Add --force" in refused(out, force=False)
    fastinterp.interpolate(a, b, 0.5, out, force=True)
    assert equal(load_file(out), mean(arrays(0), arrays(1)))
    (tmp_path / "hard.safetensors").hardlink_to(a)
    for path in (a, tmp_path / "." / "b.safetensors", tmp_path / "hard.safetensors"):
        assert "inputs are never overwritten, whatever the options" in refused(path)
    (tmp_path / "folder.safetensors").mkdir()
    assert "this is a folder" in refused(tmp_path / "folder.safetensors")
    (tmp_path / "link.safetensors").symlink_to("out.safetensors")
    assert "this is no regular file" in refused(tmp_path / "link.safetensors")
    folder = model(tmp_path / "whole", 0)
    with pytest.raises(OutputError, match="the output lies inside the input folder"):
        fastinterp.interpolate(folder, b, 0.5, folder / "new.safetensors")


def test_output_file_that_fails_leaves_nothing(tmp_path, monkeypatch):
    a, b = files(tmp_path)
    before = tree(tmp_path)
    real = os.replace

    def failing(source, target):
        if str(target).endswith("out.safetensors"):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr("fastinterp.output.folder.os.replace", failing)
    with pytest.raises(OutputError, match="the output cannot be finished"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out.safetensors")
    assert tree(tmp_path) == before


# --- metadata in headers ----------------------------------------------------------------------------------------------


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "np") as opened:
        return opened.metadata()


def test_metadata_of_the_origin_is_carried_over(tmp_path):
    """Megabytes and all scripts of it, into every file; what would not be true any more is left out by name."""
    kept = {
        "format": "mlx", "config": json.dumps({"vae": {"latent_channels": 128}}), "modelspec.title": "ふたば ü",
        "ss_tag_frequency": json.dumps({f"tag {i}": i for i in range(100_000)}), "license": "mit", "empty": "",
    }  # fmt: skip
    untrue = {
        "modelspec.hash_sha256": "0x12",
        "sshs_model_hash": "a",
        "sshs_legacy_hash": "b",
        "fastinterp": "{}",
        KEY: "x",
    }
    quantised = {"_quantization_metadata": "{}", "quantization_format": "fp8"}
    a = model(tmp_path / "a", 0, metadata={**kept, **untrue, **quantised})
    b = model(tmp_path / "b", 1, metadata={**kept, "license": "gpl", "ss_seed": "1"})
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out", max_shard_size=600)[0]
    assert len(report.files) == 2
    for file in report.files:
        written = header(tmp_path / "out" / file)
        assert json.loads(written.pop("fastinterp"))["models"] == [a.name, b.name]
        assert stated_checksum({KEY: written.pop(KEY)}) is not None
        assert written == kept
    differing, left_out = (r for r in report.remarks if "header metadata" in r)
    assert differing.endswith(
        f"entries of {b} differ from those of {a}: license; others are in no header of {a}: ss_seed"
    )
    assert (
        all(name in left_out for name in (*list(untrue)[:3], *quantised))
        and "fastinterp" not in left_out.split(": ")[1]
    )


def test_metadata_of_an_origin_without_any(tmp_path):
    a, b = model(tmp_path / "a", 0), model(tmp_path / "b", 1, metadata={"x": "y"})
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out")[0]
    written = header(tmp_path / "out" / "model.safetensors")
    assert written.keys() == {"format", "fastinterp", KEY} and written["format"] == "pt"
    assert [r for r in report.remarks if "header metadata" in r] == [
        f"the output has the header metadata of {a}; entries of {b} are in no header of {a}: x"
    ]
    again = fastinterp.interpolate(tmp_path / "out", a, 0.5, tmp_path / "again")[0]
    assert not [r for r in again.remarks if "header metadata" in r]  # the receipt is replaced


@pytest.mark.slow
@pytest.mark.parametrize(("file", "shards"), [("ema.safetensors", None), ("ema.safetensors.index.json", 4000),
                                              ("ema.safetensors", 4000)])  # fmt: skip
def test_a_file_of_weights_that_config_json_names(tmp_path, file, shards):
    """transformers reads that file and no other: the output has the usual names, and its config.json names none."""
    import torch
    import transformers as tf
    from safetensors.torch import save_file as save

    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    loaded = []
    for name in "ab":
        model = tf.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / name)
        tensors = {n: x.detach() + 1 for n, x in model.state_dict().items()}
        save(tensors, tmp_path / name / "ema.safetensors", {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "ema.safetensors")}
        (tmp_path / name / "ema.safetensors.index.json").write_text(json.dumps(index))
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": file}))
        loaded.append(tf.LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict())
        assert torch.equal(loaded[-1]["lm_head.weight"], tensors["lm_head.weight"])
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 1}} for n in "ab"]
    recipe = {"merge_method": "linear", "models": models, "dtype": "float32"}
    report = fastinterp.merge(recipe, tmp_path / "out", max_shard_size=shards)
    assert any(f"`transformers_weights` (`{file}`) is left out of config.json" in r for r in report.remarks)
    model, info = tf.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, (loaded[0][name] + loaded[1][name]) / 2, atol=1e-6, rtol=0)
    assert list((tmp_path / "out").glob("model*.safetensors"))


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("a.ckpt", "a.safetensors"),
        ("a.pt", "a.safetensors"),
        ("a.BIN", "a.safetensors"),
        ("a.GGUF", "a.gguf"),
        ("a.gguf/", "a.gguf"),
        ("v1.5.safetensor", "v1.5.safetensors"),
        ("a.Safetensors", "a.safetensors"),
        ("a.safetesnors", "a.safetensors"),
        ("a.safe-tensors", "a.safetensors"),
        ("a.sft", "a.safetensors"),
        ("model.safetensors.index.json", "model.safetensors"),
        ("a.safetensors/", "a.safetensors"),
    ],
)
def test_names_of_other_files_are_no_folders(tmp_path, name, right):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    before = tree(tmp_path)
    for folder in (tmp_path, tmp_path / "o"):
        with pytest.raises(UsageError) as caught:
            fastinterp.interpolate(a, b, 0.5, f"{folder}/{name}")
        assert f"Give `{folder}/{right}` for one file" in str(caught.value)
    with pytest.raises(UsageError):
        fastinterp.interpolate(a, b, [0.25, 0.5], f"{tmp_path}/{name}")
    assert tree(tmp_path) == before
    (tmp_path / name).mkdir()
    fastinterp.interpolate(a, b, 0.5, f"{tmp_path}/{name}")  # a folder that is there
    assert equal(loaded(tmp_path / name), mean(arrays(1), arrays(2)))


@pytest.mark.parametrize("name", ["llama-3.1", "alpha_0.5", "merged.d", "a.st", "x.sets", "v0.1/"])
def test_dots_in_names_of_folders(tmp_path, name):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    fastinterp.interpolate(a, b, 0.5, f"{tmp_path}/{name}")
    assert equal(loaded(tmp_path / name), mean(arrays(1), arrays(2)))


def test_stdout_is_no_output(tmp_path, monkeypatch):
    a, b = model(tmp_path / "a", 1), model(tmp_path / "b", 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="not written to stdout"):
        fastinterp.interpolate(a, b, 0.5, "-")
    assert not (tmp_path / "-").exists()
