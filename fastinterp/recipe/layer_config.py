"""Adapts a model's config.json to layers that were cut and stacked anew.

What changes: the number of layers; lists with one item per layer, which follow the layers; lists of layer numbers, in
which a layer of the output is if its source is; and what else says of which kind the layers are (layer_kinds.py). All
of it comes from the configuration of the model that a layer is from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fastinterp.messages import listed
from fastinterp.recipe.layer_defaults import Config, number
from fastinterp.recipe.layer_kinds import FACTS, KEYS, Form, Kinds, changes_for, kinds_of
from fastinterp.recipe.layer_places import Stack, part_of, place_warnings, set_features
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
# In the names of lists with one item per layer: layer_types, num_query_heads, ffn_multipliers, ...
_BY_LAYER = re.compile(
    "layer|block|heads$|intermediate_size|multipliers|sparsity_pattern|indexer_types|attn_type_list|attention_window$"
    "|sliding_windows?$|hidden_sizes|rope_theta$|compress_ratios|moe_topk|num_experts|swiglu_limits"
)
# Names of lists of layer numbers.
_NUMBERED = re.compile(
    "(layer|block|attn|visual|hybrid).*(ids|indices|indexe?s|idxs)$|^(cross_attention|dense|moe|sparse|global|skip"
    "|full_attention|full_attn|kda|sliding)_layers$|_layers_enum$"
)
_NUMBERS_AS_TEXT = re.compile("[0-9]+(,[0-9]+)*")
_FROM_ONE = "linear_attn_config"  # a part whose lists count layers from 1: Kimi Linear's
_EXTRA = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_layers")  # predict further tokens, behind the others
_SHOWN = 5  # layers in a message before the rest is only counted


class LayeredConfig(msgspec.Struct, frozen=True):
    """A configuration for other layers.

    config    a copy
    changes   what was changed, for people
    warnings  what it cannot say of the layers, with what to do
    """

    config: dict[str, Any]
    changes: list[str]
    warnings: list[str]


def config_of_layers(
    config: Config, counts: Sequence[LayerCount], configs: Sequence[Config | None] = ()
) -> LayeredConfig:
    """The configuration of a model with other layers.

    config   that of the model which the output's is copied from
    counts   the stacks with other layers
    configs  of the recipe's models; None, or missing: as `config`
    """
    new, changed, warnings = dict(config), list[str](), list[str]()
    for count in counts:
        path = section_of(new, count.prefix)
        section = dict(new[path]) if path else new
        start = f"{path}." if path else ""
        stack, keys = _stack(config, count, configs)
        so_far = len(changed)
        extra = len(count.layers) - len(stack.layers)
        for key in keys:
            changed += _set(section, {key: len(stack.layers)}, start)
        for key in _EXTRA:
            if section.get(key) and keys and stack.before < count.before and section[key] != extra:
                changed += _set(section, {key: extra}, start)
        changed += _follow(section, stack, count, start)
        for fact in FACTS:
            changes, warning = _kinds(section, stack, fact)
            changed += _set(section, changes, start)
            warnings += [warning] if warning else []
        if not keys and len(changed) == so_far and len(count.layers) != count.before:
            warnings.append(
                f"config.json does not say how many layers {count.prefix} has: there were {count.before}, the output "
                f"has {len(count.layers)}. Write it there, as the software that loads the model wants it"
            )
        warnings += place_warnings(section, stack)
        new = section if not path else new | {path: section}
        if path == "vision_config":
            warnings += set_features(new, stack)
    return LayeredConfig(new, changed, warnings)


def section_of(config: Config, prefix: str) -> str:
    """The key of the part of the configuration that belongs to a stack; empty for the whole."""
    word = next(word for word in _SECTIONS if word in prefix)
    return next((key for key in _SECTIONS[word] if isinstance(config.get(key), Mapping)), "")


def facts_of(config: Config, prefix: str, layers: int) -> list[tuple[Any, ...]]:
    """What a configuration says of each layer of a stack: equal for layers that are built in the same way."""
    path = section_of(config, prefix)
    section: Config = config[path] if path else config
    main = _count(section, prefix, {layers})[1] or layers
    part = part_of(prefix)
    columns = [said[1] for fact in FACTS if (said := kinds_of(section, main, fact, part)) is not None]
    for key, value in section.items():
        if key not in KEYS and isinstance(value, list):
            if _is_numbered(key, value, main):
                columns.append([i in value for i in range(main)])
            elif len(value) == main and _BY_LAYER.search(key):
                columns.append([str(item) for item in value])
        elif key == _FROM_ONE and isinstance(value, Mapping):
            columns += [[i + 1 in v for i in range(main)] for k, v in value.items() if _is_numbered(k, v, 0)]
    return [tuple(column[i] for column in columns) if i < main else ("predicts further tokens",) for i in range(layers)]


def _stack(config: Config, count: LayerCount, configs: Sequence[Config | None]) -> tuple[Stack, list[str]]:
    """The stack, and the keys that have its number of layers."""
    path = section_of(config, count.prefix)
    section: Config = config[path] if path else config
    keys, before = _count(section, count.prefix, {count.before, *count.sizes})
    sections: dict[int, tuple[Config, int]] = {}
    models = count.models or (0,) * len(count.layers)
    for model in dict.fromkeys(models):
        other = configs[model] if model < len(configs) else None
        theirs = config if other is None else other
        their_path = section_of(theirs, count.prefix)
        their_section: Config = theirs[their_path] if their_path else theirs
        size = count.sizes[model] if model < len(count.sizes) else count.before
        said = _count(their_section, count.prefix, {size})[1]
        sections[model] = their_section, said or size
    every = zip(models, count.layers, strict=True)
    layers = [(model, layer) for model, layer in every if layer < sections[model][1]]
    return Stack(count, section, before or count.before, layers, sections), keys


def _count(section: Config, prefix: str, sizes: set[int]) -> tuple[list[str], int]:
    """The keys with the number of layers, and that number; 0, if there are none.

    sizes  numbers of layers that the stack has in some model: those that predict further tokens are among them
    """
    extra = next((n for key in _EXTRA if (n := number(section, key))), 0)
    parts = prefix.split(".")
    for words in (("decoder", "encoder"), ("",)):
        for word in words:
            for names in (_KEYS[word],) if not word or word in parts else ():
                for more in dict.fromkeys((0, extra)):
                    aliases = ("num_hidden_layers",) if word == "encoder" else ()
                    keys = [k for k in names if (n := number(section, k)) is not None and n + more in sizes]
                    keys += [k for k in aliases if keys and section.get(k) == section[keys[0]]]
                    if keys:
                        return keys, section[keys[0]]
    return [], 0


def _set(section: dict[str, Any], values: Mapping[str, Any], start: str) -> list[str]:
    """Set those values that differ, and say so."""
    said = []
    for key, value in values.items():
        before = section.get(key)
        if before != value:
            section[key] = value
            simple = not isinstance(value, list) and before is not None
            said.append(f"{start}{key} {before} -> {value}" if simple else f"{start}{key} follows the layers")
    return said


# --- lists -----------------------------------------------------------------------------------------------------------


def _follow(section: dict[str, Any], stack: Stack, count: LayerCount, start: str) -> list[str]:
    """Lists with an item per layer, and lists of layer numbers."""
    changed = []
    for key, value in list(section.items()):
        if key == _FROM_ONE and isinstance(value, Mapping):
            inner = {k: _renumbered(v, k, stack, 1, key) for k, v in value.items() if _is_numbered(k, v, 0)}
            changed += _set(section, {key: {**value, **inner}}, start)
        elif _is_keyed(key, value):
            changed += _set(section, {key: _rekeyed(value, key, stack)}, start)
        elif isinstance(value, str) and _NUMBERS_AS_TEXT.fullmatch(value) and _NUMBERED.search(key):
            numbers = _renumbered([int(i) for i in value.split(",")], "", stack, 0)
            changed += _set(section, {key: ",".join(map(str, numbers))}, start)
        elif key in KEYS or not isinstance(value, list):
            continue
        elif _is_numbered(key, value, stack.before):
            changed += _set(section, {key: _renumbered(value, key, stack, 0)}, start)
        elif _BY_LAYER.search(key) and len(value) in (stack.before, count.before):
            changed += _set(section, {key: _items(key, value, stack)}, start)
    return changed


def _is_numbered(key: str, value: Any, layers: int) -> bool:
    """Whether a value is a list of layer numbers."""
    if not isinstance(value, list) or not _NUMBERED.search(key) or not all(type(i) is int for i in value):
        return False
    return not layers or (len(set(value)) == len(value) and all(0 <= i < layers for i in value))


def _is_keyed(key: str, value: Any) -> bool:
    """Whether a value is a mapping from layer numbers: {"0": {...}, "3": {...}}."""
    if not isinstance(value, Mapping) or not value or "layer" not in key:
        return False
    return all(isinstance(k, str) and k.isdecimal() for k in value)


def _rekeyed(value: Mapping[str, Any], key: str, stack: Stack) -> dict[str, Any]:
    new = {}
    for i, (model, layer) in enumerate(stack.layers):
        theirs = stack.sections[model][0].get(key)
        items = theirs if isinstance(theirs, Mapping) and _is_keyed(key, theirs) else value
        if str(layer) in items:
            new[str(i)] = items[str(layer)]
    return new


def _renumbered(value: list[int], key: str, stack: Stack, first: int, part: str = "") -> list[int]:
    """Numbers of the output's layers whose sources are listed; `first` is the number of the first layer."""
    new = []
    for i, (model, layer) in enumerate(stack.layers):
        theirs: Any = stack.sections[model][0]
        theirs = theirs.get(part, {}).get(key) if part else theirs.get(key)
        if layer + first in (theirs if isinstance(theirs, list) else value):
            new.append(i + first)
    return new


