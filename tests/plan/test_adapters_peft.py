"""Adapters of PEFT added to models: what is written is what PEFT merges, and does what PEFT's model does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fastinterp  # noqa: E402

# What the libraries warn of is theirs.
pytestmark = [
    pytest.mark.filterwarnings(*(f"ignore::{kind}Warning" for kind in ("Future", "User", "Deprecation", "Runtime"))),
    pytest.mark.slow,
]
IDS = torch.arange(24).reshape(2, 12)


def llama(**settings: Any) -> Any:
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(config | settings)))


def gpt2() -> Any:
    settings = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings, bos_token_id=0, eos_token_id=1))


def bert() -> Any:
    settings = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**settings, intermediate_size=48, max_position_embeddings=32, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def t5() -> Any:
    settings = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**settings, decoder_start_token_id=0))


def resnet() -> Any:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return transformers.ResNetForImageClassification(config)


def masked(kind: str) -> Any:
    """A model whose output layer is its input embedding, under a name of its own, and has a bias."""
    settings: dict[str, Any] = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0, "initializer_range": 0.3}
    if kind == "modernbert":
        tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 1)
        model = transformers.ModernBertForMaskedLM(transformers.ModernBertConfig(**settings | tokens))
    else:
        name = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}[kind]
        own = {"embedding_size": 32} if kind == "electra" else {}
        config = getattr(transformers, f"{name}Config")(**settings, **own)
        model = getattr(transformers, f"{name}ForMaskedLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter))
    return model


def bart() -> Any:
    sides = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in
             (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = transformers.BartConfig(vocab_size=40, d_model=32, max_position_embeddings=32, **sides)
    return transformers.BartForConditionalGeneration(config)


def mixture(kind: str) -> Any:
    common = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2}  # fmt: skip
    if kind == "qwen3_moe":
        config = transformers.Qwen3MoeConfig(**common, moe_intermediate_size=16, num_experts=4)
        return transformers.Qwen3MoeForCausalLM(config)
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, num_local_experts=4))
    settings = common | {"intermediate_size": 32, "sliding_window": 8}  # square: their order is known from the type
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**settings, num_local_experts=4))


def config(**settings: Any) -> Any:
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | settings))


def adapt(model: Any, settings: Any, seed: int = 0) -> Any:
    """The model of peft, with all that it trains far from where it starts."""
    adapted = peft.get_peft_model(copy.deepcopy(model), settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
                else:
                    parameter.add_(0.15 * torch.randn_like(parameter))
    return adapted.eval()


def inputs_of(model: Any) -> dict[str, Any]:
    kind = model.config.model_type
    if kind == "resnet":
        return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
    return {"input_ids": IDS} | ({"decoder_input_ids": IDS[:, :5]} if kind == "t5" else {})


def logits(model: Any) -> Any:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        return model(**inputs_of(inner)).logits


def merged(tmp_path: Path, model: Any, adapters: list[Any], text: str = "", **options: Any) -> Path:
    """The folder of the base with these adapters of peft, each in a folder of its own, merged."""
    model.save_pretrained(tmp_path / "base")
    for i, adapted in enumerate(adapters):
        adapted.save_pretrained(tmp_path / f"lora{i}")
    name = "+".join([str(tmp_path / "base"), *(str(tmp_path / f"lora{i}") for i in range(len(adapters)))])
    recipe = {"merge_method": "passthrough", "models": [{"model": text or name}]}
    fastinterp.merge(recipe, tmp_path / "out", **options)
    return tmp_path / "out"


def load(out: Path, like: Any) -> Any:
    """As transformers loads it: no tensor is missing, unexpected or of another shape."""
    loaded, info = type(like).from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return loaded.eval()


def assert_alike(got: Any, want: Any, base: Any) -> None:
    """Logits that rounding alone sets apart.

    Weights of both differ by a few units in the last place of float32, 2^-23; so do the sums of the layers above, of
    which there are less than 2^5, each with less than 2^6 terms. All of them add up at worst.
    """
    assert (got - want).abs().max() <= 2.0**-12 * want.abs().max()
    assert (base - want).abs().max() > 0.02 * want.abs().max()  # and the adapter changes something


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, tuple[Any, Any]] = {
    "linear": (llama, config(target_modules=LINEAR)),
    "all-linear": (llama, config(target_modules="all-linear")),
    "rslora": (llama, config(target_modules=LINEAR, use_rslora=True)),
    "patterns": (
        llama,
        config(
            target_modules=LINEAR,
            rank_pattern={"q_proj": 8, r"layers\.1\.mlp\.(up|down)_proj": 2, ".*o_proj": 3, "o_proj": 1},
            alpha_pattern={"model.layers.0.self_attn.q_proj": 3, "^model.layers.1.*v_proj": 9, "_proj": 100},
        ),
    ),
    "lm_head and embeddings": (llama, config(target_modules=["q_proj", "lm_head", "embed_tokens"])),
    "lora_bias": (lambda: llama(attention_bias=True), config(target_modules=["q_proj", "o_proj"], lora_bias=True)),
    "bias all": (lambda: llama(attention_bias=True), config(target_modules=["q_proj"], bias="all")),
    "bias lora_only": (bert, config(target_modules=["query", "value"], bias="lora_only")),
    "modules_to_save": (bert, config(target_modules=["query", "dense"], modules_to_save=["classifier"])),
    "classifier": (bert, config(task_type="SEQ_CLS", target_modules=["query", "value"])),
    "tokens": (llama, config(target_modules=["q_proj"], trainable_token_indices=[3, 17, 5])),
    "tokens by name": (llama, config(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [0, 39]})),
    "gpt2": (gpt2, config(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "gpt2, config wrong": (gpt2, config(target_modules=["c_attn", "c_proj"])),
    "t5": (t5, config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v", "wi", "wo"])),
    "conv": (resnet, config(target_modules=["convolution"], modules_to_save=["classifier"])),
    "dora": (llama, config(target_modules=LINEAR, use_dora=True)),
    "dora, embeddings": (llama, config(target_modules=["embed_tokens", "q_proj"], use_dora=True)),
    "dora, gpt2": (gpt2, config(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, use_dora=True)),
    "dora, conv": (resnet, config(target_modules=["convolution"], use_dora=True)),
    "qwen3_moe": (
        lambda: mixture("qwen3_moe"),
        config(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
    "mixtral": (
        lambda: mixture("mixtral"),
        config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "mixtral, one": (lambda: mixture("mixtral"), config(target_modules=[], target_parameters=["experts.down_proj"])),
    "gpt_oss": (
        lambda: mixture("gpt_oss"),
        config(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "parameter of a layer": (llama, config(target_modules=[], target_parameters=["q_proj.weight"])),
    "tied embedding": (
        lambda: llama(tie_word_embeddings=True), config(target_modules=["embed_tokens", "q_proj"])
    ),
    "tied head": (lambda: llama(tie_word_embeddings=True), config(target_modules=["lm_head", "q_proj"])),
    "tied head, saved": (
        lambda: llama(tie_word_embeddings=True), config(target_modules=["q_proj"], modules_to_save=["lm_head"])
    ),
    "tied embedding, saved": (
        lambda: llama(tie_word_embeddings=True), config(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    ),
    "tied embedding, tokens": (
        lambda: llama(tie_word_embeddings=True), config(target_modules=["q_proj"], trainable_token_indices=[3, 17])
    ),
    "embeddings and head alone": (llama, config(target_modules=["embed_tokens", "lm_head"], use_dora=True)),
    "bert, embeddings": (lambda: masked("bert"), config(target_modules=["query", "word_embeddings"])),
    "bert, head": (lambda: masked("bert"), config(target_modules=["query", "decoder"])),
    "bert, biases": (lambda: masked("bert"), config(target_modules=["query"], bias="all")),
    "bert, head and biases": (lambda: masked("bert"), config(target_modules=["query", "decoder"], bias="all")),
    "bert, head saved": (
        lambda: masked("bert"), config(target_modules=["query"], modules_to_save=["decoder"])
    ),
    "roberta, embeddings saved": (
        lambda: masked("roberta"), config(target_modules=["query"], modules_to_save=["word_embeddings"])
    ),
    "electra, embeddings": (lambda: masked("electra"), config(target_modules=["query", "word_embeddings"])),
    "modernbert, embeddings": (lambda: masked("modernbert"), config(target_modules=["Wqkv", "tok_embeddings"])),
    "tied, kept": (
        lambda: llama(tie_word_embeddings=True),
        config(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_does_what_the_adapter_did(tmp_path, case):
    make, settings = CASES[case]
    torch.manual_seed(1)
    model = make().eval()
    adapted = adapt(model, copy.deepcopy(settings))
    loaded = load(merged(tmp_path, model, [adapted]), model)
    assert_alike(logits(loaded), logits(adapted), logits(model))


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "copies": (bart, config(target_modules=["q_proj", "shared"]), "a model of the type `bart` needs them alike"),
    "rows and head": (
        lambda: llama(tie_word_embeddings=True),
        config(target_modules=["q_proj", "lm_head"], trainable_token_indices=[3]),
        "rows of tokens of one are rows of both",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tied_embeddings_that_cannot_be_changed_alone(tmp_path, case):
    make, settings, why = REFUSED[case]
    model = make()
    with pytest.raises(fastinterp.CheckpointError, match="is its output layer, too") as caught:
        merged(tmp_path, model, [adapt(model, copy.deepcopy(settings))])
    assert why in str(caught.value)
