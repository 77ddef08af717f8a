"""What transformers takes for granted of layers where config.json says nothing, by model type.

tests/recipe/test_layer_kinds.py compares these tables with the configuration classes of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

# Model type -> (key, value, kind of the layer that ends each group of `value` layers, kind of the others, list).
LAST_OF_GROUP: dict[str, tuple[str, int, str, str]] = {
    "afmoe": ("global_attn_every_n_layers", 4, FULL, SLIDING),
    "bailing_hybrid": ("layer_group_size", 6, FULL, LINEAR),
    "cohere2": ("sliding_window_pattern", 4, FULL, SLIDING),
    "exaone4": ("sliding_window_pattern", 4, FULL, SLIDING),
    "exaone_moe": ("sliding_window_pattern", 4, FULL, SLIDING),
    "gemma2": ("", 2, FULL, SLIDING),
    "gemma3_text": ("sliding_window_pattern", 6, FULL, SLIDING),
    "gemma3n_text": ("", 5, FULL, SLIDING),
    "gpt_oss": ("", 2, FULL, SLIDING),
    "kolibri1": ("", 5, FULL, SLIDING),
    "minimax": ("", 2, LINEAR, FULL),
    "olmo3": ("", 4, FULL, SLIDING),
    "qwen3_5_moe_text": ("full_attention_interval", 4, FULL, LINEAR),
    "qwen3_5_text": ("full_attention_interval", 4, FULL, LINEAR),
    "qwen3_next": ("full_attention_interval", 4, FULL, LINEAR),
    "qwen4_exp_text": ("full_attention_interval", 4, "indexed_attention", LINEAR),
    "t5_gemma_module": ("", 2, FULL, SLIDING),
    "t5gemma2_decoder": ("", 6, FULL, SLIDING),
    "t5gemma2_text": ("", 6, FULL, SLIDING),
    "ultrabert": ("", 3, FULL, SLIDING),
    "vaultgemma": ("", 2, FULL, SLIDING),
}
# The same for the layer that begins each group.
FIRST_OF_GROUP: dict[str, tuple[str, int, str, str]] = {
    "cwm": ("", 4, FULL, SLIDING),
    "granite_swa": ("", 4, FULL, SLIDING),
    "granitemoe_swa": ("", 4, FULL, SLIDING),
    "modernbert": ("global_attn_every_n_layers", 3, FULL, SLIDING),
    "modernbert-decoder": ("global_attn_every_n_layers", 3, FULL, SLIDING),
}
WINDOW_TYPES = (  # sliding from layer max_window_layers on
    "deepseek_ocr2_encoder", "dots1", "qwen2", "qwen2_5_omni_talker", "qwen2_5_omni_text", "qwen2_5_vl_text",
    "qwen2_vl_text", "qwen3", "qwen3_omni_moe_talker_code_predictor",
)  # fmt: skip
WITH_LAYER_TYPES = {*LAST_OF_GROUP, *FIRST_OF_GROUP, *WINDOW_TYPES, "qwen2_moe", "lfm2"}
NUMBERS: dict[str, dict[str, int]] = {
    "afmoe": {"num_dense_layers": 1},
    "axk1": {"first_k_dense_replace": 1},
    "axk2": {"first_k_dense_replace": 1},
    "bailing_hybrid": {"first_k_dense_replace": 2},
    "deepseek_v2": {"first_k_dense_replace": 0},
    "deepseek_v3": {"first_k_dense_replace": 3},
    "deepseek_v32": {"first_k_dense_replace": 3},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1},
    "exaone_moe": {"first_k_dense_replace": 1},
    "gemma3n_text": {"num_kv_shared_layers": 15},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4v_moe_text": {"first_k_dense_replace": 1},
    "jamba": {
        "attn_layer_offset": 4, "attn_layer_period": 8, "expert_layer_offset": 1, "expert_layer_period": 2,
        "num_experts": 16,
    },
    "lfm2_moe": {"num_dense_layers": 2},
    "llama4_text": {"interleave_moe_layer_step": 1, "no_rope_layer_interval": 4},
    "qwen2_moe": {"decoder_sparse_step": 1, "num_experts": 60, "max_window_layers": 28},
    "qwen3_moe": {"decoder_sparse_step": 1, "num_experts": 128},
    "qwen3_next": {"decoder_sparse_step": 1, "num_experts": 512},
    "qwen3_omni_moe_text": {"decoder_sparse_step": 1, "num_experts": 128},
    "qwen3_vl_moe_text": {"decoder_sparse_step": 1, "num_experts": 60},
    "smollm3": {"no_rope_layer_interval": 4},
    **{name: {"max_window_layers": 28} for name in WINDOW_TYPES},
    "qwen2_5_vl_text": {"max_window_layers": 80},
    "qwen2_vl_text": {"max_window_layers": 80},
    "dots1": {"first_k_dense_replace": 0, "max_window_layers": 62},
}  # fmt: skip
WITH_MLP_LAYER_TYPES = {
    "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v32", "exaone_moe", "glm4_moe_lite",
    "glm_moe_dsa",
}  # fmt: skip


def number(config: Config, key: str) -> int | None:
    """A whole number of a configuration, or that of its model type; None, if there is none."""
    value = config.get(key)
    if value is None:
        value = NUMBERS.get(type_of(config), {}).get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def type_of(config: Config) -> str:
    name = config.get("model_type")
    return name if isinstance(name, str) else ""
