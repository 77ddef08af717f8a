"""Adapts a model's config.json to layers that were cut and stacked anew."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.recipe.targets import LayerCount

# Where configurations keep the number of layers, those of encoders and decoders first.
_KEYS = {
    "decoder": ("num_decoder_layers", "decoder_layers"),
    "encoder": ("num_encoder_layers", "encoder_layers", "num_layers"),
    "": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"),
}
_SECTIONS = {
    "vision": ("vision_config", "visual"),
    "visual": ("vision_config", "visual"),
    "audio": ("audio_config",),
    "": ("text_config", "language_config", "llm_config"),
}
_BY_LAYER = ("layer", "block")  # in the names of lists with one item per layer: layer_types, no_rope_layers


def config_of_layers(config: Mapping[str, Any], counts: Sequence[LayerCount]) -> tuple[dict[str, Any], list[str]]:
    """A copy of the configuration with the layers that the output has, and what was changed, for people.

    The number of layers goes into each key that holds it now (num_hidden_layers, n_layer, ...: in text_config or
    vision_config, where there is one), and lists with one item per layer (layer_types) follow the layers. Where
    nothing is changed, the configuration does not say how many layers there are.
    """
    new, changed = dict(config), []
    for count in counts:
        path = _section(new, count.prefix)
        section = new if not path else dict(new[path])
        start = f"{path}." if path else ""
        for key in _keys(section, count):
            section[key] = len(count.layers)
            changed.append(f"{start}{key} {count.before} -> {len(count.layers)}")
        for key, value in list(section.items()):
            if isinstance(value, list) and len(value) == count.before and any(word in key for word in _BY_LAYER):
                section[key] = [value[layer] for layer in count.layers]
                changed.append(f"{start}{key} follows the layers")
        new = section if not path else new | {path: section}
    return new, changed


def _section(config: Mapping[str, Any], prefix: str) -> str:
    """The key of the part of the configuration that belongs to a stack; empty for the whole."""
    word = next(word for word in _SECTIONS if word in prefix)
    return next((key for key in _SECTIONS[word] if isinstance(config.get(key), Mapping)), "")


def _keys(section: Mapping[str, Any], count: LayerCount) -> list[str]:
    parts = count.prefix.split(".")
    for word in ("decoder", "encoder"):
        keys = [key for key in _KEYS[word] if word in parts and section.get(key) == count.before]
        if keys:
            return keys
    return [key for key in _KEYS[""] if section.get(key) == count.before]
