"""peft loads what is written, without missing and unexpected keys, and computes with it what it should."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastinterp
from fastinterp.lora.extract import extract_lora
from tests.lora.adapters import recipe
from tests.support.modules import gpt2, llama, saved

pytestmark = [
    pytest.mark.slow,  # peft takes seconds to import
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    # peft takes the biases of `lora_bias` for factors when it saves them.
    pytest.mark.filterwarnings("ignore:Adapter .* invalid shape.*lora_B.bias"),
]

peft = pytest.importorskip("peft")
from safetensors.torch import load_file  # noqa: E402

TOKENS = torch.arange(3, 23)[None]
# Weights, activations and logits are float32 numbers of at most 1 in models of two layers with rows of 32 to 96 terms:
# sums of that many products, each rounded by 2^-24, a few times in a row.
BOUND = 2e-5


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": TOKENS} if getattr(model.config, "is_encoder_decoder", False) else {}
        out = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), **more)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def loaded(base: Any, folder: Path) -> Any:
    """The base with the adapter; all keys that peft saves for it are in the file, and no others."""
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    stored = load_file(folder / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[name], wanted[name]) for name in stored)
    assert not peft.set_peft_model_state_dict(model, stored).unexpected_keys
    return model


def tuned(model: Any, part: str = "") -> Any:
    """The same model with other numbers in the parameters that have `part` in their names."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            change = 0.05 * torch.randn_like(parameter)
            if part in name:
                parameter.add_(change)
    return model


def classifier(seed: int) -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def masked(seed: int) -> Any:
    """Its head has a name of its own, and a bias, which both are copies."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    return BertForMaskedLM(config).eval()


def t5(seed: int) -> Any:
    """Its encoder and decoder have the embedding `shared`, and its head is that, too."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0,
        tie_word_embeddings=True,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def experts(seed: int) -> Any:
    """Its experts are modules in the checkpoint; transformers fuses them as it loads them, and peft their factors."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def bare(seed: int) -> Any:
    return llama(seed, dtype=torch.float32).model


MODELS = {
    "experts": lambda: experts(1),
    "llama": lambda: llama(1, dtype=torch.float32),
    "tied": lambda: llama(1, tied=True, dtype=torch.float32),
    "gpt2": lambda: gpt2(1),
    "bert": lambda: classifier(1),
    "masked": lambda: masked(1),
    "bare": lambda: bare(1),
    "t5": lambda: t5(1),
}


@pytest.mark.parametrize("part", ["", "1."])
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "experts"])
def test_extracted_adapters(tmp_path, kind, part):
    base, tune = saved(MODELS[kind](), tmp_path / "base"), saved(tuned(MODELS[kind](), part), tmp_path / "tuned")
    extract_lora(tune, base, tmp_path / "out", rank=64)
    model = loaded(MODELS[kind](), tmp_path / "out")
    want = logits(tuned(MODELS[kind](), part))
    assert (logits(MODELS[kind]()) - want).abs().max() > 20 * BOUND
    assert (logits(model) - want).abs().max() <= BOUND
    assert (logits(model.merge_and_unload()) - want).abs().max() <= BOUND


@pytest.mark.parametrize("kind", ["llama", "tied", "masked", "t5"])
def test_extracted_adapters_behind_their_base(tmp_path, kind):
    """Whole embeddings that are copies of each other stay one; what is written is what was extracted."""
    base, tune = saved(MODELS[kind](), tmp_path / "base"), saved(tuned(MODELS[kind]()), tmp_path / "tuned")
    extract_lora(tune, base, tmp_path / "out", rank=64)
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path / 'out'}"}]}
    fastinterp.merge(recipe, tmp_path / "merged")
    model, info = type(MODELS[kind]()).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (logits(model.eval()) - logits(tuned(MODELS[kind]()))).abs().max() <= BOUND


def test_the_classifier_is_stored_though_it_is_unchanged(tmp_path):
    """peft saves it for sequence classification, whatever the configuration says, and would miss it."""
    base = saved(classifier(1), tmp_path / "base")
    extract_lora(saved(tuned(classifier(1), "query"), tmp_path / "tuned"), base, tmp_path / "out", rank=4)
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=3).eval()
    assert (logits(model) - logits(loaded(classifier(1), tmp_path / "out"))).abs().max() <= BOUND


def test_only_factors(tmp_path):
    base, tune = saved(MODELS["gpt2"](), tmp_path / "base"), saved(tuned(gpt2(1), "weight"), tmp_path / "tuned")
    extract_lora(tune, base, tmp_path / "out", rank=64, whole_modules=False)
    loaded(gpt2(1), tmp_path / "out")


def test_convolutions(tmp_path):
    """In any torch module: peft adds factors to convolutions in two dimensions, and transposed shapes fit."""
    module = torch.nn.ModuleDict({"conv": torch.nn.Conv2d(6, 8, 3), "proj": torch.nn.Conv2d(8, 5, 1)})

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.parts["proj"](self.parts["conv"](x))

    from safetensors.torch import save_file

    torch.manual_seed(0)
    net, x = Net(), torch.randn(1, 6, 9, 9)
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    tuned(net, "weight")
    save_file(net.state_dict(), tmp_path / "tuned" / "model.safetensors")
    want = net(x)
    extract_lora(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=54)
    net.load_state_dict(before)
    assert (loaded(net, tmp_path / "out")(x) - want).abs().max() <= BOUND


def test_experts(tmp_path):
    """Names are those of the checkpoint, and peft follows transformers in what becomes of them."""
    extract_lora(
        saved(tuned(experts(1)), tmp_path / "tuned"), saved(experts(1), tmp_path / "base"), tmp_path / "out", rank=32
    )
    assert not json.loads((tmp_path / "out" / "adapter_config.json").read_text())["rank_pattern"]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "The following (rank|alpha)_pattern keys did not match"
        )  # that it adds itself
        model = peft.PeftModel.from_pretrained(experts(1), tmp_path / "out").eval()
    assert (logits(model) - logits(tuned(experts(1)))).abs().max() <= BOUND


# --- merged adapters --------------------------------------------------------------------------------------------------


def adapter(make: Any, folder: Path, seed: int, **settings: Any) -> str:
    torch.manual_seed(seed)
    config = peft.LoraConfig(**({"init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings))
    peft.get_peft_model(make(), config).save_pretrained(folder)
    return str(folder)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        "llama",
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
        {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    ),
    "patterns": (
        "llama",
        {"r": 4, "target_modules": ["q_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 6}},
        {"r": 2, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 5}, "layers_to_transform": [1]},
    ),
    "regular expressions": (
        "llama",
        {"r": 4, "target_modules": r".*0\.self_attn\.(q|k)_proj"},
        {"r": 4, "target_modules": r".*1\.mlp\.up_proj"},
    ),
    "embeddings": (
        "llama",
        {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
        {"r": 3, "target_modules": ["embed_tokens"]},
    ),
    "transposed": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
    "experts": (
        "experts",
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
        {"r": 3, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
    ),
    "biases": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
        {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("weights", [(0.7, -0.4), (1.0, 1.0)])
def test_merged_adapters_are_the_sum(tmp_path, case, weights):
    """The oracle: the weights of the base with each of the adapters merged into it by peft, summed as deltas."""
    kind, *settings = CASES[case]
    make = MODELS[kind]
    folders = [
        adapter(make, tmp_path / name, i, **one) for i, (name, one) in enumerate(zip("ab", settings, strict=True))
    ]
    fastinterp.merge_adapters(recipe(dict(zip(folders, weights, strict=True))), tmp_path / "out")
    base = {name: x.double() for name, x in make().state_dict().items()}
    want = {name: x.clone() for name, x in base.items()}
    for folder, weight in zip(folders, weights, strict=True):
        merged = peft.PeftModel.from_pretrained(make(), folder).merge_and_unload().state_dict()
        for name, x in merged.items():
            want[name] += weight * (x.double() - base[name])
    model = make()
    model.load_state_dict({name: x.float() for name, x in want.items()})
    attached = _loaded(make(), tmp_path / "out")
    scale = max(1.0, float(logits(model).abs().max()))
    assert (logits(attached) - logits(model)).abs().max() <= 10 * BOUND * scale
    got = attached.merge_and_unload().state_dict()
    for name, x in want.items():
        assert (got[name].double() - x).abs().max() <= 1e-5 * max(1.0, float(x.abs().max())), name


def _loaded(base: Any, folder: Path) -> Any:
    """As `loaded`, of an adapter that may have the base's embeddings, as peft itself saves them."""
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    stored = load_file(folder / "adapter_model.safetensors")
    wanted = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert wanted.keys() <= stored.keys() and all("base_layer" in name for name in stored.keys() - wanted.keys())
    assert all(torch.equal(stored[name], wanted[name]) for name in wanted)
    assert not peft.set_peft_model_state_dict(model, stored).unexpected_keys
    return model


