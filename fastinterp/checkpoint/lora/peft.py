"""Adapters of PEFT: adapter_config.json and adapter_model.safetensors.

Names are `base_model.model.MODULE.lora_A.weight` and the like. A name that the adapter itself had may stand behind
`lora_A`; it is no part of the module's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastinterp.checkpoint.adapters import ADAPTER_CONFIG
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.lora.parts import (
    Kind,
    LoraAdapter,
    LowRankModule,
    TokenRows,
    check_floats,
    check_pair,
    pair_error,
    put,
    refuse_left,
    refuse_twice,
)
from fastinterp.checkpoint.names import listing, quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.errors import CheckpointError

_PREFIX = "base_model.model."
_MOST = 2.0**63  # of a rank or an alpha
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_embedding_A|lora_embedding_B|lora_A|lora_B|lora_magnitude_vector)"
    r"(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?",
    re.DOTALL,
)
_ROWS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<name>[^.]+))?", re.DOTALL)
# What wraps a module whose own tensors are stored: layers that an adapter changes, and modules that are saved whole.
_WRAPPED = re.compile(
    r"(?P<module>.+?)(?:\.base_layer|\.token_adapter\.base_layer|\.modules_to_save(?:\.(?P<name>[^.]+))?)"
    r"\.(?P<leaf>[^.]+)",
    re.DOTALL,
)


def parse_peft(checkpoint: Checkpoint) -> LoraAdapter:
    """The adapter in a folder that peft has written. Raises: CheckpointError."""
    config = checkpoint.adapter.config if checkpoint.adapter else {}
    if not config:
        raise CheckpointError(
            f"an adapter of peft needs its {ADAPTER_CONFIG}, which says how it is scaled: put that beside it",
            file=checkpoint.name,
        )
    parts: dict[str, dict[str, Entry]] = {}
    replaced: dict[str, Entry] = {}
    rows: list[TokenRows] = []
    left: list[str] = []
    twice: list[tuple[Entry, Entry]] = []
    names: dict[str, str] = {}  # names that adapters have -> a tensor with it
    for stored, entry in checkpoint.tensors.items():
        name = stored.removeprefix(_PREFIX)
        if found := _PART.fullmatch(name):
            part = "bias" if found["leaf"] == "bias" else found["part"]
            if part == "bias" and found["part"] != "lora_B":
                left.append(stored)
                continue
            put(parts.setdefault(found["module"], {}), part, entry, twice)
        elif found := _ROWS.fullmatch(name):
            rows.append(TokenRows(found["module"], _tokens(checkpoint, config, found["module"], entry), entry))
        elif found := _WRAPPED.fullmatch(name):
            put(replaced, f"{found['module']}.{found['leaf']}", entry, twice)
        elif stored.startswith(_PREFIX):
            put(replaced, name, entry, twice)
        else:
            left.append(stored)
        if found and (own := found.groupdict().get("name")):
            names.setdefault(own, stored)
    refuse_left(checkpoint, left, "Expected the names of peft's LoRA")
    if len(names) > 1:
        raise CheckpointError(
            f"the file has {len(names)} adapters, {listing(names)}: save the one that is wanted alone, with peft by "
            '`model.save_pretrained("NEW", selected_adapters=["NAME"])`',
            file=checkpoint.name,
        )
    refuse_twice(checkpoint, twice)
    wraps = Counter(_without_base_layers(module) for module in parts)
    modules = tuple(_module(checkpoint, config, module, found, wraps) for module, found in parts.items())
    return LoraAdapter(checkpoint, "peft", modules, replaced, tuple(rows), config)


def _module(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    wrapped: str,
    parts: Mapping[str, Entry],
    wraps: Mapping[str, int],
) -> LowRankModule:
    """The product of the tensors of one module.

    wrapped  its name, with `base_layer` behind it where several of its parameters are changed
    parts    its tensors, by the names that they have in it
    wraps    how many products each module has
    """
    embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    first, second = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if first not in parts or second not in parts:
        have = next(iter(parts.values()))
        raise pair_error(checkpoint, wrapped, have, f"{wrapped}.{first if first not in parts else second}")
    a, b, magnitude = parts[first], parts[second], parts.get("lora_magnitude_vector")
    module = _without_base_layers(wrapped)
    parameters = _parameters(config, module, wrapped.count(".base_layer", len(module)), wraps[module])
    key = f"{module}.{parameters[0]}" if parameters else module
    rank = of_pattern(checkpoint, config, "rank_pattern", "r", key, 8)
    alpha = of_pattern(checkpoint, config, "alpha_pattern", "lora_alpha", key, 8)
    if not parameters:
        check_pair(checkpoint, module, a, b, int(rank), ADAPTER_CONFIG)
    check_floats(checkpoint, (a, b, magnitude, parts.get("bias")))
    if config.get("use_dora") and magnitude is None:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} says `use_dora`, but module {quote(module)} has no `lora_magnitude_vector`",
            file=checkpoint.name,
            tensor=a.name,
        )
    kind: Kind = "parameter" if parameters else "embedding" if embedding else "linear"
    if kind == "linear" and len(a.shape) > 2:
        kind = "convolution"
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LowRankModule(
        module, kind, a, b, int(rank), alpha, scale, magnitude, parts.get("bias"), parameters
    )  # fmt: skip


def _without_base_layers(module: str) -> str:
    """The name of a module of which several parameters are changed: peft wraps it as often."""
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _parameters(config: Mapping[str, Any], module: str, depth: int, wraps: int) -> tuple[str, ...]:
    """The parameters of the module that the configuration names, the one that is changed here first if that is known.

    depth  how many wrappers are around this one: the first parameter of a module has the innermost
    """
    targets = config.get("target_parameters")
    named = [target for target in targets if isinstance(target, str)] if isinstance(targets, list) else []
    found = []
    for target in named:
        owner, _, parameter = target.rpartition(".")
        if not owner or module == owner or module.endswith(f".{owner}"):
            found.append(parameter)
    found.sort(key=lambda parameter: (not parameter.startswith("gate_up"), parameter))  # as modules declare them
    if len(found) == wraps and depth < wraps:
        own = found[wraps - 1 - depth]
        found = [own, *(parameter for parameter in found if parameter != own)]
    return tuple(found)


def of_pattern(
    checkpoint: Checkpoint, config: Mapping[str, Any], pattern: str, key: str, module: str, default: float
) -> float:
    """A number of a LoraConfig for one module: that of the first pattern that matches the end of its name, or `key`."""
    value = config.get(key, default)
    patterns = config.get(pattern)
    for regex, number in patterns.items() if isinstance(patterns, dict) else ():
        try:
            if re.match(rf"(.*\.)?({regex})$", module):
                value = number
                break
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"`{pattern}` of {ADAPTER_CONFIG} has {quote(regex)}, which is no regular expression: {error}",
                file=checkpoint.name,
            ) from None
    found = math.nan
    if type(value) in (int, float) and abs(value) <= _MOST:
        found = float(value)
    if not math.isfinite(found) or (key == "r" and not (found >= 1 and found.is_integer())):
        wanted = "a whole number above 0" if key == "r" else "a finite number"
        raise CheckpointError(
            f"`{key}` of {ADAPTER_CONFIG} must be {wanted}, got {quote(value)} for module {quote(module)}",
            file=checkpoint.name,
        )
    return found


def _tokens(checkpoint: Checkpoint, config: Mapping[str, Any], module: str, rows: Entry) -> tuple[int, ...]:
    """The numbers of the tokens whose rows are stored."""
    given = config.get("trainable_token_indices")
    tokens = given
    if isinstance(given, dict):
        tokens = next((t for end, t in given.items() if module == end or module.endswith(f".{end}")), None)
    check_floats(checkpoint, (rows,))
    valid = isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)
    if not isinstance(tokens, list) or not valid or len(rows.shape) != 2 or len(tokens) != rows.shape[0]:
        raise CheckpointError(
            f"{quote(rows.name)} is {list(rows.shape)}, but `trainable_token_indices` of {ADAPTER_CONFIG} gives "
            f"{len(tokens) if isinstance(tokens, list) else 'no'} tokens for module {quote(module)}",
            file=checkpoint.name,
            tensor=rows.name,
        )
    if len(set(tokens)) < len(tokens):
        raise CheckpointError(
            f"`trainable_token_indices` of {ADAPTER_CONFIG} names a token of module {quote(module)} twice: which of "
            "its rows counts is not known",
            file=checkpoint.name,
            tensor=rows.name,
        )
    return tuple(tokens)
