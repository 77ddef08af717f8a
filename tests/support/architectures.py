"""Names of tensors as checkpoints of several architectures have them, with few layers."""

from __future__ import annotations

from collections.abc import Iterable


def _in(prefix: str, layers: int, rests: Iterable[str]) -> list[str]:
    kept = list(rests)
    return [f"{prefix}.{i}.{rest}" for i in range(layers) for rest in kept]


_ATTENTION = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
_LLAMA = [
    *_ATTENTION, *(f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")), "input_layernorm.weight",
    "post_attention_layernorm.weight",
]  # fmt: skip
_SIGLIP = [
    *(f"self_attn.{p}_proj.{w}" for p in ("q", "k", "v", "out") for w in ("weight", "bias")), "layer_norm1.weight",
    "layer_norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight",
]  # fmt: skip


def llama(layers: int = 4, *, tied: bool = False) -> list[str]:
    return [
        "model.embed_tokens.weight", *_in("model.layers", layers, _LLAMA), "model.norm.weight",
        *([] if tied else ["lm_head.weight"]),
    ]  # fmt: skip


def gpt2(layers: int = 4, prefix: str = "transformer.") -> list[str]:
    rests = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_proj.weight", "ln_2.weight", "mlp.c_fc.weight"]
    return [
        f"{prefix}wte.weight", f"{prefix}wpe.weight", *_in(f"{prefix}h", layers, rests), f"{prefix}ln_f.weight",
        f"{prefix}ln_f.bias",
    ]  # fmt: skip


def mixtral(layers: int = 3, experts: int = 4) -> list[str]:
    moe = [f"block_sparse_moe.experts.{e}.w{k}.weight" for e in range(experts) for k in (1, 2, 3)]
    rests = [*_ATTENTION, "block_sparse_moe.gate.weight", *moe, "input_layernorm.weight"]
    return ["model.embed_tokens.weight", *_in("model.layers", layers, rests), "model.norm.weight", "lm_head.weight"]


def deepseek(layers: int = 4) -> list[str]:
    """The first layer has no experts."""
    dense = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    moe = [f"mlp.experts.{e}.{p}_proj.weight" for e in range(3) for p in ("gate", "up")]
    blocks = [[*_ATTENTION, "input_layernorm.weight", *(moe if i else dense)] for i in range(layers)]
    inside = [f"model.layers.{i}.{rest}" for i, block in enumerate(blocks) for rest in block]
    return ["model.embed_tokens.weight", *inside, "model.norm.weight", "lm_head.weight"]


def gemma3_vision(text: int = 3, vision: int = 5) -> list[str]:
    """More layers in the vision tower than in the language model, as paligemma has."""
    tower = "vision_tower.vision_model"
    return [
        "language_model.model.embed_tokens.weight", *_in("language_model.model.layers", text, _LLAMA),
        "language_model.model.norm.weight", "multi_modal_projector.mm_input_projection_weight",
        "multi_modal_projector.mm_soft_emb_norm.weight", f"{tower}.embeddings.patch_embedding.weight",
        f"{tower}.embeddings.position_embedding.weight", *_in(f"{tower}.encoder.layers", vision, _SIGLIP),
        f"{tower}.post_layernorm.weight",
    ]  # fmt: skip


def qwen2_vl(text: int = 4, vision: int = 6) -> list[str]:
    blocks = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "norm1.weight"]
    return [
        "visual.patch_embed.proj.weight", *_in("visual.blocks", vision, blocks), "visual.merger.ln_q.weight",
        "visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", *llama(text),
    ]  # fmt: skip


def t5(layers: int = 3) -> list[str]:
    rests = ["layer.0.SelfAttention.q.weight", "layer.0.layer_norm.weight", "layer.1.DenseReluDense.wi.weight"]
    more = [*rests[:2], "layer.1.EncDecAttention.q.weight", "layer.2.DenseReluDense.wi.weight"]
    return [
        "shared.weight", *_in("encoder.block", layers, rests), "encoder.final_layer_norm.weight",
        *_in("decoder.block", layers, more), "decoder.final_layer_norm.weight", "lm_head.weight",
    ]  # fmt: skip


def bert(layers: int = 3) -> list[str]:
    rests = ["attention.self.query.weight", "attention.output.dense.weight", "output.LayerNorm.weight"]
    return [
        "bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight",
        *_in("bert.encoder.layer", layers, rests), "bert.pooler.dense.weight",
    ]  # fmt: skip


def clip(text: int = 3, vision: int = 6) -> list[str]:
    return [
        "logit_scale", "text_model.embeddings.token_embedding.weight",
        *_in("text_model.encoder.layers", text, _SIGLIP), "text_model.final_layer_norm.weight",
        "text_projection.weight", "vision_model.embeddings.patch_embedding.weight",
        "vision_model.pre_layrnorm.weight", *_in("vision_model.encoder.layers", vision, _SIGLIP),
        "vision_model.post_layernorm.weight", "visual_projection.weight",
    ]  # fmt: skip


def flux(double: int = 2, single: int = 4) -> list[str]:
    blocks = ["img_attn.qkv.weight", "img_mod.lin.weight", "txt_mlp.0.weight", "txt_mlp.2.weight"]
    return [
        "img_in.weight", "txt_in.weight", "time_in.in_layer.weight", *_in("double_blocks", double, blocks),
        *_in("single_blocks", single, ["linear1.weight", "norm.query_norm.scale"]), "final_layer.linear.weight",
    ]  # fmt: skip


def sdxl() -> list[str]:
    """A U-Net whose blocks differ, two text encoders of different make in one numbered list, and an autoencoder."""
    unet = "model.diffusion_model"
    down = [f"{unet}.input_blocks.0.0.weight"]
    for i in range(1, 9):
        resnet = ["in_layers.0.weight", "in_layers.2.weight", "out_layers.3.weight"]
        rests = ["op.weight"] if i % 3 == 0 else resnet
        down += [f"{unet}.input_blocks.{i}.0.{rest}" for rest in rests]
    up = [f"{unet}.output_blocks.{i}.0.{rest}" for i in range(9) for rest in ("in_layers.0.weight", "skip.weight")]
    one = _in("conditioner.embedders.0.transformer.text_model.encoder.layers", 4, _SIGLIP)
    two = _in("conditioner.embedders.1.model.transformer.resblocks", 6, ["attn.in_proj_weight", "ln_1.weight"])
    return [
        *one, *two, f"{unet}.time_embed.0.weight", f"{unet}.time_embed.2.weight", *down,
        *_in(f"{unet}.middle_block.1.transformer_blocks", 3, ["attn1.to_q.weight"]), *up, f"{unet}.out.0.weight",
        *_in("first_stage_model.encoder.down", 4, ["block.0.conv1.weight"]),
    ]  # fmt: skip


def mamba(layers: int = 4) -> list[str]:
    rests = ["norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.conv1d.weight"]
    return ["backbone.embeddings.weight", *_in("backbone.layers", layers, rests), "backbone.norm_f.weight"]
