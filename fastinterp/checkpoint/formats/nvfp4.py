"""NVFP4: two E2M1 codes in a byte, the low four bits first; an E4M3 scale for 16 of them; and one of all scales.

    number = E2M1 * scale * scale_2

Written as `P.weight` [rows, columns/2], `P.weight_scale` [rows, columns/16] and `P.weight_scale_2` by ModelOpt; as
`P.weight_packed`, `P.weight_scale` and `P.weight_global_scale` by compressed-tensors, where the last is divided by.
ComfyUI's have the high four bits first, and scales in tiles: they are told by its description of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator

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
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint

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
            if layer_of(checkpoint, part, layers, start):
                continue
            scales = [e for e in beside(checkpoint, start, ("weight_scale",)) if e.dtype.name == "F8_E4M3"]
            of_all = beside(checkpoint, start, (_OF_ALL[leaf],))
            if scales:
                yield _encoded(checkpoint, codes, only(checkpoint, codes, scales), of_all)
            elif of_all:
                raise missing(checkpoint, codes, [f"{start}weight_scale"])


def _encoded(checkpoint: Checkpoint, codes: Entry, scale: Entry, of_all: list[Entry]) -> EncodedTensor:
    start = start_of(codes.name)
    leaf = codes.name[len(start) :]
    if not of_all:
        raise missing(checkpoint, codes, [start + _OF_ALL[leaf]])
    *lead, nbytes = codes.shape
    if nbytes * 2 % _GROUP or scale.shape != (*lead, nbytes * 2 // _GROUP):
        raise misshapen(checkpoint, scale, codes, f"{[*lead, nbytes * 2 // _GROUP]}, one for 8 bytes of a row")
    second = of_all[0]
    check_dtype(checkpoint, second, codes, ("F32",))
    matrices = 1
    if second.numel != 1:
        matrices = codes.shape[0]
        if len(codes.shape) < 3 or second.numel != matrices or second.shape[0] != matrices:
            raise misshapen(checkpoint, second, codes, "[] or [1], one for all")
    return tensor_of(
        checkpoint, codes, [scale, second], "nvfp4", (leaf == "weight_packed", matrices),
        name=f"{start}weight", shape=(*lead, nbytes * 2), format="NVFP4",
    )  # fmt: skip
