"""Encoded tensors: which tensors of a checkpoint are codes, and what they are when decoded. One reader per format.

A format is a reader here, which looks at headers and small descriptions only; a decoder in csrc/decoders/, with its row
in table.cpp there; and that decoder's definition in reference/decode.py. Nothing else knows of it: plans see float32
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable

from fastinterp.checkpoint.formats import fp8, int8, mxfp4, nvfp4
from fastinterp.checkpoint.formats.encoded import EncodedTensor, Reader
from fastinterp.checkpoint.gguf_types import BY_NAME
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import F16

__all__ = ["READERS", "EncodedTensor", "Reader", "encoded_tensors"]


def _gguf(checkpoint: Checkpoint) -> Iterable[EncodedTensor]:
    """Tensors of GGUF files in blocks, with their scales in between. They keep their type where it is written."""
    if checkpoint.gguf is not None:
        for name, entry in checkpoint.tensors.items():
            if entry.dtype.block is not None:
                decoder = BY_NAME[entry.dtype.name].decoder
                yield EncodedTensor(name, entry.shape, entry, (), decoder, kept_dtype=F16)


# By the name of the format. A new format adds its row.
READERS: dict[str, Reader] = {
    "fp8": fp8.read,
    "int8": int8.read,
    "mxfp4": mxfp4.read,
    "nvfp4": nvfp4.read,
    "gguf": _gguf,
}


def encoded_tensors(checkpoint: Checkpoint) -> list[EncodedTensor]:
    """The encoded tensors of a checkpoint, of all formats.

    Raises: CheckpointError, of a reader, or if two readers take the same stored tensor or make the same one.
    """
    every: list[EncodedTensor] = []
    taken: dict[str, str] = {}  # stored or made tensor -> format
    for format_name, reader in READERS.items():
        for encoded in reader(checkpoint):
            stored = [entry.name for entry in encoded.stored]
            for name in {encoded.name, *stored}:
                other = taken.get(name) or ("not encoded" if name not in stored and name in checkpoint.tensors else "")
                if other:
                    raise CheckpointError(
                        f"tensor {quote(name)} is part of two tensors ({other}, {format_name}): which format it has is "
                        "not known",
                        file=checkpoint.name,
                        tensor=name,
                    )
                taken[name] = format_name
            every.append(encoded)
    return every
