"""Encoded tensors: which tensors of a checkpoint are codes, and what they are when decoded. One reader per format.

A format is a reader here, which looks at headers only; a decoder in csrc/decoders/, with its row in table.cpp there;
and that decoder's definition in reference/decode.py. Nothing else knows of it: plans see float32 tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, F16, DType


class EncodedTensor(msgspec.Struct, frozen=True):
    """A tensor of float32 numbers that is stored as codes.

    name        of the tensor, by which other models and the output have it
    shape       of the numbers
    codes       where the codes lie; decoders read a row after the other, as the numbers follow each other
    companions  where scales and the like lie, in the order in which the decoder takes them. They are no tensors of the
                model any more
    decoder     its name in csrc/decoders/ and reference/decode.py
    parameters  numbers that it takes: block sizes, say
    kept_dtype  the dtype of an output tensor that keeps this one's
    """

    name: str
    shape: tuple[int, ...]
    codes: Entry
    companions: tuple[Entry, ...]
    decoder: str
    parameters: tuple[float, ...] = ()
    kept_dtype: DType = BF16


# Yields the tensors of one format; nothing, if the checkpoint has none.
# Raises: CheckpointError, naming the tensor, if a companion is missing, misplaced or of the wrong dtype or shape.
Reader = Callable[[Checkpoint], Iterable[EncodedTensor]]


def _gguf(checkpoint: Checkpoint) -> Iterable[EncodedTensor]:
    """Tensors of GGUF files in blocks, with their scales in between. They keep their type where it is written."""
    if checkpoint.gguf is not None:
        for name, entry in checkpoint.tensors.items():
            if entry.dtype.block is not None:
                yield EncodedTensor(name, entry.shape, entry, (), entry.dtype.name.lower(), kept_dtype=F16)


# By the name of the format. A new format adds its row.
READERS: dict[str, Reader] = {"gguf": _gguf}


def encoded_tensors(checkpoint: Checkpoint) -> list[EncodedTensor]:
    """The encoded tensors of a checkpoint, of all formats.

    Raises: CheckpointError, of a reader, or if two readers take the same stored tensor or make the same one.
    """
    every: list[EncodedTensor] = []
    taken: dict[str, str] = {}  # stored or made tensor -> format
    for format_name, reader in READERS.items():
        for encoded in reader(checkpoint):
            stored = [entry.name for entry in (encoded.codes, *encoded.companions)]
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
