"""The names of tensors that belong to codes: scales, and what is left out or makes a format unreadable."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fastinterp.checkpoint.formats.encoded import (
    EncodedTensor,
    beside,
    described,
    fault,
    small_bytes,
    start_of,
)
from fastinterp.checkpoint.formats.scales import may_scale
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.open import Checkpoint

_OF_TENSOR = ("_scale_inv", "_scale")  # of X
_OF_WEIGHT = ("scale_weight", "qscale_weight", "weights_scaling_factor")  # of P.weight
_MAYBE = "scale"  # the same, where dtype and shape fit: parameters of other kinds have that name, too
COMFY = "comfy_quant"  # of P.weight: P.comfy_quant, a JSON object as U8
# Of P.weight, without meaning where there are no codes: scales of activations.
_ACTIVATIONS = (
    "input_scale", "scale_input", "qscale_act", "activation_scale", "act_scale", "input_scale_ub", "output_scale",
    "activation_scaling_factor", "input_zero_point", "input_global_scale",
)  # fmt: skip
_TENSORS_ACTIVATIONS = ("_activation_scale", "_input_scale", "_input_scale_ub")  # of X
_ZERO_POINT = "_zero_point"  # of X; zeros where codes are symmetric
_UNREAD = ("pre_quant_scale",)  # of P.weight: what makes another format of it, which no reader knows
_PACKED_UNREAD = ("weight_zero_point", "weight_g_idx")  # of P.weight_packed
_TENSORS_UNREAD = ("_scale_2", "_g_idx", "_global_scale", "_scale_inv_2")  # of X
_WEIGHTS = ("weight", "weight_packed")  # what companions of a module belong to
_NUMBER = re.compile(r"\d+")


def scales_of(checkpoint: Checkpoint, codes: Entry) -> list[Entry]:
    """The scales of codes, under whatever name; none, if there are none."""
    start = start_of(codes.name)
    found = beside(checkpoint, codes.name, _OF_TENSOR)
    if codes.name == f"{start}weight":
        found += beside(checkpoint, start, _OF_WEIGHT)
        if not found:
            found += [e for e in beside(checkpoint, start, (_MAYBE,)) if may_scale(e, codes)]
    return found


def only(checkpoint: Checkpoint, codes: Entry, scales: Sequence[Entry]) -> Entry:
    """The one scale. Raises: CheckpointError, if there are several."""
    if len(scales) > 1:
        names = " and ".join(map(described, scales))
        raise fault(checkpoint, codes, f"{described(codes)} has several scales: {names}. Which one counts is not known")
    return scales[0]


def is_unread(checkpoint: Checkpoint, codes: Entry) -> bool:
    """Whether something beside the codes makes another format of them: zero points, an order of columns."""
    start = start_of(codes.name)
    others = (*_UNREAD, *_PACKED_UNREAD) if codes.name == f"{start}weight_packed" else _UNREAD
    if beside(checkpoint, codes.name, _TENSORS_UNREAD) or beside(checkpoint, start, others):
        return True
    return any(
        any(raw) if (raw := small_bytes(checkpoint, e)) is not None else True
        for e in beside(checkpoint, codes.name, (_ZERO_POINT,))
    )


def tensor_of(
    checkpoint: Checkpoint,
    codes: Entry,
    companions: Sequence[Entry],
    decoder: str,
    parameters: Sequence[float] = (),
    *,
    format: str,
    name: str = "",
    shape: Sequence[int] | None = None,
    assumed: bool = False,
) -> EncodedTensor:
    """The tensor of these codes, with all that lies beside them. name, shape: where they are not those of the codes."""
    start = start_of(codes.name)
    is_weight = codes.name[len(start) :] in _WEIGHTS
    activations = beside(checkpoint, start, _ACTIVATIONS) if is_weight else []
    activations += beside(checkpoint, codes.name, _TENSORS_ACTIVATIONS)
    left_out = beside(checkpoint, start, (COMFY,)) if is_weight else []
    left_out += beside(checkpoint, codes.name, (_ZERO_POINT,))
    return EncodedTensor(
        name or codes.name, codes.shape if shape is None else tuple(shape), codes, tuple(companions), decoder,
        tuple(parameters), activations=tuple(activations), left_out=tuple(left_out), format=format, assumed=assumed,
    )  # fmt: skip


def numbered(name: str) -> str:
    """A name without its numbers: layers of one kind have the same."""
    return _NUMBER.sub("#", name)
