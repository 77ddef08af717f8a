"""fp8 codes with scales: of a tensor, of rows, of blocks; mxfp8, whose scales are exponents of 32 columns each.

    number = code * scale

`X_scale_inv`, the name of DeepSeek, Qwen, GLM and transformers, is multiplied, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from fastinterp.checkpoint.formats.encoded import (
    EncodedTensor,
    beside,
    candidates,
    check_dtype,
    misshapen,
    missing,
    start_of,
)
from fastinterp.checkpoint.formats.names import is_unread, numbered, only, scales_of, tensor_of
from fastinterp.checkpoint.formats.said import Said, layer_of, layers_of, said_of
from fastinterp.checkpoint.formats.scales import KINDS, TILES, Grid, expected, grid, padded_to_tiles
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint

DECODERS = {"F8_E4M3": "scaled_f8_e4m3", "F8_E5M2": "scaled_f8_e5m2"}
_GROUP = 32  # columns that have one exponent in MXFP8
_MARKER = "scaled_fp8"  # a tensor of ComfyUI's older files, beside `scale_weight` of each layer
_DECLARED = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors")  # whose fp8 tensors are codes


def read(checkpoint: Checkpoint) -> Iterator[EncodedTensor]:
    """The fp8 tensors of a checkpoint that have scales; the others are numbers."""
    for part, entries in candidates(checkpoint, DECODERS):
        said, layers = said_of(part), layers_of(part)
        markers = [e for e in entries if e.name.endswith(_MARKER)]
        markers += beside(checkpoint, part.prefix, (_MARKER,)) if not markers else []  # of another dtype
        found: list[EncodedTensor] = []
        bare: list[tuple[Entry, Mapping[str, Any]]] = []
        comfy = bool(markers or layers)
        for codes in entries:
            start = start_of(codes.name)
            layer = layer_of(checkpoint, part, layers, start) if codes.name == f"{start}weight" else {}
            comfy |= bool(layer)
            if codes in markers or is_unread(checkpoint, codes):
                continue
            # A scale is stored with more precision than codes: a model cast to fp8 has no other numbers than those.
            if scales := [e for e in scales_of(checkpoint, codes) if e.dtype.name not in DECODERS]:
                found += _encoded(checkpoint, codes, scales, said, layer)
            elif layer or (len(codes.shape) > 1 and codes.name.endswith(("weight", "_proj"))):
                bare.append((codes, layer))
        _refuse_bare(checkpoint, bare, found, said, comfy, bool(markers))
        for i, one in enumerate(found):
            yield one if i else replace(one, left_out=(*one.left_out, *markers))


def _encoded(
    checkpoint: Checkpoint, codes: Entry, scales: Sequence[Entry], said: Said, layer: Mapping[str, Any]
) -> Iterator[EncodedTensor]:
    """The tensor of these codes; none, where ComfyUI says that they are of another format."""
    form = layer.get("format", "")
    if form not in ("", "float8_e4m3fn", "float8_e5m2", "mxfp8"):
        return
    scale = only(checkpoint, codes, scales)
    check_dtype(checkpoint, scale, codes, ("F8_E8M0", "U8") if form == "mxfp8" else KINDS)
    decoder = DECODERS[codes.dtype.name]
    if form == "mxfp8":
        if len(codes.shape) != 2 or scale.shape != tuple(padded_to_tiles([codes.shape[0], codes.shape[1] // _GROUP])):
            shape = padded_to_tiles([codes.shape[0], -(-codes.shape[-1] // _GROUP)])
            raise misshapen(checkpoint, scale, codes, f"{shape}, one for {_GROUP} columns{TILES}")
        parameters = (*Grid(1, _GROUP, codes.shape[0]).parameters(scale.dtype), 1)
        yield tensor_of(checkpoint, codes, [scale], decoder, parameters, format="MXFP8")
        return
    places = grid(codes.shape, scale.shape, said.blocks, said.strict)
    if places is None:
        raise misshapen(checkpoint, scale, codes, expected(codes.shape, said.blocks, said.strict))
    exponents = scale.dtype.name in ("F8_E8M0", "U8")
    what = "MXFP8" if exponents and places.block_columns == _GROUP and places.block_rows == 1 else ""
    tensor = tensor_of(
        checkpoint, codes, [scale], decoder, places.parameters(scale.dtype),
        format=what or f"fp8 with scales of {places.of(codes.shape)}", assumed=places.assumed and not what,
    )  # fmt: skip
    yield replace(tensor, power_of_two=said.power_of_two)


def _refuse_bare(
    checkpoint: Checkpoint,
    bare: Sequence[tuple[Entry, Mapping[str, Any]]],
    found: Sequence[EncodedTensor],
    said: Said,
    comfy: bool,
    marked: bool,
) -> None:
    """Raises: CheckpointError, if codes have no scale.

    Without a scale they are numbers, if nothing in the component has scales, and no configuration says that there are
    some. ComfyUI takes a layer without a scale for numbers everywhere: there only those are refused that are described,
    or whose neighbours have one.
    """
    patterns = {numbered(one.name) for one in found}
    for codes, layer in bare:
        if comfy and not layer:
            wrong = numbered(codes.name) in patterns or (marked and not found)
        else:
            wrong = bool(layer or found) or said.method in _DECLARED
        if wrong:
            raise missing(checkpoint, codes, [_missing_name(codes, found, said, marked)])


def _missing_name(codes: Entry, found: Sequence[EncodedTensor], said: Said, marked: bool) -> str:
    """The name that the scale of these codes would have, by what others have."""
    start = start_of(codes.name)
    end = "_scale_inv" if said.method == "fp8" else "_scale"
    if found:
        one = found[0]
        name = one.companions[0].name
        if not name.startswith(one.name):
            return start + name[len(start_of(name)) :]
        end = name[len(one.name) :]
    return f"{start}scale_weight" if marked and not found else codes.name + end