@pytest.mark.parametrize("weights", [(0.7, 0.4), (0.5, -1.0)])
def test_concatenation_is_that_of_peft(tmp_path, weights):
    settings = [{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, {"r": 2, "target_modules": ["q_proj"]}]
    folders = [
        adapter(MODELS["llama"], tmp_path / n, i, **s) for i, (n, s) in enumerate(zip("ab", settings, strict=True))
    ]
    fastinterp.merge_adapters(recipe(dict(zip(folders, weights, strict=True))), tmp_path / "out")
    fastinterp.merge_adapters(recipe(dict(zip(folders, weights, strict=True)), rank=3), tmp_path / "three")
    model = peft.PeftModel.from_pretrained(MODELS["llama"](), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    model.add_weighted_adapter(["a", "b"], list(weights), "cat", combination_type="cat")
    model.add_weighted_adapter(["a", "b"], list(weights), "svd", combination_type="svd", svd_rank=3)
    for kind, out in (("cat", "out"), ("svd", "three")):
        ours = loaded(MODELS["llama"](), tmp_path / out)
        for name, layer in model.base_model.model.named_modules():
            if not hasattr(layer, "lora_A") or kind not in layer.lora_A:
                continue
            want = layer.get_delta_weight(kind).double()
            got = ours.base_model.model.get_submodule(name).get_delta_weight("default").double()
            assert (got - want).abs().max() <= 1e-5 * want.abs().max(), (kind, name)


def test_whole_modules_and_tokens(tmp_path):
    """modules_to_save, and rows of tokens: those of the adapters, weighted."""
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5]}
    folders = [adapter(MODELS["llama"], tmp_path / name, i, **settings) for i, name in enumerate("ab")]
    for i, folder in enumerate(folders):
        file = Path(folder) / "adapter_model.safetensors"
        tensors = load_file(file)
        for name in tensors:
            if "lm_head" in name or "token" in name:
                tensors[name] = tensors[name] + i
        from safetensors.torch import save_file

        save_file(tensors, file, metadata={"format": "pt"})
    fastinterp.merge_adapters(recipe(dict.fromkeys(folders, 0.5)), tmp_path / "out")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    one, two = (load_file(Path(folder) / "adapter_model.safetensors") for folder in folders)
    whole = [name for name in made if "lora" not in name]
    assert len(whole) == 2
    assert all(torch.allclose(made[name], (one[name] + two[name]) / 2) for name in whole)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"] and config["trainable_token_indices"] == [3, 5]
    loaded(MODELS["llama"](), tmp_path / "out")
