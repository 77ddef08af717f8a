"""Which kind each layer is: what configurations say, as transformers reads it, and what is written for other layers."""

from __future__ import annotations

from typing import Any

import pytest

from fastinterp.recipe.layer_config import config_of_layers, facts_of
from fastinterp.recipe.layer_defaults import FULL, LINEAR, SLIDING, number
from fastinterp.recipe.layer_kinds import DENSE, FACTS, SPARSE, changes_for, kinds_of
from fastinterp.recipe.targets import LayerCount

SIZES = (5, 12, 13)


def classes() -> list[Any]:
    """The configuration classes of transformers whose layers are counted by num_hidden_layers."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    found: dict[type, None] = {}
    for name in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[name]
        for one in (kind, *(getattr(kind, "sub_configs", None) or {}).values()):
            if isinstance(one, type) and one.__name__ != "AutoConfig":
                found.setdefault(one)
    return list(found)


@pytest.mark.slow
def test_numbers_that_configurations_leave_out_are_those_of_transformers():
    """For every model type: kinds read from a configuration that names nothing but its number of layers."""
    compared, wrong = set(), []
    names = {"recurrent": LINEAR, "attention": SLIDING}  # RecurrentGemma's own
    for kind in classes():
        for n in SIZES:
            try:
                theirs = kind(num_hidden_layers=n)
            except Exception:  # classes that need more than a number of layers are not looked at
                continue
            bare = {"model_type": kind.model_type, "num_hidden_layers": n, "use_sliding_window": False}
            for fact, key in (
                ("attention", "layer_types"), ("rotary embeddings", "no_rope_layers"), ("experts", "mlp_layer_types"),
            ):  # fmt: skip
                ours, said = kinds_of(bare, n, fact), getattr(theirs, key, None)
                if ours is None or not isinstance(said, list):
                    continue
                if [names.get(kind, kind) for kind in ours[1]] != said:
                    wrong.append((kind.model_type, fact, n))
                compared.add((kind.model_type, fact))
            if hasattr(theirs, "layers_num_experts"):
                ours = kinds_of(bare, n, "experts")
                assert ours is not None
                assert [kind == SPARSE for kind in ours[1]] == [count > 1 for count in theirs.layers_num_experts]
            for key in ("first_k_dense_replace", "num_dense_layers", "decoder_sparse_step", "num_experts"):
                if (value := number(bare, key)) is not None and isinstance(getattr(theirs, key, None), int):
                    if getattr(theirs, key) != value:
                        wrong.append((kind.model_type, key, n))
                    compared.add((kind.model_type, key))
    assert wrong == []
    assert {name for name, _ in compared} >= {
        "gemma2", "gemma3_text", "cohere2", "olmo3", "gpt_oss", "modernbert", "qwen2", "qwen3", "qwen3_next", "smollm3",
        "jamba", "deepseek_v3", "glm4_moe", "qwen2_moe", "qwen3_moe", "afmoe", "exaone4", "recurrent_gemma",
    }  # fmt: skip


def test_every_way_is_read_back():
    """What is written for kinds that fit says these kinds; facts of equal layers are equal."""
    cases: list[tuple[dict[str, Any], str, list[Any], dict[str, Any] | None]] = [
        ({"layer_types": [FULL] * 4}, "attention", [FULL, SLIDING], {"layer_types": [FULL, SLIDING]}),
        ({"model_type": "gemma2"}, "attention", [FULL, SLIDING], {"layer_types": [FULL, SLIDING]}),
        ({"model_type": "gemma2"}, "attention", [SLIDING, FULL], {}),
        ({"hybrid_override_pattern": "M*M*"}, "attention", [FULL, LINEAR], {"hybrid_override_pattern": "*M"}),
        (
            {"attention_types": [[["global", "local"], 2]]}, "attention", ["global", "global"],
            {"attention_types": [[["global"], 2]]},
        ),
        ({"attn_layer_indices": [3]}, "attention", [FULL, LINEAR], {"attn_layer_indices": [0]}),
        ({"full_attn_idxs": [3]}, "attention", [FULL, "conv", FULL], {"full_attn_idxs": [0, 2]}),
        (
            {"attn_layer_period": 3, "attn_layer_offset": 1}, "attention", [FULL, LINEAR, LINEAR, LINEAR, FULL],
            {"attn_layer_period": 4, "attn_layer_offset": 0},
        ),
        ({"attn_layer_period": 3, "attn_layer_offset": 1}, "attention", [FULL, FULL, LINEAR], None),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, "attention",
            [FULL, SLIDING, SLIDING], {"max_window_layers": 1},
        ),
        ({"no_rope_layer_interval": 4}, "rotary embeddings", [1, 0], {"no_rope_layer_interval": 2}),
        ({"no_rope_layer_interval": 4}, "rotary embeddings", [0, 1], None),
        (
            {"model_type": "smollm3", "no_rope_layer_interval": 4}, "rotary embeddings", [0, 1],
            {"no_rope_layers": [0, 1]},
        ),
        ({"first_k_dense_replace": 3}, "experts", [DENSE, SPARSE, SPARSE], {"first_k_dense_replace": 1}),
        ({"first_k_dense_replace": 3}, "experts", [SPARSE, DENSE], None),
        (
            {"first_k_dense_replace": 3, "model_type": "exaone_moe"}, "experts", [SPARSE, DENSE],
            {"mlp_layer_types": [SPARSE, DENSE]},
        ),
        (
            {"decoder_sparse_step": 2, "num_experts": 4}, "experts", [SPARSE, DENSE],
            {"mlp_only_layers": [1], "decoder_sparse_step": 1},
        ),
        (
            {"decoder_sparse_step": 1, "mlp_only_layers": [3], "num_experts": 4}, "experts", [DENSE, SPARSE],
            {"mlp_only_layers": [0]},
        ),
        ({"moe_layers": [5]}, "experts", [SPARSE, DENSE], {"moe_layers": [0]}),
        ({"interleave_moe_layer_step": 2}, "experts", [DENSE, DENSE, SPARSE], {"interleave_moe_layer_step": 3}),
        (
            {"interleave_moe_layer_step": 2, "model_type": "llama4_text"}, "experts", [SPARSE, DENSE],
            {"moe_layers": [0]},
        ),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": -1, "moe_layer_interval": 1}, "experts",
            [DENSE, SPARSE, SPARSE, DENSE], {"moe_layer_end_index": 2},
        ),
        ({"num_dense_layers": 2}, "experts", [DENSE, SPARSE], {"num_dense_layers": 1}),
        ({"num_kv_shared_layers": 2}, "keys and values", ["own", "shared"], {"num_kv_shared_layers": 1}),
        ({"num_kv_shared_layers": 2}, "keys and values", ["shared", "own"], None),
    ]  # fmt: skip
    for config, fact, kinds, expected in cases:
        n = len(config.get("layer_types") or config.get("hybrid_override_pattern") or [0] * 4)
        said = kinds_of(config, n, fact)
        assert said is not None, config
        changes = changes_for(config, said[0], kinds)
        if expected is None:
            assert changes is None, (config, kinds)
            continue
        assert changes is not None, (config, kinds)
        changed = {key: value for key, value in changes.items() if config.get(key) != value}
        assert changed == expected, config
        again = kinds_of({**config, **changes}, len(kinds), fact)
        assert again is not None and again[1] == kinds
    assert {fact for _, fact, _, _ in cases} == set(FACTS)


def test_lists_that_do_not_count_say_the_same():
    """A period beside an explicit list is changed with it, if a period can say it; else it stays."""
    types = [SLIDING, SLIDING, SLIDING, FULL] * 2
    config = {
        "num_hidden_layers": 8, "model_type": "cohere2", "layer_types": types, "sliding_window_pattern": 4,
    }  # fmt: skip
    made = config_of_layers(config, [LayerCount("model.layers", 8, (1, 2, 3, 5, 6, 7))]).config
    assert made["sliding_window_pattern"] == 3 and made["layer_types"] == [SLIDING, SLIDING, FULL] * 2
    made = config_of_layers(config, [LayerCount("model.layers", 8, (3, 0))]).config
    assert made["sliding_window_pattern"] == 4 and made["layer_types"] == [FULL, SLIDING]


def test_each_layer_is_described_by_its_own_model():
    a = {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING], "mlp_only_layers": [0], "decoder_sparse_step": 1}
    b = {"num_hidden_layers": 3, "layer_types": [SLIDING] * 3, "mlp_only_layers": [2], "decoder_sparse_step": 1}
    count = LayerCount("model.layers", 2, (0, 1, 2), (0, 1, 1), (2, 3))
    made = config_of_layers(a, [count], [a, b]).config
    assert made == {
        "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING], "mlp_only_layers": [0, 2],
        "decoder_sparse_step": 1,
    }  # fmt: skip


def test_lists_of_numbers_and_lists_by_layer():
    config = {
        "num_hidden_layers": 4, "cross_attention_layers": [1, 3], "num_query_heads": [4, 8, 8, 16],
        "ffn_multipliers": [0.5, 1, 2, 4], "eos_token_id": [0, 1, 2, 3],
        "rope_scaling": {"mrope_section": [1, 2, 3, 4]},
        "block_configs": [{"n": i} for i in range(4)],
        "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "num_heads": 4},
    }  # fmt: skip
    made = config_of_layers(config, [LayerCount("model.layers", 4, (0, 1, 1, 3))])
    assert made.warnings == []
    assert made.config == {
        **config, "cross_attention_layers": [1, 2, 3], "num_query_heads": [4, 8, 8, 16],
        "ffn_multipliers": [0.5, 1, 1, 4], "block_configs": [{"n": i} for i in (0, 1, 1, 3)],
    }  # fmt: skip
    made = config_of_layers(config, [LayerCount("model.layers", 4, (3, 0))])
    assert made.config["linear_attn_config"] == {"full_attn_layers": [1], "kda_layers": [2], "num_heads": 4}
    assert made.config["num_query_heads"] == [16, 4] and made.config["cross_attention_layers"] == [0]
    assert made.config["eos_token_id"] == [0, 1, 2, 3] and made.config["rope_scaling"] == config["rope_scaling"]


def test_layers_that_predict_further_tokens():
    """They are counted apart from the others."""
    config = {"num_hidden_layers": 4, "num_nextn_predict_layers": 1, "first_k_dense_replace": 2}
    kept = config_of_layers(config, [LayerCount("model.layers", 5, (0, 2, 3, 4))]).config
    assert kept == {"num_hidden_layers": 3, "num_nextn_predict_layers": 1, "first_k_dense_replace": 1}
    cut = config_of_layers(config, [LayerCount("model.layers", 5, (0, 1, 2))]).config
    assert cut == {"num_hidden_layers": 3, "num_nextn_predict_layers": 0, "first_k_dense_replace": 2}
    assert facts_of(config, "model.layers", 5) == [
        (DENSE,),
        (DENSE,),
        (SPARSE,),
        (SPARSE,),
        ("predicts further tokens",),
    ]


def test_vision_layers():
    config = {
        "vision_config": {"num_hidden_layers": 4, "deepstack_visual_indexes": [1, 3]},
        "vision_feature_layer": -2, "vision_feature_layers": [0, 2, 4],
    }  # fmt: skip
    made = config_of_layers(config, [LayerCount("vision_tower.layers", 4, (0, 1, 2, 2, 3))])
    assert made.config == {
        "vision_config": {"num_hidden_layers": 5, "deepstack_visual_indexes": [1, 4]},
        "vision_feature_layer": -2, "vision_feature_layers": [0, 2, 5],
    }  # fmt: skip
    assert made.warnings == []
    made = config_of_layers(config, [LayerCount("vision_tower.layers", 4, (0, 1))])
    assert len(made.warnings) == 3
    assert "`vision_feature_layer` of config.json names the output of vision layer 2" in made.warnings[1]


def test_other_ways_to_number_layers():
    """Mappings from layer numbers, numbers as text, and numbers of another meaning, which are only warned of."""
    config = {
        "num_hidden_layers": 4, "per_layer_config": {"1": {"head_dim": 8}, "3": {"head_dim": 4}},
        "moe_layers_enum": "1,3", "id2label": {"0": "a", "1": "b"}, "dense_attention_every_n_layers": 2,
    }  # fmt: skip
    made = config_of_layers(config, [LayerCount("model.layers", 4, (0, 1, 0, 1, 2, 3))])
    assert made.warnings == []
    assert made.config["per_layer_config"] == {"1": {"head_dim": 8}, "3": {"head_dim": 8}, "5": {"head_dim": 4}}
    assert made.config["moe_layers_enum"] == "1,3,5" and made.config["id2label"] == config["id2label"]
    (warning,) = config_of_layers(config, [LayerCount("model.layers", 4, (0, 2, 3))]).warnings
    assert warning.startswith("`dense_attention_every_n_layers` 2 of config.json may say which layers are of which")


def test_layers_at_the_end():
    config = {"num_hidden_layers": 4, "model_type": "gemma4_text", "layer_types": [SLIDING, FULL] * 2}
    assert config_of_layers(config, [LayerCount("model.layers", 4, (0, 1))]).warnings == []
    (warning,) = config_of_layers(config, [LayerCount("model.layers", 4, (1, 2))]).warnings
    assert "the last layer of this model must have full attention" in warning


def test_a_number_of_layers_with_two_names():
    """Whisper's num_hidden_layers is that of its encoder."""
    config = {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}
    made = config_of_layers(config, [LayerCount("model.encoder.layers", 4, (0, 1))]).config
    assert made == {"encoder_layers": 2, "decoder_layers": 4, "num_hidden_layers": 2}
    made = config_of_layers(config, [LayerCount("model.decoder.layers", 4, (0, 1))]).config
    assert made == {"encoder_layers": 4, "decoder_layers": 2, "num_hidden_layers": 4}
