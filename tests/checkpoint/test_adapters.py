"""Adapters: recognised whatever the file is called, refused as models, described; and their remedies, followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import fastinterp
from fastinterp import interpolate
from fastinterp.checkpoint.lora import parse
from fastinterp.checkpoint.open import open_checkpoint
from fastinterp.cli import commands
from fastinterp.errors import CheckpointError, ShapeError
from fastinterp.plan.models import open_model
from tests.support import tokens
from tests.support.remedies import follow

# What the libraries warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")

Shapes = dict[str, tuple[int, ...]]
Q = "model.layers.0.self_attn.q_proj"
UNET = "lora_unet_down_blocks_0_attn_to_q"


def put(path: Path, shapes: Shapes, metadata: dict[str, str] | None = None, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    save_file({name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}, path, metadata)
    return path


def refusal(name: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(str(name))
    return str(caught.value)


# kind of adapter, whose names, ranks -> names and shapes
ADAPTERS: dict[tuple[str, str, tuple[int, ...]], list[Shapes]] = {
    ("LoRA", "peft", (4,)): [
        {f"base_model.model.{Q}.lora_A.weight": (4, 8), f"base_model.model.{Q}.lora_B.weight": (8, 4)},
        {f"base_model.model.{Q}.lora_A.default.weight": (4, 8), f"base_model.model.{Q}.lora_B.default.weight": (8, 4)},
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": (4, 32),
            "base_model.model.model.embed_tokens.lora_embedding_B": (8, 4),
            "base_model.model.model.embed_tokens.weight": (32, 8),
            "base_model.model.lm_head.weight": (32, 8),
        },
        {
            f"base_model.model.{Q}.lora_A.weight": (4, 8),
            f"base_model.model.{Q}.lora_B.weight": (8, 4),
            f"base_model.model.{Q}.lora_magnitude_vector": (8,),
            "base_model.model.score.weight": (3, 8),
        },
    ],
    ("LoRA", "kohya", (2,)): [
        {f"{UNET}.lora_down.weight": (2, 8), f"{UNET}.lora_up.weight": (8, 2), f"{UNET}.alpha": ()},
        {f"{UNET}.lora_down.weight": (2, 8, 3, 3), f"{UNET}.lora_up.weight": (8, 2, 1, 1)},
        {f"{UNET}.lora_down.weight": (2, 8), f"{UNET}.lora_up.weight": (8, 2), f"{UNET}.dora_scale": (8, 1)},
        {"lora_te1_text_model_q_proj.lora_down.weight": (2, 8), "lora_te1_text_model_q_proj.lora_up.weight": (8, 2)},
    ],
    ("LoRA", "diffusers", (2,)): [
        {"unet.down_blocks.0.to_q.lora_A.weight": (2, 8), "unet.down_blocks.0.to_q.lora_B.weight": (8, 2)},
        {"transformer.blocks.0.to_q.lora.down.weight": (2, 8), "transformer.blocks.0.to_q.lora.up.weight": (8, 2)},
        {"unet.mid.to_q_lora.down.weight": (2, 8), "unet.mid.to_q_lora.up.weight": (8, 2)},
        {"diffusion_model.blocks.0.q.lora_down.weight": (2, 8), "diffusion_model.blocks.0.q.lora_up.weight": (8, 2)},
    ],
    ("LoRA", "", ()): [
        {f"{Q}.lora_a": (8, 2), f"{Q}.lora_b": (2, 8)},
        {f"double_blocks.0.processor.qkv_lora1.{n}.weight": s for n, s in (("down", (2, 8)), ("up", (8, 2)))},
    ],
    ("LoHa", "kohya", (2,)): [
        {f"{UNET}.hada_w{i}_{s}": (8, 2) if s == "a" else (2, 8) for i in (1, 2) for s in "ab"} | {f"{UNET}.alpha": ()}
    ],
    ("LoKr", "kohya", (2,)): [
        {f"{UNET}.lokr_w1": (2, 2), f"{UNET}.lokr_w2_a": (4, 2), f"{UNET}.lokr_w2_b": (2, 4), f"{UNET}.alpha": ()}
    ],
    ("LyCORIS", "kohya", ()): [
        {f"{UNET}.diff": (8, 8)},
        {f"{UNET}.{n}.weight": (8, 8) for n in ("a1", "a2", "b1", "b2")},
    ],
    ("IA3", "peft", ()): [{f"base_model.model.{Q}.ia3_l": (8, 1)}],
    ("VeRA", "peft", ()): [
        {f"base_model.model.{Q}.vera_lambda_b": (8,), f"base_model.model.{Q}.vera_lambda_d": (4,),
         "base_model.vera_A": (4, 8), "base_model.vera_B": (8, 4)},
    ],
    ("OFT", "peft", ()): [{f"base_model.model.{Q}.oft_R.weight": (2, 6)}],
    ("BOFT", "peft", ()): [{f"base_model.model.{Q}.boft_R": (1, 2, 4, 4), f"base_model.model.{Q}.boft_s": (8, 1)}],
    ("PEFT", "", ()): [{"prompt_embeddings": (4, 8)}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("expected", "shapes"), [(key, shapes) for key, several in ADAPTERS.items() for shapes in several]
)
def test_adapters_are_recognised_by_their_names(tmp_path, expected, shapes):
    """Whatever the file is called; inspect describes it, and it is no model."""
    kind, style, ranks = expected
    path = put(tmp_path / "any.safetensors", shapes, {"ss_network_alpha": "1"} if style == "kohya" else None)
    message = refusal(path)
    assert f"this is {'an' if kind[0] in 'IO' else 'a'} {kind} adapter, not a whole model" in message
    if kind == "LoRA" and style:
        assert f"Name it behind its base: `BASE+{path}`. " in message
    else:
        assert "adapters are not merged" in message
    done = CliRunner().invoke(commands, ["inspect", str(path), "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)["adapter"]
    assert (found["kind"], found["style"] or "", tuple(found["ranks"]), found["whole"]) == (kind, style, ranks, False)
    assert found["alpha"] == ("1" if style == "kohya" else None)
    text = CliRunner().invoke(commands, ["inspect", str(path)]).stdout
    assert f"{kind} adapter" in text and all(f", rank {rank}" in text for rank in ranks)


MODELS: list[Shapes] = [
    {"alpha": (1,), "w": (4, 4)},
    {"layers.0.mixer.A_log": (4,), "layers.0.alpha": (1,), "layers.0.mixer.in_proj.weight": (4, 4)},
    {"rwkv.blocks.0.att.w_lora.lora.0.weight": (2, 4), "rwkv.blocks.0.att.w_lora.lora.2.weight": (4, 2)},
    {"blocks.0.attention.time_maa_w1": (4, 8), "blocks.0.attention.time_decay_w1": (4, 8)},
    {"model.layers.0.self_attn.q_a_proj.weight": (2, 4), "model.layers.0.self_attn.q_b_proj.weight": (4, 2)},
    {"explora.weight": (2, 2), "flora.A.weight": (2, 2)},
    {"base_model.model.model.norm.weight": (4,), "base_model.model.model.layers.0.mlp.up_proj.weight": (4, 4)},
]


@pytest.mark.parametrize("shapes", MODELS)
def test_models_are_not_taken_for_adapters(tmp_path, shapes):
    found = open_checkpoint(str(put(tmp_path / "model.safetensors", shapes)))
    assert found.adapter is None
    assert list(open_model(found.name).tensors) == list(found.tensors)


def test_all_that_read_models_refuse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = put(Path("a.safetensors"), ADAPTERS["LoRA", "kohya", (2,)][0])
    b = put(Path("b.safetensors"), ADAPTERS["LoRA", "kohya", (2,)][0], seed=1)
    recipe = {"merge_method": "linear", "models": [{"model": str(p), "parameters": {"weight": 0.5}} for p in (a, b)]}
    pytest.importorskip("torch")
    from fastinterp.inspect.check import check
    from fastinterp.inspect.compare import compare

    for use in (
        lambda: fastinterp.merge(recipe, "out"),
        lambda: fastinterp.interpolate(a, b, 0.5, "out"),
        lambda: fastinterp.explain(recipe),
        lambda: compare("a.safetensors", "b.safetensors"),
        lambda: fastinterp.path(a, b),
        lambda: fastinterp.load(recipe),
    ):
        with pytest.raises(CheckpointError, match="this is a LoRA adapter, not a whole model"):
            use()
    assert [error.message for error in check(recipe).errors] == [refusal("a.safetensors"), refusal("b.safetensors")]
    assert not Path("out").exists()


# Adapters that are built into whole models


def built_in(seed: int, seed_of_factors: int) -> dict[str, np.ndarray]:
    """As Phi-4-multimodal has them: a weight, and factors of an adapter for each modality."""
    rng, factors = np.random.default_rng(seed), np.random.default_rng(seed_of_factors)
    tensors = {"model.embed_tokens.weight": rng.integers(9, size=(9, 4)).astype("f4")}
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.qkv_proj"
        tensors[f"{module}.base_layer.weight"] = rng.integers(9, size=(4, 4)).astype("f4")
        for kind in ("speech", "vision"):
            tensors[f"{module}.lora_A.{kind}.weight"] = factors.normal(size=(2, 4)).astype("f4")
            tensors[f"{module}.lora_B.{kind}.weight"] = factors.normal(size=(4, 2)).astype("f4")
    return tensors


def test_built_in_adapters_are_copied(tmp_path):
    """Equal factors are copied bit by bit, beside weights that are merged; those that differ are refused."""
    for name, tensors in (("a", built_in(1, 0)), ("b", built_in(2, 0)), ("c", built_in(3, 5))):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    interpolate(tmp_path / "a", tmp_path / "b", 0.5, tmp_path / "out")
    a, b, out = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b", "out"))
    for name, x in out.items():
        np.testing.assert_array_equal(x, a[name] if "lora" in name else (a[name] + b[name]) / 2)
    with pytest.raises(ShapeError) as caught:
        interpolate(tmp_path / "a", tmp_path / "c", 0.5, tmp_path / "no")
    message = str(caught.value)
    assert "belong to adapters that are built into the models, and differ between" in message
    assert "as they are: `integers=MODEL`" in message
    interpolate(tmp_path / "a", tmp_path / "c", 0.5, tmp_path / "of_c", integers=tmp_path / "c")
    c, out = (load_file(tmp_path / name / "model.safetensors") for name in ("c", "of_c"))
    for name, x in out.items():
        np.testing.assert_array_equal(x, c[name] if "lora" in name else (a[name] + c[name]) / 2)
    text = CliRunner().invoke(commands, ["inspect", str(tmp_path / "a")]).stdout
    assert "has built in: LoRA adapter, rank 2" in text


def test_parametrized_weights_with_an_adapter(tmp_path):
    """As jina-embeddings-v3 has them, by torch's parametrizations."""
    module = "roberta.encoder.layers.0.mixer.Wqkv.parametrizations.weight"
    shapes: Shapes = {f"{module}.original": (4, 4), f"{module}.0.lora_A": (5, 2, 4), f"{module}.0.lora_B": (5, 4, 2)}
    adapter = open_checkpoint(str(put(tmp_path / "model.safetensors", shapes))).adapter
    assert adapter is not None and adapter.whole and adapter.tensors == set(shapes) - {f"{module}.original"}