def _items(key: str, value: list[Any], stack: Stack) -> list[Any]:
    """The item of each layer, of the model that it is from; one value there may be that of all layers."""
    new = []
    whole = len(value) > stack.before  # it has items for the layers that predict further tokens, too
    models = stack.count.models or (0,) * len(stack.count.layers)
    layers = list(zip(models, stack.count.layers, strict=True)) if whole else stack.layers
    for model, layer in layers:
        theirs = stack.sections[model][0].get(key)
        one = theirs is not None and not isinstance(theirs, list)
        items = theirs if isinstance(theirs, list) and len(theirs) > layer else value
        new.append(theirs if one else items[min(layer, len(items) - 1)])
    return new


# --- kinds -----------------------------------------------------------------------------------------------------------


def _kinds(section: Config, stack: Stack, fact: str) -> tuple[dict[str, Any], str]:
    """Changes of the section that say of which kind its layers are, or a warning that there are none."""
    said = kinds_of(stack.section, stack.before, fact, stack.part)
    if said is None:
        return {}, ""
    form = said[0]
    wanted: Kinds = []
    for model, layer in stack.layers:
        theirs, size = stack.sections[model]
        kinds = kinds_of(theirs, size, fact, stack.part) or said
        wanted.append(kinds[1][min(layer, len(kinds[1]) - 1)])
    changes = changes_for(section, form, wanted, stack.part)
    if changes is not None:
        return changes, ""
    now = kinds_of(section, len(wanted), fact, stack.part)
    wrong = [i for i in range(len(wanted)) if now is None or now[1][i] != wanted[i]]
    return {}, _cannot_say(form, wrong, wanted, None if now is None else now[1], stack)


def _cannot_say(form: Form, wrong: list[int], wanted: Kinds, now: Kinds | None, stack: Stack) -> str:
    keys = listed([f"`{key}`" for key in form.keys], 3)
    examples = [
        f"{i} (layer {stack.layers[i][1]} of its model) is {wanted[i]}{'' if now is None else f', not {now[i]}'}"
        for i in wrong
    ]
    return (
        f"{keys} of config.json cannot say which of these layers has which {form.fact}: layer "
        f"{listed(examples, _SHOWN)}. Software that loads the output builds these layers as the wrong kind, with "
        f"random numbers where stored tensors do not fit. Choose other layer ranges: {form.remedy}"
    )
