"""int8 codes with scales: of a tensor, of rows, of groups of columns, of blocks; symmetric alone.

    number = code * scale

Written by compressed-tensors, and by ComfyUI where its description says `int8_tensorwise`, without rotation.
"""

from __future__ import annotations

from collections.abc import Iterator

from fastinterp.checkpoint.formats.encoded import EncodedTensor, candidates, misshapen, missing, start_of
from fastinterp.checkpoint.formats.names import is_unread, only, scales_of, tensor_of
from fastinterp.checkpoint.formats.said import layer_of, layers_of, said_of
from fastinterp.checkpoint.formats.scales import expected, grid
from fastinterp.checkpoint.open import Checkpoint

_SCALES = ("F32", "F16", "BF16")
_COMFY = "int8_tensorwise"


def read(checkpoint: Checkpoint) -> Iterator[EncodedTensor]:
    """The int8 tensors of a checkpoint that have scales; the others are integers, or of formats that are not read."""
    for part, entries in candidates(checkpoint, ("I8",)):
        said, layers = said_of(part), layers_of(part)
        found = []
        bare = []
        for codes in entries:
            start = start_of(codes.name)
            layer = layer_of(checkpoint, part, layers, start) if codes.name == f"{start}weight" else {}
            if len(codes.shape) < 2 or is_unread(checkpoint, codes):
                continue
            if layer and (layer.get("format") != _COMFY or rotates(layer)):
                continue
            scales = scales_of(checkpoint, codes)
            if not scales and (layer or (said.method == "compressed-tensors" and codes.name.endswith("weight"))):
                bare.append(codes)
            elif scales and all(e.dtype.name in _SCALES for e in scales):
                found.append((codes, scales))
        for codes in bare:
            raise missing(checkpoint, codes, [f"{codes.name}_scale"])
        for codes, scales in found:
            scale = only(checkpoint, codes, scales)
            places = grid(codes.shape, scale.shape, said.blocks, said.strict)
            if places is None:
                raise misshapen(checkpoint, scale, codes, expected(codes.shape, said.blocks, said.strict))
            yield tensor_of(
                checkpoint, codes, [scale], "scaled_i8", places.parameters(scale.dtype),
                format=f"int8 with scales of {places.of(codes.shape)}", assumed=places.assumed,
            )  # fmt: skip


def rotates(layer: object) -> bool:
    """Whether ComfyUI's description of a layer says that its rows were rotated before they were quantised."""
    if not isinstance(layer, dict):
        return False
    nested = layer.get("params")
    return bool(layer.get("convrot") or (isinstance(nested, dict) and nested.get("convrot")))
