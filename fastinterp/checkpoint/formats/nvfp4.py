"""NVFP4: two E2M1 codes in a byte, an E4M3 scale for 16 of them, and one of all these scales.

    number = E2M1 * (scale * scale_2)          with compressed-tensors: E2M1 * (scale / global_scale)

ModelOpt stores `P.weight` [rows, columns/2], `P.weight_scale` [rows, columns/16] and `P.weight_scale_2`;
compressed-tensors `P.weight_packed`, `P.weight_scale` and `P.weight_global_scale`: both the low half of a byte first.
ComfyUI has the names of ModelOpt, but the high half first, and scales in tiles, padded to [128 i, 4 k]: it is known by
its description of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import structs

from fastinterp.checkpoint.formats.encoded import (
    EncodedTensor,
    beside,
    candidates,
    check_dtype,
    misshapen,
    missing,
    start_of,
)
from fastinterp.checkpoint.formats.names import only, tensor_of
from fastinterp.checkpoint.formats.said import layer_of, layers_of
from fastinterp.checkpoint.formats.scales import TILES, padded_to_tiles
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.ops.dtypes import F8_E4M3

_GROUP = 16  # numbers that have one scale
_UNREAD = ("pre_quant_scale", "weight_zero_point", "weight_g_idx")
_OF_ALL = {"weight": "weight_scale_2", "weight_packed": "weight_global_scale"}


def read(checkpoint: Checkpoint) -> Iterator[EncodedTensor]:
    """The NVFP4 tensors of a checkpoint."""
    for part, entries in candidates(checkpoint, ("U8",)):
        layers = layers_of(part)
        for codes in entries:
            start = start_of(codes.name)
            leaf = codes.name[len(start) :]
            if leaf not in _OF_ALL or len(codes.shape) < 2 or beside(checkpoint, start, _UNREAD):
                continue
            layer = layer_of(checkpoint, part, layers, start)
            if layer and (layer.get("format") != "nvfp4" or len(codes.shape) > 2):
                continue
            scales = [e for e in beside(checkpoint, start, ("weight_scale",)) if e.dtype.name in _scale_dtypes(layer)]
            of_all = beside(checkpoint, start, (_OF_ALL[leaf],))
            if scales:
                yield _encoded(checkpoint, codes, only(checkpoint, codes, scales), of_all, bool(layer))
            elif of_all or layer:
                raise missing(checkpoint, codes, [f"{start}weight_scale"])


def _scale_dtypes(layer: Mapping[str, Any]) -> tuple[str, ...]:
    return ("F8_E4M3", "U8") if layer else ("F8_E4M3",)  # ComfyUI reads bytes as E4M3


def _encoded(checkpoint: Checkpoint, codes: Entry, scale: Entry, of_all: list[Entry], tiled: bool) -> EncodedTensor:
    """tiled: as ComfyUI stores it"""
    start = start_of(codes.name)
    leaf = codes.name[len(start) :]
    if not of_all:
        raise missing(checkpoint, codes, [start + _OF_ALL[leaf]])
    *lead, nbytes = codes.shape
    shape = [*lead, nbytes * 2 // _GROUP]
    if tiled:
        shape = padded_to_tiles(shape)
    if nbytes * 2 % _GROUP or scale.shape != tuple(shape):
        raise misshapen(checkpoint, scale, codes, f"{shape}, one for 8 bytes of a row{TILES if tiled else ''}")
    second = of_all[0]
    check_dtype(checkpoint, second, codes, ("F32",))
    matrices = 1
    if second.numel != 1:
        matrices = codes.shape[0]
        if len(codes.shape) < 3 or second.numel != matrices or second.shape[0] != matrices:
            raise misshapen(checkpoint, second, codes, "[] or [1], one for all")
    return tensor_of(
        checkpoint, codes, [structs.replace(scale, dtype=F8_E4M3), second], "nvfp4",
        (leaf == "weight_packed", matrices, tiled, tiled), name=f"{start}weight", shape=(*lead, nbytes * 2),
        format="NVFP4",
    )  # fmt: skip
