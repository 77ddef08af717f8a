"""Outputs with other layers than their inputs: their config.json, and warnings about layers that it cannot describe."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from fastinterp.checkpoint.header import MAX_HEADER
from fastinterp.checkpoint.quantisation_config import HF_QUANT_CONFIG, QUANTISATION
from fastinterp.checkpoint.regular_file import read_regular
from fastinterp.checkpoint.sidecar_files import CONFIG, read_config
from fastinterp.checkpoint.strict_json import parse_object
from fastinterp.errors import CheckpointError
from fastinterp.messages import listed
from fastinterp.plan.models import Model
from fastinterp.recipe.layer_config import config_of_layers, facts_of
from fastinterp.recipe.layer_modules import with_layers
from fastinterp.recipe.targets import LayerCount

_SHOWN = 5  # names and layers in a message before the rest is only counted

Tensors = dict[str, tuple[int, ...]]  # of one layer: the name behind its number -> shape


def counts_of(counts: Sequence[LayerCount], origin: Model, models: Sequence[Model]) -> tuple[LayerCount, ...]:
    """The stacks, with the layers of the origin among their sizes, if it is none of the models."""
    if any(model.root == origin.root for model in models):
        return tuple(counts)
    return tuple(replace(c, sizes=(*c.sizes, len(_layers(origin.tensors, c.prefix)))) for c in counts)


def layered_config(content: bytes | Path, counts: Sequence[LayerCount], models: Sequence[Model]) -> bytes | Path:
    """config.json with the layers that the output has.

    Raises: CheckpointError, if it is damaged.
    """
    file = CONFIG if isinstance(content, bytes) else str(content)
    raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
    config = parse_object(raw.lstrip(), "the model configuration", file)
    made = config_of_layers(config, counts, _configs(models))
    new = _with_quantised_layers(made.config, counts)
    return _written(new) if new != config else content


def layered_quantisation(content: bytes | Path, counts: Sequence[LayerCount]) -> bytes | Path:
    """hf_quant_config.json with the names that layers have in the output.

    Raises: CheckpointError, if it is damaged.
    """
    file = HF_QUANT_CONFIG if isinstance(content, bytes) else str(content)
    raw = content if isinstance(content, bytes) else read_regular(file, MAX_HEADER)
    config = parse_object(raw.lstrip(), "the description of quantised weights", file)
    new = _with_quantised_layers(config, counts)
    return _written(new) if new != config else content


def _with_quantised_layers(config: Mapping[str, Any], counts: Sequence[LayerCount]) -> dict[str, Any]:
    """A configuration in which what is said of quantised weights has the names of the output's layers."""
    return {
        key: with_layers(value, counts)
        if key in QUANTISATION
        else _with_quantised_layers(value, counts)
        if key.endswith("_config") and isinstance(value, Mapping)
        else value
        for key, value in config.items()
    }


