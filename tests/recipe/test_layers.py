"""Layers are found in the names of tensors alone."""

from __future__ import annotations

import pytest

from fastinterp.recipe.layers import Layers, Stack
from tests.support import architectures as arch

UNET, TEXT = "model.diffusion_model", "conditioner.embedders"

CASES = {
    "llama": (arch.llama(), [("model.layers", 4)], "model.layers"),
    "one layer": (arch.llama(1), [("model.layers", 1)], "model.layers"),
    "gpt2": (arch.gpt2(), [("transformer.h", 4)], "transformer.h"),
    "gpt2 without a prefix": (arch.gpt2(1, ""), [("h", 1)], "h"),
    "mixtral": (arch.mixtral(), [("model.layers", 3)], "model.layers"),
    "mixtral of one layer": (arch.mixtral(1), [("model.layers", 1)], "model.layers"),
    "deepseek": (arch.deepseek(), [("model.layers", 4)], "model.layers"),
    "gemma3": (
        arch.gemma3_vision(),
        [("language_model.model.layers", 3), ("vision_tower.vision_model.encoder.layers", 5)],
        "language_model.model.layers",
    ),
    "qwen2-vl": (arch.qwen2_vl(), [("visual.blocks", 6), ("model.layers", 4)], "model.layers"),
    "t5": (arch.t5(), [("encoder.block", 3), ("decoder.block", 3)], "decoder.block"),
    "bert": (arch.bert(), [("bert.encoder.layer", 3)], "bert.encoder.layer"),
    "clip": (
        arch.clip(),
        [("text_model.encoder.layers", 3), ("vision_model.encoder.layers", 6)],
        "text_model.encoder.layers",
    ),
    "flux": (arch.flux(), [("double_blocks", 2), ("single_blocks", 4)], "single_blocks"),
    "sdxl": (
        arch.sdxl(),
        [
            (f"{TEXT}.0.transformer.text_model.encoder.layers", 4),
            (f"{TEXT}.1.model.transformer.resblocks", 6),
            (f"{UNET}.input_blocks", 9),
            (f"{UNET}.middle_block.1.transformer_blocks", 3),
            (f"{UNET}.output_blocks", 9),
            ("first_stage_model.encoder.down", 4),
        ],
        None,
    ),
    "mamba": (arch.mamba(), [("backbone.layers", 4)], "backbone.layers"),
    "no layers": (["weight", "mlp.0.weight", "mlp.1.weight", "a.0", "b.1.c.d", "é.²x.1.2.3"], [], None),
    "nothing": ([], [], None),
}


@pytest.mark.parametrize(("names", "stacks", "main"), CASES.values(), ids=CASES)
def test_stacks(names, stacks, main):
    """In the order of the names, and the one that slices cut; the order of the names changes none of it."""
    found = Layers(names)
    assert [(s.prefix, s.layers) for s in found.stacks] == stacks
    assert (found.main.prefix if found.main else None) == main
    back = Layers(reversed(names))
    assert set(back.stacks) == set(found.stacks)
    assert back.main == found.main


def test_places():
    """The first number counts that makes a stack: experts are in layers, and layers in numbered text encoders."""
    found = Layers(arch.mixtral(2))
    stack = Stack("model.layers", 2)
    assert found.member("model.layers.1.block_sparse_moe.experts.3.w1.weight") == (
        stack, 1, "block_sparse_moe.experts.3.w1.weight",
    )  # fmt: skip
    assert found.member("model.norm.weight") is None
    name = f"{TEXT}.1.model.transformer.resblocks.5.ln_1.weight"
    member = Layers(arch.sdxl()).member(name)
    assert member is not None
    assert member[1:] == (5, "ln_1.weight")


def test_a_stack_with_a_gap_is_none():
    names = [name for name in arch.llama() if ".2." not in name]
    assert Layers(names).stacks == ()


@pytest.mark.parametrize(
    ("names", "after"),
    [
        (arch.llama(), ["model.norm.weight", "lm_head.weight"]),
        (arch.gpt2(), ["transformer.ln_f.weight", "transformer.ln_f.bias"]),
        (arch.gemma3_vision(), ["language_model.model.norm.weight"]),
        (arch.qwen2_vl(), ["model.norm.weight", "lm_head.weight"]),
        (arch.t5(), ["decoder.final_layer_norm.weight", "lm_head.weight"]),
        (arch.bert(), ["bert.pooler.dense.weight"]),
        (arch.clip(), ["text_model.final_layer_norm.weight"]),
        (arch.flux(), ["final_layer.linear.weight"]),
        (arch.mamba(), ["backbone.norm_f.weight"]),
    ],
)
def test_what_comes_after_the_layers(names, after):
    found = Layers(names)
    main = found.main
    outside = [name for name in names if (member := found.member(name)) is None or member.stack != main]
    assert [name for name in outside if found.is_after(name)] == after
