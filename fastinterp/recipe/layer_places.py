"""A stack of layers in the configurations of its models, and what its layers do because of their place."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from fastinterp.recipe.layer_defaults import FULL, Config
from fastinterp.recipe.layer_kinds import KEYS, kinds_of
from fastinterp.recipe.targets import LayerCount

# Model types whose layers compute with their number, and with what.
_BY_NUMBER = {
    "minimax": "the decay of linear attention depends on it",
    "diffllama": "`lambda_init` of differential attention depends on it",
}
# Model types whose last layer has full attention, whatever the configuration says.
_LAST_FULL = (
    "beam", "diffusion_gemma_text", "embedding_gemma2_text", "gemma4_text", "gemma4_unified_text",
)  # fmt: skip
# Names of numbers that may count layers in a way that is not known here.
_MAY_COUNT = re.compile(
    "(layer|block|attn|attention|moe|expert).*(every|interval|freq|period|offset|step|stride)"
    "|(every|interval|freq|period|offset|step|stride|^mb_per).*(layer|block)"
)
_FEATURES = ("vision_feature_layer", "vision_feature_layers", "vision_select_layer", "mm_vision_select_layer")


class Stack(msgspec.Struct, frozen=True):
    """A stack in the configurations of all models.

    section   the part of the output's configuration that belongs to it, as the origin has it
    before    how many layers that says there are, those that predict further tokens aside
    layers    of the output: (configuration of the model that it is from, number there); those aside are not here
    sections  of each of these models, with its number of layers
    """

    count: LayerCount
    section: Config
    before: int
    layers: list[tuple[int, int]]
    sections: dict[int, tuple[Config, int]]

    @property
    def part(self) -> str:
        return part_of(self.count.prefix)


def part_of(prefix: str) -> str:
    parts = prefix.split(".")
    return next((word for word in ("decoder", "encoder") if word in parts), "")


def place_warnings(section: Config, stack: Stack) -> list[str]:
    """Warnings of what a layer does because of its place, whatever the configuration says."""
    warnings = []
    numbers = [layer for _, layer in stack.layers]
    moved = numbers != list(range(stack.before))
    by_number = _BY_NUMBER.get(str(section.get("model_type")))
    if section.get("scale_attn_by_inverse_layer_idx") is True:
        by_number = "attention is divided by it (`scale_attn_by_inverse_layer_idx`)"
    if section.get("use_cla") is True:
        by_number = "layers share keys and values by it (`use_cla`)"
    if moved and by_number:
        warnings.append(
            f"layers of this model compute with their number: {by_number}. Those at other places than before, or in "
            "another number of layers, compute something else than they were trained to"
        )
    types = section.get("layer_types")
    if section.get("model_type") in _LAST_FULL and isinstance(types, list) and types[-1:] != [FULL]:
        warnings.append(
            "the last layer of this model must have full attention: transformers takes it for such, whatever it is. "
            "Choose layer ranges that end with a layer of full attention"
        )
    for key, value in section.items():
        unknown = key not in KEYS and type(value) is int and value > 1 and _MAY_COUNT.search(key)
        if unknown and any((i - layer) % value for i, layer in enumerate(numbers)):
            warnings.append(
                f"`{key}` {value} of config.json may say which layers are of which kind, in a way that is not known "
                f"here. Layers that move by multiples of {value} keep theirs; see that the others do"
            )
    hybrid = [kinds[1].count("hybrid") for n, config in ((stack.before, stack.section), (len(numbers), section))
              if (kinds := kinds_of(config, n, "attention"))]  # fmt: skip
    key = "deepstack_visual_indexes"
    if isinstance(section.get(key), list) and len(section[key]) != len(stack.section[key]):
        warnings.append(
            f"`{key}` has {len(section[key])} layers now, {len(stack.section[key])} before, and each has a merger of "
            "its own among the tensors. Choose layer ranges that keep each of these layers once"
        )
    if section.get("model_type") == "zamba2" and hybrid and hybrid[-1] > hybrid[0]:
        warnings.append(
            f"there are {hybrid[-1]} layers with shared attention, {hybrid[0]} before: each has adapters of its own "
            "in the shared blocks, and the further ones are random numbers when the output is loaded"
        )
    per_layer = section.get("hidden_size_per_layer_input")
    if isinstance(per_layer, int) and per_layer > 0 and moved:
        warnings.append(
            "the embeddings for each layer (`embed_tokens_per_layer`, `per_layer_model_projection`) have "
            f"{per_layer} columns for each of the {stack.before} layers, and are copied as they are: the output's "
            f"{len(numbers)} layers find those of others, or none, and transformers refuses to load it if the "
            "number of layers differs. Cut no layers of this model"
        )
    shared = kinds_of(section, len(numbers), "keys and values")
    if moved and shared is not None and "shared" in shared[1]:
        warnings.append(
            f"the last {shared[1].count('shared')} layers use the keys and values of layers before them "
            "(`num_kv_shared_layers`): in another order, of other layers than they were trained with"
        )
    return warnings


def set_features(config: dict[str, Any], stack: Stack) -> list[str]:
    """Set the number of the vision layer whose output the rest of the model reads; warnings, if it is gone.

    Such a number counts outputs: 0 is that of the embedding, 1 that of the first layer, -1 that of the last.
    """
    warnings = []
    after, numbers = len(stack.layers), [layer for _, layer in stack.layers]
    for key in _FEATURES:
        value = config.get(key)
        new = []
        for one in value if isinstance(value, list) else [value] if type(value) is int else []:
            layer = one - 1 if one >= 0 else stack.before + one
            if one != 0 and layer not in numbers:
                warnings.append(
                    f"`{key}` of config.json names the output of vision layer {layer}, which the output does not have. "
                    "Keep that layer, or write another number there"
                )
                break
            at = 0 if one == 0 else after - numbers[::-1].index(layer)
            new.append(at if one >= 0 else at - after - 1)
        else:
            if new:
                config[key] = new if isinstance(value, list) else new[0]
    return warnings
