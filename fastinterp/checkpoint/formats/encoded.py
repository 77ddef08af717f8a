"""Encoded tensors as readers yield them, and what readers share: names of companions, and errors about them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import msgspec

from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint, Component
from fastinterp.checkpoint.remote import opened, read_from
from fastinterp.errors import CheckpointError
from fastinterp.ops.dtypes import BF16, DType

_SMALL = 1 << 16  # bytes of a companion that is read when a checkpoint is opened: a description, zero points


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
    activations  scales of what is multiplied with it: they mean nothing where it is numbers, and are no tensors of the
                model, either
    left_out    descriptions and markers of codes: the same
    format      for people: `fp8 with scales of blocks of 128 x 128`
    assumed     whether the size of its blocks is not said anywhere, and follows from the shapes alone
    power_of_two  whether all scales are powers of two, whatever their dtype
    """

    name: str
    shape: tuple[int, ...]
    codes: Entry
    companions: tuple[Entry, ...]
    decoder: str
    parameters: tuple[float, ...] = ()
    kept_dtype: DType = BF16
    activations: tuple[Entry, ...] = ()
    left_out: tuple[Entry, ...] = ()
    format: str = ""
    assumed: bool = False
    power_of_two: bool = False

    @property
    def stored(self) -> tuple[Entry, ...]:
        """Every tensor that belongs to it."""
        return (self.codes, *self.beside)

    @property
    def beside(self) -> tuple[Entry, ...]:
        """The same without the codes."""
        return (*self.companions, *self.activations, *self.left_out)


# Yields the tensors of one format; nothing, if the checkpoint has none.
# Raises: CheckpointError, naming the tensor, if a companion is missing, misplaced or of the wrong dtype or shape.
Reader = Callable[[Checkpoint], Iterable[EncodedTensor]]


def candidates(checkpoint: Checkpoint, dtypes: Collection[str]) -> Iterator[tuple[Component, list[Entry]]]:
    """The tensors of these dtypes, by component; components without any are left out."""
    for part in checkpoint.parts:
        names = (part.prefix + name for name, e in part.checkpoint.tensors.items() if e.dtype.name in dtypes)
        entries = [checkpoint.tensors[name] for name in names]
        if entries:
            yield part, entries


def start_of(name: str) -> str:
    """The part of a tensor's name that its companions have, too: `layers.0.up_proj.` of `layers.0.up_proj.weight`."""
    return name[: max(name.rfind("."), name.rfind("/")) + 1]


def beside(checkpoint: Checkpoint, start: str, ends: Iterable[str]) -> list[Entry]:
    """The tensors `START + END` that are there, in the order of `ends`."""
    return [e for end in ends if (e := checkpoint.tensors.get(start + end)) is not None]


def described(entry: Entry) -> str:
    """`P.weight (F8_E4M3 [4, 2])`."""
    return f"{quote(entry.name)} ({entry.dtype} {list(entry.shape)})"


def fault(checkpoint: Checkpoint, entry: Entry, message: str) -> CheckpointError:
    """An error about one tensor, with its file."""
    return CheckpointError(message, file=str(checkpoint.files[entry.file]), tensor=entry.name)


def missing(checkpoint: Checkpoint, codes: Entry, expected: Sequence[str], what: str = "scale") -> CheckpointError:
    """The error about codes without a companion. expected: names of tensors, of which one must be there."""
    names = " or ".join(map(quote, expected))
    return fault(
        checkpoint,
        codes,
        f"{described(codes)} holds codes, which mean nothing without their {what}: expected {names}, got none. "
        "Download or copy the checkpoint again, or quantise the model anew",
    )


def check_dtype(checkpoint: Checkpoint, entry: Entry, codes: Entry, allowed: Collection[str]) -> None:
    """Raises: CheckpointError, if a companion has none of these dtypes."""
    if entry.dtype.name not in allowed:
        raise fault(
            checkpoint,
            entry,
            f"{described(entry)} must be {' or '.join(allowed)}: it is the scale of {described(codes)}",
        )


def misshapen(checkpoint: Checkpoint, entry: Entry, codes: Entry, expected: str) -> CheckpointError:
    """The error about a companion that does not fit. expected: the shapes that would, for people."""
    return fault(
        checkpoint,
        entry,
        f"{described(entry)} does not fit the codes {described(codes)} whose scale it is: expected {expected}, got "
        f"{list(entry.shape)}",
    )


def small_bytes(checkpoint: Checkpoint, entry: Entry) -> bytes | None:
    """The bytes of a small tensor: a description, say; None, if it is not small.

    Raises: CheckpointError; StorageError.
    """
    if entry.nbytes > _SMALL:
        return None
    path = str(checkpoint.files[entry.file])
    with opened(path) as file:
        return read_from(file, path, entry.start, entry.nbytes)