# What peft and diffusers write, and the remedies


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("adapters") / "base"
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def trained(model: Any, config: Any) -> Any:
    """A model of peft whose adapter does something."""
    peft = pytest.importorskip("peft")
    import torch

    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "modules_to_save" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model_class", "load"),
    [
        ("CAUSAL_LM", "AutoModelForCausalLM", {}),
        ("SEQ_CLS", "AutoModelForSequenceClassification", {"num_labels": 3}),
        ("TOKEN_CLS", "AutoModelForTokenClassification", {"num_labels": 5}),
        ("FEATURE_EXTRACTION", "AutoModel", {}),
        (None, "AutoModelForCausalLM", {}),
    ],
)
def test_the_remedy_of_peft(tmp_path, monkeypatch, base, task, model_class, load):
    """For adapters that are not LoRA's: the class of the task_type, with as many labels as its head has; the folder and
    the file alike.
    """
    import transformers

    peft = pytest.importorskip("peft")
    model = getattr(transformers, model_class).from_pretrained(base, **load)
    config = peft.LoHaConfig(task_type=task, r=4, alpha=8, target_modules=["q_proj", "v_proj"])
    adapted = trained(model, config)
    adapted.save_pretrained(tmp_path / "adapter")
    want = {name: x.clone() for name, x in adapted.merge_and_unload().state_dict().items()}
    monkeypatch.chdir(tmp_path)
    message = refusal("adapter")
    assert f"this is a LoHa adapter to `{base}`, not a whole model, and adapters are not merged" in message
    assert refusal("adapter/adapter_model.safetensors").partition(": this")[2] == message.partition(": this")[2]
    shutil.copytree("adapter", "checkpoint-1/other")  # by another name, it is a file without its configuration
    Path("checkpoint-1/other/adapter_config.json").unlink()
    assert "peft, which needs its adapter_config.json: put that beside it" in refusal("checkpoint-1/other")
    assert ("AutoPeftModelFor" in message) == (task is not None)
    follow(message, monkeypatch)
    merged, info = getattr(transformers, model_class).from_pretrained("NEW", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(x.equal(want[name]) for name, x in merged.state_dict().items())
    assert open_model("NEW").tensors.keys() == load_file("NEW/model.safetensors").keys()
    assert "rank 4" in CliRunner().invoke(commands, ["inspect", "adapter"]).stdout


@pytest.mark.slow
def test_the_remedy_of_peft_saves_the_tokenizer_beside_the_adapter(tmp_path, monkeypatch, base):
    import transformers

    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    trained(model, config).save_pretrained(tmp_path / "adapter")
    tokens.words(tmp_path / "adapter", ["<unk>", "cat", "dog"])
    monkeypatch.chdir(tmp_path)
    follow(refusal("adapter"), monkeypatch)
    assert transformers.AutoTokenizer.from_pretrained("NEW")("dog cat").input_ids == [2, 1]
    assert len(open_model("NEW").tensors) == len(open_model(str(base)).tensors)
    assert refusal("adapter/adapter_model.safetensors").count("AutoTokenizer") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model_class", "load"),
    [
        ("CAUSAL_LM", "AutoModelForCausalLM", {}),
        ("SEQ_CLS", "AutoModelForSequenceClassification", {"num_labels": 3}),
        (None, "AutoModelForCausalLM", {}),
    ],
)
def test_the_remedy_of_lora(tmp_path, monkeypatch, base, task, model_class, load):
    """Its name behind that of its base; the folder and the file alike."""
    import transformers

    peft = pytest.importorskip("peft")
    model = getattr(transformers, model_class).from_pretrained(base, **load)
    adapted = trained(model, peft.LoraConfig(task_type=task, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    want = {name: x.clone() for name, x in adapted.merge_and_unload().state_dict().items()}
    monkeypatch.chdir(tmp_path)
    assert "rank 4, alpha 8" in CliRunner().invoke(commands, ["inspect", "adapter"]).stdout
    for name in ("adapter", "adapter/adapter_model.safetensors"):
        message = refusal(name)
        assert f"this is a LoRA adapter to `{base}`, not a whole model. Name it behind its base: " in message
        written = message.partition("behind its base: `")[2].partition("`")[0]
        recipe = {"merge_method": "passthrough", "models": [{"model": written}]}
        shutil.rmtree("NEW", ignore_errors=True)
        report = fastinterp.merge(recipe, "NEW")
        assert any("`score.weight`, which" in text for text in report.warnings) == (task == "SEQ_CLS")
        merged, info = getattr(transformers, model_class).from_pretrained("NEW", output_loading_info=True, **load)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        for key, x in merged.state_dict().items():  # rounded in another order: two products of rank 4, twice
            np.testing.assert_allclose(x.numpy(), want[key].numpy(), rtol=1e-6, atol=1e-6)
    shutil.copytree("adapter", "checkpoint-1/other")
    Path("checkpoint-1/other/adapter_config.json").unlink()
    assert "Put its adapter_config.json beside it first. Name it behind its base: `BASE+" in refusal(
        "checkpoint-1/other"
    )


@pytest.mark.slow
def test_the_remedy_for_a_class_that_peft_cannot_find(tmp_path, monkeypatch, base):
    import transformers

    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    trained(model, peft.LoHaConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"auto_mapping": None}))
    monkeypatch.chdir(tmp_path)
    message = refusal("adapter")
    code = message.partition("with peft: `")[2].partition("`")[0]
    assert "where `model` is the base, loaded" in message
    exec(code, {"peft": peft, "model": transformers.AutoModelForCausalLM.from_pretrained(base)})
    assert len(open_model("NEW").tensors) == len(open_model(str(base)).tensors)


