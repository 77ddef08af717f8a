"""Pipelines of diffusers and sentence-transformers merge component by component, and their libraries load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.errors import CheckpointError, OutputError, ShapeError, UsageError
from fastinterp.output.receipt import RECEIPT
from tests.support.hub_server import hub_server, in_this_process
from tests.support.written import tree

Arrays = dict[str, np.ndarray]


def arrays(seed: int, names: tuple[str, ...] = ("a.weight", "blocks.0.mlp.weight")) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-64, 64, (8, 8)).astype("f4") / 64 for name in names}


INDEX = {
    "_class_name": "P", "_diffusers_version": "0.30.0", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"],
    "text_encoder": ["transformers", "T"], "scheduler": ["diffusers", "S"], "safety_checker": [None, None],
    "requires_safety_checker": False,
}  # fmt: skip


def pipeline(root: Path, seed: int, index: dict[str, Any] | None = None) -> Path:
    """A unet, a vae of two shards, a text encoder, whose tensors numpy knows, and what has no weights."""
    for name in ("unet", "vae", "text_encoder", "scheduler", "tokenizer"):
        (root / name).mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps(index or INDEX))
    save_file(arrays(seed), root / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt", "of": "unet"})
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": n for i, n in enumerate(("a", "b"))}
    for file, name in parts.items():
        save_file(arrays(seed + 10, (name,)), root / "vae" / file)
    weight_map = {name: file for file, name in parts.items()}
    (root / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    save_file(arrays(seed + 20, ("a.weight",)), root / "text_encoder" / "model.safetensors", {"format": "pt"})
    for name in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        (root / name).write_text("{}")
    (root / "text_encoder" / "config.json").write_text('{"torch_dtype": "float32"}')
    (root / "v1-5-pruned.safetensors").write_bytes(b"")
    (root / "safety_checker").mkdir()
    (root / "safety_checker" / "model.safetensors").write_bytes(b"")
    return root


def expected(seed_a: int, seed_b: int) -> dict[str, Arrays]:
    """The mean of two pipelines, by folder."""
    parts = {"unet": (0, ("a.weight", "blocks.0.mlp.weight")), "text_encoder": (20, ("a.weight",))}
    means = {
        folder: {n: (arrays(seed_a + at, names)[n] + arrays(seed_b + at, names)[n]) / 2 for n in names}
        for folder, (at, names) in parts.items()
    }
    shards = [{**arrays(s + 10, ("a",)), **arrays(s + 10, ("b",))} for s in (seed_a, seed_b)]
    return {**means, "vae": {n: (shards[0][n] + shards[1][n]) / 2 for n in ("a", "b")}}


def assert_is(out: Path, want: dict[str, Arrays]) -> None:
    for folder, tensors in want.items():
        got = {n: x for p in (out / folder).glob("*.safetensors") for n, x in load_file(p).items()}
        assert got.keys() == tensors.keys() and all(np.array_equal(got[n], x) for n, x in tensors.items())


WRITTEN = {
    "README.md", RECEIPT, "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json", "tokenizer/vocab.json",
}  # fmt: skip


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_a_pipeline_merges_component_by_component(tmp_path):
    """Each has its own folder, stem, shards, header and dtype; the rest is copied, or told."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out")[0]
    assert files(tmp_path / "out") == WRITTEN
    assert_is(tmp_path / "out", expected(1, 2))
    assert report.files == (
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    )  # fmt: skip
    assert report.left_out == {"other weights": ("safety_checker/", "v1-5-pruned.safetensors")}
    for file, of in (("unet/diffusion_pytorch_model", "unet"), ("text_encoder/model", None)):
        with safe_open(tmp_path / "out" / f"{file}.safetensors", "np") as opened:
            metadata = opened.metadata()
        assert metadata.get("of") == of and json.loads(metadata["fastinterp"])["models"] == [a.name, b.name]
    fastinterp.interpolate(a, b, 0.5, tmp_path / "f16", dtype="float16", max_shard_size=130)
    assert json.loads((tmp_path / "f16" / "text_encoder" / "config.json").read_text()) == {"torch_dtype": "float16"}
    assert (tmp_path / "f16" / "unet" / "config.json").read_text() == "{}"
    weight_map = json.loads((tmp_path / "f16/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert weight_map["weight_map"] == {
        "a.weight": "diffusion_pytorch_model-00001-of-00002.safetensors",
        "blocks.0.mlp.weight": "diffusion_pytorch_model-00002-of-00002.safetensors",
    }
    fastinterp.interpolate(tmp_path / "f16", tmp_path / "out", 1.0, tmp_path / "again")
    assert_is(tmp_path / "again", expected(1, 2))  # an output is a pipeline itself


def test_a_pipeline_replaces_another(tmp_path):
    """--force removes the shards of the old one in every component's folder; without it nothing is touched."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    out = tmp_path / "out"
    fastinterp.interpolate(a, b, 0.5, out, max_shard_size=200)
    (out / "vae" / "mine.txt").write_text("mine")
    before = tree(out)
    with pytest.raises(OutputError, match="the folder is not empty"):
        fastinterp.interpolate(a, b, 0.25, out)
    assert tree(out) == before
    report = fastinterp.interpolate(a, b, 0.5, out, force=True)[0]
    assert files(out) == WRITTEN | {"vae/mine.txt"}
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in report.removed
    assert_is(out, expected(1, 2))


def test_a_pipeline_that_fails_leaves_nothing(tmp_path, monkeypatch):
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    monkeypatch.setattr("fastinterp.execute.to_files.run", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    fastinterp.interpolate(a, b, 0.5, tmp_path / "kept")
    (tmp_path / "kept" / "vae" / "config.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="the folder `unet` in it cannot be created"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "linked", force=True)
    assert not any((tmp_path / "elsewhere").iterdir())


def test_what_a_killed_merge_left_behind(tmp_path):
    """In the folders of components, too: it is removed, and does not make the output folder look full."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    for folder in ("unet", "scheduler"):
        (tmp_path / "out" / folder).mkdir(parents=True)
        (tmp_path / "out" / folder / ".config.json.partial-0123456789ab").touch()
    fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    assert files(tmp_path / "out") == WRITTEN


def test_recipes_name_components(tmp_path):
    """As modules, and by filters."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    models: list[dict[str, Any]] = [{"model": str(a)}, {"model": str(b)}]
    weighted = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    modules = {"merge_method": "linear", "base_model": str(a), "parameters": {"weight": 1},
               "modules": {"unet": {"models": models}}}  # fmt: skip
    fastinterp.merge(modules, tmp_path / "modules")
    assert_is(tmp_path / "modules", {**expected(1, 1), "unet": expected(1, 2)["unet"]})
    models = [{"model": str(a), "parameters": {"weight": 1}},
              {"model": str(b), "parameters": {"weight": [{"filter": "unet/", "value": 1}, {"value": 0}]}}]  # fmt: skip
    fastinterp.merge({**weighted, "models": models}, tmp_path / "filters")
    assert_is(tmp_path / "filters", {**expected(1, 1), "unet": expected(1, 2)["unet"]})
    with pytest.raises(fastinterp.errors.RecipeError, match="They start with unet, vae, text_encoder"):
        fastinterp.merge({**modules, "modules": {"unot": {"models": models}}}, tmp_path / "wrong")


def test_what_else_takes_a_pipeline(tmp_path):
    """inspect, diff, check and explain do; what needs one model says which there are; a component alone is a model."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    opened = open_checkpoint(str(a))
    assert list(opened.tensors) == [
        "unet/a.weight", "unet/blocks.0.mlp.weight", "vae/a", "vae/b", "text_encoder/a.weight"
    ]  # fmt: skip
    how = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 1}}
    result = fastinterp.check(how)
    assert not result.errors and result.tensors == 5
    assert {f["name"] for f in fastinterp.explain(how).as_dict()["files"]} == {n for n in WRITTEN if "safetensors" in n}
    with pytest.raises(CheckpointError) as caught:
        fastinterp.load(how)
    assert str(caught.value) == (
        f"{a}: it consists of 3 models, `{a}/unet`, `{a}/vae`, `{a}/text_encoder`. Name one of them"
    )
    assert set(fastinterp.load(str(a / "unet"))) == set(arrays(1))
    with pytest.raises(UsageError, match="3 components, `unet`, `vae`, `text_encoder`, each with files of its own"):
        fastinterp.merge(how, tmp_path / "x.safetensors")
    fastinterp.interpolate(a / "unet", b / "unet", 0.5, tmp_path / "unet")
    assert files(tmp_path / "unet") == {
        "README.md",
        RECEIPT,
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }


