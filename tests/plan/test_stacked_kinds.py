"""Layers of several kinds, cut and stacked anew, in transformers: every tensor is used, every layer is of its kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import fastinterp

SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 128, "num_hidden_layers": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
CONVOLUTIONS = ["conv", "conv", "full_attention"] * 2

# Name -> (the configuration, keys that older configurations do not have).
MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "gemma2": (lambda: tf.Gemma2Config(**SIZES, head_dim=8, sliding_window=16), ("layer_types",)),
    "gemma3": (lambda: tf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16), ("layer_types",)),
    "cohere2": (lambda: tf.Cohere2Config(**SIZES, sliding_window=16), ("layer_types",)),
    "olmo3": (lambda: tf.Olmo3Config(**SIZES, sliding_window=16), ("layer_types",)),
    "gpt_oss": (
        lambda: tf.GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1), ("layer_types",),
    ),
    "qwen3": (
        lambda: tf.Qwen3Config(
            **SIZES, head_dim=8, use_sliding_window=True, sliding_window=8, max_window_layers=3
        ),
        ("layer_types",),
    ),
    "qwen2_moe": (
        lambda: tf.Qwen2MoeConfig(
            **SIZES, **EXPERTS, shared_expert_intermediate_size=16, mlp_only_layers=[1, 3]
        ),
        ("layer_types",),
    ),
    "qwen3_moe": (
        lambda: tf.Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=8, mlp_only_layers=[0], decoder_sparse_step=2), (),
    ),
    "qwen3_next": (
        lambda: tf.Qwen3NextConfig(
            **SIZES, **EXPERTS, head_dim=8, shared_expert_intermediate_size=16, linear_num_value_heads=4,
            linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        ),
        ("layer_types",),
    ),
    "llama4": (
        lambda: tf.Llama4TextConfig(
            **SIZES, head_dim=8, intermediate_size_mlp=64, num_local_experts=2, interleave_moe_layer_step=2
        ),
        ("layer_types", "moe_layers", "no_rope_layers"),
    ),
    "smollm3": (lambda: tf.SmolLM3Config(**SIZES), ("layer_types", "no_rope_layers")),
    "gpt_neo": (
        lambda: tf.GPTNeoConfig(
            hidden_size=32, num_layers=6, num_heads=4, vocab_size=64, max_position_embeddings=64, window_size=16,
            attention_types=[[["global", "local"], 3]], bos_token_id=1, eos_token_id=2,
        ),
        ("attention_layers",),
    ),
    "lfm2": (
        lambda: tf.Lfm2Config(**SIZES, layer_types=CONVOLUTIONS, block_auto_adjust_ff_dim=False), (),
    ),
    "nemotron_h": (
        lambda: tf.NemotronHConfig(
            **SIZES, hybrid_override_pattern="M-M*M-", mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=4,
            n_groups=1, head_dim=8,
        ),
        (),
    ),
    "bamba": (
        lambda: tf.BambaConfig(
            **SIZES, attn_layer_indices=[2, 5], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1
        ),
        (),
    ),
    "deepseek_v3": (
        lambda: tf.DeepseekV3Config(**SIZES | DEEPSEEK, first_k_dense_replace=2, num_nextn_predict_layers=0), (),
    ),
    "ernie4_5_moe": (
        lambda: tf.Ernie4_5_MoeConfig(
            **SIZES, moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1,
            moe_layer_end_index=4, moe_layer_interval=1, moe_num_shared_experts=1,
        ),
        (),
    ),
    "jamba": (
        lambda: tf.JambaConfig(
            **SIZES, attn_layer_offset=1, attn_layer_period=3, expert_layer_offset=1, expert_layer_period=2,
            num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4,
        ),
        (),
    ),
    "modernbert": (
        lambda: tf.ModernBertConfig(
            hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=64, num_hidden_layers=6,
            local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        ),
        ("layer_types",),
    ),
}  # fmt: skip
CUTS = {
    "cut": [(0, 2), (3, 6)], "doubled": [(0, 4), (2, 6)], "without the first": [(1, 6)], "swapped": [(3, 6), (0, 3)],
    "thrice": [(0, 1), (1, 2), (1, 2), (1, 2), (2, 6)],
}  # fmt: skip
# Cuts that no configuration of the model can describe: its layers are told apart by numbers, or by their place.
CANNOT = {
    ("deepseek_v3", "swapped"), ("ernie4_5_moe", "swapped"), ("jamba", "cut"), ("jamba", "thrice"),
    ("modernbert", "without the first"), ("modernbert", "swapped"),
}  # fmt: skip


def auto(config: Any) -> Any:
    return tf.AutoModelForMaskedLM if config.model_type == "modernbert" else tf.AutoModelForCausalLM


def made(folder: Path, config: Any, without: tuple[str, ...] = ()) -> str:
    torch.manual_seed(0)
    auto(config).from_config(config).save_pretrained(folder)
    file = folder / "config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in said.items() if key not in without}))
    return str(folder)


def loaded(folder: str | Path) -> tuple[list[str], dict[str, Any]]:
    """What each layer is made of, and what transformers says of the tensors."""
    model, info = auto(tf.AutoConfig.from_pretrained(folder)).from_pretrained(folder, output_loading_info=True)
    (layers,) = (m for n, m in model.named_modules() if n.split(".")[-1] in ("layers", "h") and n.count(".") == 1)
    return [described(layer) for layer in layers], {key: value for key, value in info.items() if value}


def described(layer: torch.nn.Module) -> str:
    """Classes and settings of all its modules, but for its number."""
    apart = {"layer_idx", "layer_id", "training", "sliding_window_pattern"}
    settings = []
    for name, module in layer.named_modules():
        values = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str)) and k not in apart}
        settings.append((name, type(module).__name__, sorted((k, v) for k, v in values.items() if k[0] != "_")))
    return json.dumps(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_what_its_source_is(tmp_path: Path, name: str):
    """With configurations as transformers writes them now, and with those that leave out what it computes."""
    make, without = MODELS[name]
    for old in (False, True) if without else (False,):
        source = made(tmp_path / f"model{old}", make(), without if old else ())
        kinds, clean = loaded(source)
        assert not clean
        for cut, ranges in CUTS.items():
            slices = [{"sources": [{"model": source, "layer_range": list(span)}]} for span in ranges]
            recipe = {"merge_method": "passthrough", "slices": slices}
            out = tmp_path / f"{cut}{old}"
            report = fastinterp.merge(recipe, out)
            result, info = loaded(out)
            same = result == [kinds[layer] for first, end in ranges for layer in range(first, end)] and not info
            if (name, cut) in CANNOT:
                assert not same and len(report.warnings) >= 1, (cut, old)
                assert "Choose other layer ranges" in report.warnings[0]
                assert tuple(fastinterp.explain(recipe).warnings) == report.warnings
            else:
                assert same and report.warnings == (), (cut, old, report.warnings, info)
                assert any("config.json changed for the layers" in r for r in report.remarks) or cut == "swapped"


def test_check_says_it(tmp_path: Path):
    """`check` finds it from headers and config.json."""
    from fastinterp.inspect.check import check

    source = made(tmp_path / "model", MODELS["jamba"][0]())
    slices = [{"sources": [{"model": source, "layer_range": span}]} for span in ([0, 2], [3, 6])]
    found = check({"merge_method": "passthrough", "slices": slices})
    (warning,) = [str(w) for w in found.warnings]
    assert "`expert_layer_period`, `expert_layer_offset` of config.json cannot say" in warning
    assert "layer 2 (layer 3 of its model) is sparse, not dense" in warning
    whole = [{"sources": [{"model": source, "layer_range": span}]} for span in ([0, 4], [4, 6])]
    assert not check({"merge_method": "passthrough", "slices": whole}).warnings


def test_layers_of_models_with_other_configurations(tmp_path: Path):
    """Each layer is of the kind that it has in its own model."""
    a = made(tmp_path / "a", tf.Gemma2Config(**SIZES, head_dim=8, sliding_window=16))
    types = ["full_attention"] * 3 + ["sliding_attention"] * 5
    b = made(
        tmp_path / "b",
        tf.Gemma2Config(**SIZES | {"num_hidden_layers": 8}, head_dim=8, sliding_window=16, layer_types=types),
    )
    slices = [{"sources": [{"model": m, "layer_range": span}]} for m, span in ((a, [0, 3]), (b, [1, 8]))]
    report = fastinterp.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    assert [w for w in report.warnings if "num_hidden_layers" not in w] == []
    result, info = loaded(tmp_path / "out")
    assert not info and result == loaded(a)[0][:3] + loaded(b)[0][1:]
    in_order = [{"sources": [{"model": m, "layer_range": span}]} for m, span in ((a, [0, 3]), (b, [3, 6]))]
    fastinterp.merge({"merge_method": "passthrough", "slices": in_order}, tmp_path / "order")
    assert loaded(tmp_path / "order")[0] == loaded(a)[0][:3] + loaded(b)[0][3:6]


def test_what_a_layer_does_because_of_its_place(tmp_path: Path):
    """T5 keeps its position bias with the first layer; GPT-2 may divide by the number of a layer."""
    torch.manual_seed(0)
    t5 = tf.T5Config(d_model=16, d_ff=16, d_kv=4, num_heads=2, num_layers=3, num_decoder_layers=3, vocab_size=32)
    tf.T5ForConditionalGeneration(t5).save_pretrained(tmp_path / "t5")
    source = str(tmp_path / "t5")

    def stacked(*spans: list[int]) -> dict[str, Any]:
        slices = [{"sources": [{"model": source, "layer_range": span}]} for span in spans]
        return {"merge_method": "passthrough", "modules": {"decoder": {"slices": slices}}, "base_model": source}

    (warning,) = fastinterp.explain(stacked([1, 3])).warnings
    assert "0 (layer 1 of its model: it lacks layer.0.SelfAttention.relative_attention_bias.weight)" in warning
    report = fastinterp.merge(stacked([0, 2], [1, 3]), tmp_path / "out")
    assert report.warnings == ()
    model, info = tf.T5ForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and len(model.decoder.block) == 4 and len(model.encoder.block) == 3
    gpt2 = tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=32, scale_attn_by_inverse_layer_idx=True)
    source = made(tmp_path / "gpt2", gpt2)
    slices = [{"sources": [{"model": source, "layer_range": [1, 3]}]}]
    (warning,) = fastinterp.explain({"merge_method": "passthrough", "slices": slices}).warnings
    assert "`scale_attn_by_inverse_layer_idx`" in warning


def test_shared_keys_and_values(tmp_path: Path):
    """Gemma 3n has embeddings for each layer, and layers that use keys and values of others."""
    config = tf.Gemma3nTextConfig(
        **SIZES | {"intermediate_size": [64] * 6}, head_dim=8, layer_types=["sliding_attention", "full_attention"] * 3,
        num_kv_shared_layers=2, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8, altup_num_inputs=2,
        laurel_rank=4, activation_sparsity_pattern=[0.0] * 6, sliding_window=16,
    )  # fmt: skip
    source = made(tmp_path / "model", config)
    slices = [{"sources": [{"model": source, "layer_range": span}]} for span in ([0, 4], [2, 6])]
    warnings = fastinterp.explain({"merge_method": "passthrough", "slices": slices}).warnings
    assert any("the embeddings for each layer (`embed_tokens_per_layer`" in w for w in warnings)
    assert any("use the keys and values of layers before them" in w for w in warnings)


def test_slices_without_layers(tmp_path: Path):
    """They choose embeddings and head, as in mergekit."""
    from safetensors.torch import load_file

    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = tf.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )  # fmt: skip
        models.append(tf.LlamaForCausalLM(config))
        torch.nn.init.normal_(models[-1].model.norm.weight)
        models[-1].save_pretrained(tmp_path / str(seed))
    spans = ((1, [0, 0]), (0, [0, 2]), (2, [2, 2]))
    slices = [{"sources": [{"model": str(tmp_path / str(m)), "layer_range": span}]} for m, span in spans]
    fastinterp.merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    result = load_file(tmp_path / "out" / "model.safetensors")
    parts = [model.state_dict() for model in models]
    assert torch.equal(result["model.embed_tokens.weight"], parts[1]["model.embed_tokens.weight"])
    assert torch.equal(result["model.norm.weight"], parts[2]["model.norm.weight"])
    assert torch.equal(result["lm_head.weight"], parts[2]["lm_head.weight"])
    for name in (name for name in parts[0] if ".layers." in name):
        assert torch.equal(result[name], parts[0][name])
    empty = [{"sources": [{"model": str(tmp_path / "0"), "layer_range": [1, 1]}]}]
    with pytest.raises(fastinterp.RecipeError, match="the slices have no layer"):
        fastinterp.merge({"merge_method": "passthrough", "slices": empty}, tmp_path / "none")
