"""What is said of quantised weights beside them: in config.json, in hf_quant_config.json, and for single layers as
ComfyUI writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from fastinterp.checkpoint.formats.encoded import fault, small_bytes, start_of
from fastinterp.checkpoint.formats.names import COMFY
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint, Component
from fastinterp.checkpoint.quantisation_config import HF_QUANT_CONFIG, declared_method
from fastinterp.checkpoint.sidecar_files import CONFIG, json_or_empty
from fastinterp.checkpoint.strict_json import parse_json
from fastinterp.errors import CheckpointError

METADATA = "_quantization_metadata"  # of headers, as ComfyUI writes it


class Said(msgspec.Struct, frozen=True):
    """What the configuration of a component says.

    method  `fp8`, `compressed-tensors`, `modelopt`; empty: nothing
    blocks  rows and columns of a block, of each kind of blocks that it names
    strict  whether all codes have scales of these blocks
    power_of_two  whether scales are powers of two: `scale_fmt` of DeepSeek and transformers is `ue8m0`
    """

    method: str = ""
    blocks: tuple[tuple[int, int], ...] = ()
    strict: bool = False
    power_of_two: bool = False


def said_of(part: Component) -> Said:
    """What config.json and hf_quant_config.json of a component say. Damaged files say nothing."""
    root = part.checkpoint.root
    method = declared_method(root, part.checkpoint.metadata)
    if not method:
        return Said()
    tables = list(_tables(json_or_empty(root / CONFIG)))
    sizes = [size for t in tables if (size := _pair(t.get("weight_block_size"))) is not None]
    blocks = [*sizes, *(block for t in tables for block in _of_groups(t))]
    other = json_or_empty(root / HF_QUANT_CONFIG).get("quantization")
    if isinstance(other, dict):
        blocks += _one_row(other.get("group_size"))
    exponents = any(t.get("scale_fmt") == "ue8m0" for t in tables)
    return Said(method, tuple(dict.fromkeys(blocks)), method == "fp8" and bool(sizes), exponents)


def _tables(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for one in (config, config.get("text_config")):
        if isinstance(one, dict):
            yield from (t for k in ("quantization_config", "compression_config") if isinstance(t := one.get(k), dict))


def _of_groups(table: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """The blocks of the groups of compressed-tensors' configuration, whose scales are of blocks or of parts of rows."""
    groups = table.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if isinstance(weights, dict):
            structure = weights.get("block_structure")
            if isinstance(structure, str):  # as older versions wrote it: `128x128`
                structure = [int(n) for n in structure.split("x") if re.fullmatch("[0-9]{1,9}", n)]
            if (block := _pair(structure)) is not None:
                yield block
            yield from _one_row(weights.get("group_size"))


def _pair(value: Any) -> tuple[int, int] | None:
    good = isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    return (value[0], value[1]) if good else None


def _one_row(size: Any) -> list[tuple[int, int]]:
    return [(1, size)] if type(size) is int and size > 0 else []


def layers_of(part: Component) -> Mapping[str, Any]:
    """What ComfyUI's metadata in the header says of layers, by the names of modules in the component."""
    text = part.checkpoint.metadata.get(METADATA, "")
    try:
        layers = parse_json(text.encode(errors="replace"), "the metadata", "")["layers"] if text else {}
    except (CheckpointError, KeyError, TypeError):
        return {}
    return layers if isinstance(layers, dict) else {}


def layer_of(checkpoint: Checkpoint, part: Component, layers: Mapping[str, Any], start: str) -> Mapping[str, Any]:
    """What ComfyUI says of the layer whose tensors begin with `start`: `{"format": "nvfp4"}`; empty: nothing.

    Raises: CheckpointError, if its description is damaged.
    """
    entry = checkpoint.tensors.get(start + COMFY)
    if entry is None:
        found = layers.get(start[len(part.prefix) :].rstrip("."))
        return found if isinstance(found, dict) else {}
    raw = small_bytes(checkpoint, entry)
    try:
        found = parse_json(raw or b"", entry.name, checkpoint.name)
    except CheckpointError:
        found = None
    if not isinstance(found, dict):
        raise fault(checkpoint, entry, f"{quote(entry.name)} must be a JSON object, as ComfyUI writes it")
    return found


def described_format(checkpoint: Checkpoint, codes: str) -> str:
    """What ComfyUI calls the format of codes, for messages; empty: it has no description of them."""
    for part in checkpoint.parts:
        if codes.startswith(part.prefix):
            layer = layer_of(checkpoint, part, layers_of(part), start_of(codes))
            return f"ComfyUI's {layer['format']}" if isinstance(layer.get("format"), str) else ""
    return ""