def _written(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def about_layers(counts: Sequence[LayerCount], origin: Model, models: Sequence[Model]) -> tuple[list[str], list[str]]:
    """(warnings about what config.json cannot say of the output's layers, remarks on what changes there)."""
    config = read_config(origin.root)
    if not config:
        return [], []
    configs = _configs(models)
    made = config_of_layers(config, counts, configs)
    warnings = list(made.warnings)
    for count in counts:
        warnings += _by_place(count, models, [config if c is None else c for c in configs])
    return warnings, [f"config.json changed for the layers: {listed(made.changes, 8)}"] if made.changes else []


def _configs(models: Sequence[Model]) -> list[dict[str, Any] | None]:
    """config.json of each; None, if it has none, or a damaged one, of which others warn."""
    configs: list[dict[str, Any] | None] = []
    for model in models:
        try:
            configs.append(read_config(model.root))
        except CheckpointError:
            configs.append(None)
    return configs


def _by_place(count: LayerCount, models: Sequence[Model], configs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A warning about layers that lack tensors, or have some, other than the layers that were at their place.

    Layers of which the configuration says the same have the same tensors. Tensors for which that is not so are looked
    at here: the software that loads the model knows by the place of a layer whether it has them. Those that only the
    first layer of a kind has may also be used by all of its kind, and stored once.
    """
    at = count.models or (0,) * len(count.layers)
    tensors = {m: _layers(models[m].tensors, count.prefix) for m in dict.fromkeys(at)}
    facts = {m: facts_of(configs[m], count.prefix, len(found)) for m, found in tensors.items()}
    loose = {name for m, found in tensors.items() for name in _loose(found, facts[m])}
    if not loose:
        return
    lead, lead_facts, first = tensors[at[0]], facts[at[0]], set[object]()
    groups = {m: _groups(found, facts[m], loose) for m, found in tensors.items()}
    wrong = []
    for i, (m, layer) in enumerate(zip(at, count.layers, strict=True)):
        fact, have = facts[m][layer], loose & tensors[m][layer].keys()
        alike, there = groups[m][fact], groups[at[0]][lead_facts[i]] if i < len(lead) else []
        if _is_one(alike) and (_is_one(there) or _is_once(there)):
            continue  # the configuration tells these apart
        expected: Set[str] | None
        if i < len(lead):
            expected = loose & lead[i].keys()
        else:  # beyond what is known: as the others, if only the first one is special
            others = [loose & t.keys() for t in lead[1:]]
            expected = others[-1] if others and _is_one(others) else None
        if have != expected and not (_is_once(alike) and (fact in first or have == alike[0])):
            wrong.append((i, layer, _difference(have, expected)))
        first.add(fact)
    if wrong:
        layers = [f"{i} (layer {layer} of its model{f': {how}' if how else ''})" for i, layer, how in wrong]
        yield (
            f"layers of {count.prefix} differ in ways that config.json does not name, so software tells them apart by "
            f"their place. In the output these stand where layers of another kind were: {listed(layers, _SHOWN)}. "
            "Tensors that fit none are left out when it is loaded, and random numbers are put where some lack. Choose "
            "other layer ranges"
        )


def _groups(layers: Sequence[Tensors], facts: Sequence[object], loose: Set[str]) -> dict[object, list[Set[str]]]:
    """The loose tensors of all layers of which the configuration says the same, in their order."""
    groups: dict[object, list[Set[str]]] = {}
    for layer, fact in zip(layers, facts, strict=True):
        groups.setdefault(fact, []).append(loose & layer.keys())
    return groups


def _is_one(alike: Sequence[Set[str]]) -> bool:
    return all(one == alike[0] for one in alike)


def _is_once(alike: Sequence[Set[str]]) -> bool:
    """Whether the first layer alone has something, which all may use."""
    return bool(alike) and all(later < alike[0] for later in alike[1:])


def _loose(layers: Sequence[Tensors], facts: Sequence[object]) -> set[str]:
    """Tensors that some layers have and others lack, and no key of the configuration says which."""
    kinds: dict[object, list[Tensors]] = {}
    for layer, fact in zip(layers, facts, strict=True):
        kinds.setdefault(fact, []).append(layer)
    return {
        name
        for alike in kinds.values()
        for name in {name for one in alike for name in one}
        if len({one.get(name) for one in alike}) > 1
    }


def _layers(names: Any, prefix: str) -> list[Tensors]:
    """The tensors of each layer of a stack."""
    layers: dict[int, Tensors] = {}
    for name, tensor in names.items():
        if name.startswith(f"{prefix}."):
            number, _, rest = name[len(prefix) + 1 :].partition(".")
            if number.isdecimal():
                layers.setdefault(int(number), {})[rest] = tensor.shape
    return [layers.get(i, {}) for i in range(1 + max(layers, default=-1))]


def _difference(have: Set[str], expected: Set[str] | None) -> str:
    more, fewer = (sorted(have - expected), sorted(expected - have)) if expected is not None else ([], [])
    parts = [f"it has {listed(more, 2)}"] if more else []
    parts += [f"it lacks {listed(fewer, 2)}"] if fewer else []
    return ", ".join(parts)
