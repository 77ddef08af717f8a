"""MXFP4: two E2M1 codes in a byte, the low four bits first, and an exponent for 32 of them.

    number = E2M1 * 2^(s - 127)

Written as `X_blocks` [..., groups, 16] and `X_scales` [..., groups] by gpt-oss, whose numbers X have the last two
dimensions the other way round, as transformers loads them; as `P.weight_packed` [rows, columns/2] and `P.weight_scale`
[rows, columns/32] by compressed-tensors; and under the names of fp8 codes, as bytes, in DeepSeek's checkpoints.
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
from fastinterp.checkpoint.formats.names import is_unread, scales_of, tensor_of
from fastinterp.checkpoint.formats.said import said_of
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint

GROUP = 32  # numbers that have one exponent
_EXPONENTS = ("U8", "F8_E8M0")
_BLOCKS, _SCALES = "_blocks", "_scales"


def read(checkpoint: Checkpoint) -> Iterator[EncodedTensor]:
    """The MXFP4 tensors of a checkpoint."""
    for part, entries in candidates(checkpoint, ("U8", "I8")):
        transposed = any(
            e.name.endswith(_BLOCKS) and e.name.removesuffix(_BLOCKS) + _SCALES in checkpoint.tensors for e in entries
        )
        transposed = transposed or said_of(part).method == "mxfp4"
        for codes in entries:
            if codes.name.endswith(_BLOCKS) and codes.dtype.name == "U8":
                if transposed and len(codes.shape) > 2 and codes.shape[-1] == GROUP // 2:
                    yield _transposed(checkpoint, codes)
            elif len(codes.shape) > 1 and not is_unread(checkpoint, codes):
                yield from _packed(checkpoint, codes)


def _transposed(checkpoint: Checkpoint, codes: Entry) -> EncodedTensor:
    name = codes.name.removesuffix(_BLOCKS)
    scale = checkpoint.tensors.get(name + _SCALES)
    if scale is None:
        raise missing(checkpoint, codes, [name + _SCALES])
    check_dtype(checkpoint, scale, codes, _EXPONENTS)
    *lead, rows, groups, _ = codes.shape
    if scale.shape != (*lead, rows, groups):
        raise misshapen(checkpoint, scale, codes, f"{[*lead, rows, groups]}, one for each 16 bytes")
    shape = (*lead, groups * GROUP, rows)
    return tensor_of(
        checkpoint, codes, [scale], "mxfp4_transposed", shape[-2:-1], name=name, shape=shape, format="MXFP4"
    )


def _packed(checkpoint: Checkpoint, codes: Entry) -> Iterator[EncodedTensor]:
    """Codes of whole rows."""
    start = start_of(codes.name)
    name, scales = codes.name, scales_of(checkpoint, codes)
    if codes.name == f"{start}weight_packed" and codes.dtype.name == "U8":
        name, scales = f"{start}weight", beside(checkpoint, start, ("weight_scale",))
    elif codes.dtype.name != "I8":
        return
    exponents = [e for e in scales if e.dtype.name in _EXPONENTS]
    if len(exponents) != 1 or exponents != scales:
        return
    scale = exponents[0]
    *lead, nbytes = codes.shape
    if scale.shape != (*lead, nbytes * 2 // GROUP) or nbytes * 2 % GROUP:
        raise misshapen(checkpoint, scale, codes, f"{[*lead, nbytes * 2 // GROUP]}, one for 16 bytes of a row")
    yield tensor_of(checkpoint, codes, [scale], "mxfp4", name=name, shape=(*lead, nbytes * 2), format="MXFP4")
