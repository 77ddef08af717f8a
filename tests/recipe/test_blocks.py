"""`{blocks: [...]}`: a number for each block of a U-Net, by the names of Stable Diffusion 1.5 and SDXL."""

from __future__ import annotations

import numpy as np
import pytest

import fastinterp
from fastinterp.errors import RecipeError
from fastinterp.recipe.blocks import block_of
from tests.support.models import load, save

UNET = "model.diffusion_model."
# Tensors of the original files, one of each kind, with the index of their number among the 26 or 20.
SD15 = {
    "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight": 0,
    "first_stage_model.decoder.up.1.block.2.conv1.weight": 0,
    "model_ema.decay": 0,
    f"{UNET}time_embed.0.weight": 0,
    f"{UNET}input_blocks.0.0.weight": 1,
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": 2,
    f"{UNET}input_blocks.10.0.in_layers.0.bias": 11,
    f"{UNET}input_blocks.11.0.in_layers.0.bias": 12,
    f"{UNET}middle_block.1.proj_in.weight": 13,
    f"{UNET}output_blocks.0.0.in_layers.2.weight": 14,
    f"{UNET}output_blocks.1.0.in_layers.2.weight": 15,
    f"{UNET}output_blocks.11.0.in_layers.2.weight": 25,
    f"{UNET}out.0.weight": 25,
}
SDXL = {
    "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc.weight": 0,
    f"{UNET}time_embed.2.bias": 0,
    f"{UNET}label_emb.0.0.weight": 0,
    f"{UNET}input_blocks.0.0.weight": 1,
    f"{UNET}input_blocks.8.1.transformer_blocks.9.ff.net.2.weight": 9,
    f"{UNET}middle_block.0.in_layers.0.weight": 10,
    f"{UNET}output_blocks.0.1.transformer_blocks.0.attn2.to_k.weight": 11,
    f"{UNET}output_blocks.8.0.skip_connection.weight": 19,
    f"{UNET}out.2.weight": 19,
}
NUMBERS = [round(0.03 * i + 0.05, 2) for i in range(26)]


def saved(tmp_path, names, seed):
    rng = np.random.default_rng(seed)
    return save(tmp_path / f"model{seed}", {name: rng.normal(size=(3, 5)).astype(np.float32) for name in names})


def arrays(folder):
    return {name: np.frombuffer(raw, np.float32) for name, (_, _, raw) in load(folder / "model.safetensors").items()}


def recipe(tmp_path, names, numbers, **more):
    a, b = (str(saved(tmp_path, names, seed)) for seed in (1, 2))
    return {
        "merge_method": "task_arithmetic", "base_model": a,
        "models": [{"model": b, "parameters": {"weight": {"blocks": numbers}}}], **more,
    }  # fmt: skip


@pytest.mark.parametrize(("names", "count"), [(SD15, 26), (SDXL, 20)], ids=["sd15", "sdxl"])
def test_weights_by_block(tmp_path, names, count):
    """a + w * (b - a), with the number of each block: in numpy's float32, a rounding for each operation."""
    how = recipe(tmp_path, names, NUMBERS[:count])
    report = fastinterp.merge(how, tmp_path / "out")
    a, b, out = (arrays(tmp_path / name) for name in ("model1", "model2", "out"))
    assert out.keys() == names.keys()
    for name, index in names.items():
        want = a[name] + np.float32(NUMBERS[index]) * (b[name] - a[name])
        assert np.array_equal(out[name], want), name
    used = {f"{w}" for w in report.notes()}
    assert any("no tensor gets the number of" in note for note in used)  # these models lack most of the blocks


def test_text_filters_before_it_and_other_methods(tmp_path):
    """As tools write them, with commas; the VAE has a number of its own; `t` of slerp has blocks, too."""
    weight = [{"filter": "first_stage_model", "value": 1}, {"blocks": ", ".join(map(str, NUMBERS))}]
    a, b = (str(saved(tmp_path, SD15, seed)) for seed in (1, 2))
    models = [{"model": b, "parameters": {"weight": weight}}]
    fastinterp.merge({"merge_method": "task_arithmetic", "base_model": a, "models": models}, tmp_path / "out")
    out, x, y = arrays(tmp_path / "out"), arrays(tmp_path / "model1"), arrays(tmp_path / "model2")
    name = "first_stage_model.decoder.up.1.block.2.conv1.weight"
    assert np.array_equal(out[name], y[name])
    name = f"{UNET}out.0.weight"
    assert np.array_equal(out[name], x[name] + np.float32(NUMBERS[25]) * (y[name] - x[name]))
    numbers = [1.0] + [0.0] * 25
    how = {"merge_method": "slerp", "base_model": a, "models": [{"model": b}], "parameters": {"t": {"blocks": numbers}}}
    fastinterp.merge(how, tmp_path / "slerp")
    out = arrays(tmp_path / "slerp")
    assert all(np.array_equal(out[n], (x if index else y)[n]) for n, index in SD15.items())