def test_components_that_cannot_be_merged(tmp_path):
    """A component that one model lacks, and damaged indexes, each by name."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    (b / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ShapeError, match=rf"{a} alone has text_encoder/"):
        fastinterp.interpolate(a, b, 0.5, tmp_path / "out")
    index = {**INDEX, "text_encoder": [None, None], "safety_checker": ["x", "Y"], "controlnet": ["diffusers", "C"]}
    (a / "model_index.json").write_text(json.dumps({**index, "safety_checker": [None, None]}))
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out")[0]
    assert_is(tmp_path / "out", {k: v for k, v in expected(1, 2).items() if k != "text_encoder"})
    assert "model_index.json names `controlnet`, but there is no such folder" in report.remarks
    (a / "model_index.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"model_index\.json: the index of the pipeline must start with"):
        open_checkpoint(str(a))


@pytest.mark.parametrize("table", ["{", "{}x", '{"a": 1}', "[1]", '[{"path": 5}]', '[{"path": "../x"}]'])
def test_damaged_modules(tmp_path, table):
    save_file(arrays(0), tmp_path / "model.safetensors")
    (tmp_path / "modules.json").write_text(table)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        open_checkpoint(str(tmp_path))


def test_components_that_were_trained_for_something_else(tmp_path):
    """Shapes do not tell a v-prediction model from an epsilon one; its scheduler does."""
    a, b = pipeline(tmp_path / "a", 1), pipeline(tmp_path / "b", 2)
    for root, kind in ((a, "epsilon"), (b, "v_prediction")):
        (root / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": kind}))
    report = fastinterp.interpolate(a, b, 0.5, tmp_path / "out")[0]
    assert report.warnings == (
        f"scheduler/scheduler_config.json: prediction_type epsilon and v_prediction: these differ in {a} and {b}; the "
        f"output gets {a}'s. See that the models belong together",
    )


def test_a_pipeline_on_the_hub(tmp_path, monkeypatch):
    """Its components' folders are fetched, too; those that model_index.json does not name are not."""
    pipeline(tmp_path / "a", 1)
    monkeypatch.chdir(tmp_path)
    with hub_server() as hub, in_this_process(hub, tmp_path / "cache"):
        hub.add("org/pipeline", tmp_path / "a")
        assert len(open_checkpoint("org/pipeline").tensors) == 5
        asked = hub.fetched("org/pipeline")
    assert set(asked) == {
        "model_index.json",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "text_encoder/config.json",
        "vae/diffusion_pytorch_model.safetensors.index.json", "text_encoder/model.safetensors",
        "scheduler/scheduler_config.json",
        *(f"vae/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)),
    }  # fmt: skip


# --- with the libraries -----------------------------------------------------------------------------------------------


def with_exact_means(module: Any) -> Any:
    """The module with weights that are multiples of 2^-10, so that means of two are exact in float32."""
    import torch

    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randint(-128, 129, p.shape) / 1024)
    return module


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_diffusers_loads_the_merged_pipeline(tmp_path):
    """All components, none with missing or unexpected keys, and the numbers are the means."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = {w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "a", "b"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32, norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        text = CLIPTextConfig(
            vocab_size=6, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        whole: Any = StableDiffusionPipeline(
            with_exact_means(AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)),
            with_exact_means(CLIPTextModel(text)),
            CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=16),
            with_exact_means(unet), DDIMScheduler(), None, None, requires_safety_checker=False,
        )  # fmt: skip
        whole.save_pretrained(tmp_path / name)
    report = fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")[0]
    assert not report.warnings
    a, b, out = (DiffusionPipeline.from_pretrained(tmp_path / n) for n in ("a", "b", "out"))
    for part in ("unet", "vae", "text_encoder"):
        before, after, got = (getattr(p, part).state_dict() for p in (a, b, out))
        assert got.keys() == before.keys()
        for name, x in got.items():
            want = (before[name].double() + after[name].double()) / 2
            assert torch.equal(x, want.to(x.dtype)) if x.is_floating_point() else torch.equal(x, before[name])
    for of, folder in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae")):
        _, info = of.from_pretrained(tmp_path / "out" / folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert out.tokenizer("a b").input_ids == a.tokenizer("a b").input_ids
    images = [
        p("a b", num_inference_steps=1, output_type="np", generator=torch.manual_seed(0)).images for p in (out, a)
    ]
    assert images[0].shape == images[1].shape and not np.array_equal(*images)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("nested", [False, True], ids=["in the root", "0_Transformer"])
def test_sentence_transformers_loads_the_output(tmp_path, nested):
    """The dense module is merged, too: embeddings are those of a model with the means of all weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import (  # type: ignore[import-not-found]
        Dense,
        Normalize,
        Pooling,
        Transformer,
    )
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16,
        )  # fmt: skip
        BertModel(config).save_pretrained(tmp_path / f"bert-{name}")
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / f"bert-{name}")
        bert = Transformer(str(tmp_path / f"bert-{name}"), max_seq_length=8)
        parts = [bert, Pooling(16), Dense(16, 4), Normalize()]
        with_exact_means(SentenceTransformer(modules=parts, device="cpu")).save(str(tmp_path / name))
        if nested:
            root = tmp_path / name
            (root / "0_Transformer").mkdir()
            for path in [p for p in root.iterdir() if p.is_file() and p.name not in ("modules.json", "README.md")]:
                if path.name != "config_sentence_transformers.json":
                    path.rename(root / "0_Transformer" / path.name)
            table = json.loads((root / "modules.json").read_text())
            table[0]["path"] = "0_Transformer"
            (root / "modules.json").write_text(json.dumps(table))
    report = fastinterp.interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")[0]
    assert "2_Dense/model.safetensors" in report.files and not report.warnings
    a, b, out = (SentenceTransformer(str(tmp_path / n), device="cpu") for n in ("a", "b", "out"))
    assert [type(m) for m in out] == [type(m) for m in a] and out.max_seq_length == 8
    before, after = a.state_dict(), b.state_dict()
    means = {
        n: ((x.double() + after[n].double()) / 2).to(x.dtype) if x.is_floating_point() else x for n, x in before.items()
    }
    assert out.state_dict().keys() == means.keys() and all(
        torch.equal(out.state_dict()[n], x) for n, x in means.items()
    )
    a.load_state_dict(means)
    assert np.array_equal(out.encode(["hello world"]), a.encode(["hello world"]))
    assert not np.allclose(out.encode(["hello world"]), b.encode(["hello world"]))


def test_pickled_modules_of_a_sentence_transformer(tmp_path):
    """A Dense module of before safetensors is read from its file of torch.save."""
    torch = pytest.importorskip("torch")
    save_file(arrays(0), tmp_path / "model.safetensors")
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "", "type": "x"}, {"path": "2_Dense", "type": "y"}]))
    torch.save({"linear.weight": torch.ones(2, 3)}, tmp_path / "2_Dense" / "pytorch_model.bin")
    assert set(open_checkpoint(str(tmp_path)).tensors) == {*arrays(0), "2_Dense/linear.weight"}
    (tmp_path / "2_Dense" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"2_Dense/pytorch_model\.bin: the file is empty"):
        open_checkpoint(str(tmp_path))
