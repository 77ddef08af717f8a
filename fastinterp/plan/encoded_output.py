"""Output tensors that are stored as codes and scales, as a tensor of the origin is: `quantize: same`.

Codes and scales are computed anew; the format, the blocks, the dtype of the scales and all names are the origin's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

from msgspec.structs import replace

from fastinterp.checkpoint.names import listing, quote
from fastinterp.errors import CheckpointError
from fastinterp.messages import counted
from fastinterp.ops.dtypes import F32
from fastinterp.ops.operands import Encoder
from fastinterp.plan.encoded_rows import is_tiled
from fastinterp.plan.inputs import Encoding, StoredInput, TensorInput
from fastinterp.plan.models import Model
from fastinterp.plan.output_encoding import OutputEncoding
from fastinterp.plan.planned import PlannedTensor

# Formats that csrc/encoder.cpp writes; the others are copied only.
ENCODERS = ("scaled_f8_e4m3", "scaled_f8_e5m2", "scaled_i8", "q8_0")


def quantised_as(
    origin: Model, tensors: Sequence[PlannedTensor], checkpoints: Sequence[Model], *, stacked: bool
) -> tuple[tuple[PlannedTensor, ...], list[str]]:
    """The tensors of an output that is quantised as its origin is, with those that belong to codes; and remarks.

    checkpoints  of the plan
    stacked      the output may have the origin's layers in another order, or other layers
    Raises: CheckpointError, if the origin has nothing quantised, or it is in a format that is not written.
    """
    number = {path: i for i, model in reversed(list(enumerate(checkpoints))) for path in model.files}
    every: list[PlannedTensor] = []
    counts: Counter[str] = Counter()
    copied = []

    def copy(name: str, stored: StoredInput) -> PlannedTensor:
        at = number.get(stored.path, 0)
        copied.append(name)
        return PlannedTensor(name, stored.dtype, stored.shape, (at,), (stored,), (), None, 1)

    for t in tensors:
        form = None if t.form is None else t.form.form
        encoding = None if form is None else _encoding(t, form, origin.name)
        if form is None or encoding is None:
            every.append(t)
            continue
        counts[encoding.format] += 1
        every.append(replace(t, dtype=F32, encoding=encoding))
        every += [copy(name, stored) for name, stored in _beside(t.name, form)]
    if not counts:
        raise CheckpointError(
            f"`quantize: same` (--quantize same) writes what {origin.name} has quantised, and it has nothing that is. "
            "Leave it out; --dtype names the dtype of the output",
            file=origin.name,
        )
    every += [copy(one.name, one) for one in origin.beside if not stacked]
    remarks = [f"{counted(n, 'tensor')} quantised as in {origin.name} ({form})" for form, n in counts.items()]
    if copied:
        remarks.append(
            f"scales of activations and descriptions of codes are those of {origin.name}: {listing(copied, 3)}"
        )
    if origin.beside and stacked:
        names = listing((one.name for one in origin.beside), 3)
        remarks.append(f"left out of {origin.name}, since layers are in another order: scales of activations: {names}")
    return tuple(every), remarks


def _encoding(t: PlannedTensor, form: TensorInput, origin: str) -> OutputEncoding | None:
    """How an output tensor is stored; None: as numbers.

    form    the tensor of the origin whose dtype and format it keeps
    origin  its name, for messages
    Raises: CheckpointError, if there is no encoder of the format.
    """
    encoding, name, shape = form.encoding, t.name, t.shape
    if encoding is None or t.numel == 0:
        return None
    if form.shape != shape:
        raise CheckpointError(
            f"{quote(name)} is {list(shape)} in the output, but {quote(form.name)} of {origin} is {list(form.shape)}, "
            f"in {encoding.format}: its scales are of other blocks. {_INSTEAD}",
            tensor=name,
        )
    alike = tuple(_alike(one, encoding) for one in t.inputs)
    encoder, format = None, encoding.format
    if is_tiled(encoding):
        format += " with scales in tiles"
    elif encoding.decoder in ENCODERS:
        columns = shape[-1] if len(shape) > 1 else prod(shape)
        numbers = tuple(map(int, encoding.parameters))
        encoder = Encoder(encoding.decoder, max(1, columns), (*numbers, 1) if encoding.power_of_two else numbers)
    if encoder is None and not (t.rows and all(row.is_copy and alike[row.pivot] for row in t.rows)):
        raise CheckpointError(
            f"{quote(name)} would change, and {origin} has it in {format}, which is read and not written. {_INSTEAD}",
            tensor=name,
        )
    codes = _renamed(encoding.codes, form.name, name), encoding.stored, encoding.codes_shape
    scales = tuple((_renamed(c.name, form.name, name), c.dtype, c.shape) for c in encoding.companions)
    return OutputEncoding(format, codes, scales, encoder, alike)


_INSTEAD = "Leave out `quantize` (--quantize) to write numbers: BF16, or what --dtype names"


def _beside(name: str, form: TensorInput) -> list[tuple[str, StoredInput]]:
    """The tensors that go with the codes of an output tensor, and are copied: scales of activations, descriptions.

    Returns pairs of a name in the output and the tensor of the origin.
    """
    encoding = form.encoding
    return [] if encoding is None else [(_renamed(one.name, form.name, name), one) for one in encoding.beside]


def _alike(one: TensorInput, form: Encoding) -> bool:
    """Whether a copy of an input may keep its codes and scales."""
    return one.codes is not None and _same(one.codes, form)


def _same(a: Encoding, b: Encoding) -> bool:
    """Whether codes and scales of the one are stored as those of the other."""
    kinds = [[(c.dtype, c.nbytes) for c in one.companions] for one in (a, b)]
    return (a.decoder, a.parameters, a.stored, a.power_of_two) == (
        b.decoder,
        b.parameters,
        b.stored,
        b.power_of_two,
    ) and kinds[0] == kinds[1]


def _renamed(stored: str, form: str, name: str) -> str:
    """The name of what belongs to `form`, for the output tensor `name`: they have the part up to the last point, or all
    of it, in common.
    """
    if stored.startswith(form):
        return name + stored[len(form) :]
    start, own = form.rpartition(".")[0], name.rpartition(".")[0]
    return own + stored[len(start) :] if stored.startswith(f"{start}.") and own else stored