# Modules of diffusers' U-Nets (the first of Stable Diffusion 1.5, the last of SDXL) and the blocks of the original.
DIFFUSERS = {
    "conv_in.weight": "IN00",
    "down_blocks.0.resnets.0.conv1.weight": "IN01",
    "down_blocks.0.attentions.1.proj_in.weight": "IN02",
    "down_blocks.0.downsamplers.0.conv.weight": "IN03",
    "down_blocks.2.downsamplers.0.conv.weight": "IN09",
    "down_blocks.3.resnets.1.conv1.weight": "IN11",
    "mid_block.attentions.0.norm.weight": "M00",
    "up_blocks.0.resnets.2.conv1.weight": "OUT02",
    "up_blocks.0.upsamplers.0.conv.weight": "OUT02",
    "up_blocks.1.attentions.0.norm.weight": "OUT03",
    "up_blocks.3.attentions.2.norm.weight": "OUT11",
    "time_embedding.linear_1.weight": "BASE",
    "unet.up_blocks.2.resnets.0.conv1.weight": "OUT06",
    "encoder.down_blocks.0.resnets.0.conv1.weight": "BASE",  # of a VAE
    "decoder.mid_block.resnets.0.conv1.weight": "BASE",
}


@pytest.mark.parametrize(("tensor", "block"), DIFFUSERS.items())
def test_blocks_of_diffusers(tensor, block):
    assert block_of(tensor) == block


def test_all_of_a_model_of_diffusers_by_shape():
    """The tensors of diffusers' U-Net have, block by block, the shapes that the original's blocks have."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(32, 64, 128, 128), cross_attention_dim=16, attention_head_dim=4, norm_num_groups=8,
            sample_size=8,
        )  # fmt: skip
    blocks: dict[str, int] = {}
    for name, _ in unet.named_parameters():
        blocks[block_of(name)] = blocks.get(block_of(name), 0) + 1
    sides = {f"{side}{i:02}" for side in ("IN", "OUT") for i in range(12)}
    assert blocks.keys() == sides | {"BASE", "M00", "OUT"}
    assert blocks["BASE"] == 4 and blocks["IN00"] == 2 and blocks["OUT"] == 4  # linear layers, convolutions, a norm
    assert blocks["IN03"] == blocks["IN06"] == blocks["IN09"] == 2  # downsampling convolutions


@pytest.mark.parametrize(
    ("names", "value", "message"),
    [
        (SD15, NUMBERS[:25], "got 25 of them. Put the number of all that is in no block (BASE) before them"),
        (SD15, 0.5, "`blocks` takes 26 numbers (BASE, IN00 to IN11, M00, OUT00 to OUT11)"),
        (SD15, "0.5, much, " + "0," * 23 + "0", "must be a finite number (at most 3.4e38), got 'much'"),
        (SD15, NUMBERS[:20], "20 numbers are for SDXL, but this tensor is in a block beyond: give 26"),
        (SDXL, NUMBERS, "26 numbers are for Stable Diffusion 1.5 and 2, but this tensor is SDXL's: give 20"),
    ],
)
def test_refused(tmp_path, names, value, message):
    with pytest.raises(RecipeError) as caught:
        fastinterp.merge(recipe(tmp_path, names, value), tmp_path / "out")
    assert message in str(caught.value) and "$.models[0].parameters.weight.blocks" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_refused_where_nothing_is_a_number(tmp_path):
    how = recipe(tmp_path, SD15, NUMBERS, parameters={"normalize": {"blocks": NUMBERS}})
    with pytest.raises(RecipeError, match="`normalize` is no number, so it has no `blocks`"):
        fastinterp.merge(how, tmp_path / "out")


def test_language_models_have_no_blocks(tmp_path):
    how = recipe(tmp_path, ["model.layers.0.mlp.up_proj.weight"], NUMBERS)
    found = fastinterp.check(how)
    assert any(
        "`blocks`: no tensor gets the number of IN00, IN01, IN02 and 22 more: none is in such a block of a U-Net"
        in str(w)
        for w in found.warnings
    )


def test_explained(tmp_path):
    text = " ".join(str(fastinterp.explain(recipe(tmp_path, SD15, NUMBERS))).split())
    assert "IN00 0.08 (1 tensor)" in text and "OUT11 0.8 (2 tensors)" in text and "others 0.05 (4 tensors)" in text