@pytest.mark.slow
def test_a_model_of_peft_that_is_not_merged(tmp_path, monkeypatch, base):
    """Its state dict has base_layer.weight beside the factors; the remedy is followed where it is at hand."""
    import transformers

    peft = pytest.importorskip("peft")
    model = trained(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=4, target_modules=["q_proj"])
    )
    tensors = {name: x.numpy().copy() for name, x in model.state_dict().items()}
    save_file(tensors, tmp_path / "whole.safetensors")
    monkeypatch.chdir(tmp_path)
    message = refusal("whole.safetensors")
    assert "this is a model of peft with a LoRA adapter that is not merged into its weights" in message
    code = message.partition("Where it was saved, call `")[2].partition("`")[0]
    exec(code, {"model": model})
    assert len(open_model("NEW").tensors) == len(open_model(str(base)).tensors)


def test_prompts_have_no_place_in_weights(tmp_path):
    put(tmp_path / "p" / "adapter_model.safetensors", {"prompt_embeddings": (4, 8)})
    (tmp_path / "p" / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM"}')
    assert "It is a prompt for its base, which has no place in weights" in refusal(tmp_path / "p")
    with pytest.raises(CheckpointError, match="this is a prompt for its base, which has no place in weights"):
        parse(open_checkpoint(str(tmp_path / "p")))


@pytest.mark.slow
@pytest.mark.parametrize("style", ["kohya", "diffusers"])
def test_the_remedy_of_diffusion_models(tmp_path, monkeypatch, style):
    """The pipeline with the adapter added to it."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    before = small_pipeline(Path("pipeline"), diffusers)
    rng = np.random.default_rng(0)
    tensors: dict[str, Any] = {}
    want: dict[str, Any] = {}
    for name in [name for name in before if name.endswith("attn1.to_q.weight")]:
        module, (rows, columns) = name.removesuffix(".weight"), before[name].shape
        down, up = rng.normal(size=(2, columns)).astype("f4"), rng.normal(size=(rows, 2)).astype("f4")
        if style == "kohya":
            stem = f"lora_unet_{module.replace('.', '_')}"
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": np.float32(1)}
        else:
            tensors |= {f"unet.{module}.lora_A.weight": down, f"unet.{module}.lora_B.weight": up}
        want[name] = before[name] + (0.5 if style == "kohya" else 1.0) * (up @ down)
    save_file({name: np.asarray(x) for name, x in tensors.items()}, "style.safetensors")
    message = refusal("style.safetensors")
    written = message.partition("Name it behind its base: `")[2].partition("`")[0].replace("BASE", "pipeline")
    fastinterp.merge({"merge_method": "passthrough", "models": [{"model": written}]}, "NEW")
    after = diffusers.UNet2DConditionModel.from_pretrained("NEW/unet").state_dict()
    assert want and after.keys() == before.keys()
    for name, x in before.items():
        np.testing.assert_allclose(after[name].numpy(), want.get(name, x), atol=1e-6)
    assert len(open_model("NEW/unet").tensors) == len(before)


def small_pipeline(folder: Path, diffusers: Any) -> dict[str, np.ndarray]:
    """A text-to-image pipeline, saved; the weights of its UNet."""
    import transformers

    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    text = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
    )
    (words := folder.parent / "words").mkdir()
    (words / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}')
    (words / "merges.txt").write_text("#version: 0.2\n")
    diffusers.StableDiffusionPipeline(
        unet=unet, vae=diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt")),
        scheduler=diffusers.DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return {name: x.numpy().copy() for name, x in unet.state_dict().items()}


# Adapters in folders


def test_an_adapter_beside_a_model(tmp_path):
    """With its configuration transformers would load both; without it the model alone."""
    put(tmp_path / "model.safetensors", {"w": (2, 2)})
    put(tmp_path / "adapter_model.safetensors", ADAPTERS["LoRA", "peft", (4,)][0])
    found = open_checkpoint(str(tmp_path))
    assert list(found.tensors) == ["w"]
    assert found.remarks == (
        f"left out of {tmp_path}: `adapter_model.safetensors`, because transformers loads `model.safetensors`",
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    message = refusal(tmp_path)
    assert "has an adapter, `adapter_model.safetensors`, beside `model.safetensors`" in message
    both = message.partition("With it, name ")[2].partition(";")[0]
    assert both == f"{tmp_path / 'model.safetensors'}+{tmp_path / 'adapter_model.safetensors'}"
    assert list(open_model(message.partition("without it, name ")[2]).tensors) == ["w"]
    (tmp_path / "adapter_model.safetensors").unlink()
    assert list(open_model(str(tmp_path)).tensors) == ["w"]


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_adapters_are_named(tmp_path, file):
    """As peft saves them: what it is, of which base, and how it becomes a model."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "task_type": "SEQ_2_SEQ_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if file:
        put(folder / "adapter_model.safetensors", ADAPTERS["LoRA", "peft", (4,)][0])
        if file.endswith(".bin"):
            torch = pytest.importorskip("torch")
            tensors = load_file(folder / "adapter_model.safetensors")
            torch.save({name: torch.from_numpy(x) for name, x in tensors.items()}, folder / file)
            (folder / "adapter_model.safetensors").unlink()
    message = refusal(folder)
    assert f"this is a LoRA adapter to `org/base`, not a whole model. Name it behind its base: `org/base+{folder}`" in (
        message
    )
    (folder / "adapter_config.json").unlink()
    assert ("adapter, not a whole model" if file else "it is empty") in refusal(folder)
