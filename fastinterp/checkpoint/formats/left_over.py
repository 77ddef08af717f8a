"""Scales without codes: left over where codes were replaced by numbers, or where codes are missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastinterp.checkpoint.formats.encoded import EncodedTensor, described, fault
from fastinterp.checkpoint.header import Entry
from fastinterp.checkpoint.names import quote
from fastinterp.checkpoint.open import Checkpoint
from fastinterp.checkpoint.quantisation_config import declared_method

# Ends of the names of scales, and of the codes that have them. Such names mean nothing else beside quantised weights.
_OWNERS = {
    ".scale_weight": ".weight", ".qscale_weight": ".weight", ".weights_scaling_factor": ".weight",
    ".weight_global_scale": ".weight_packed", ".weight_scale_2": ".weight", ".weight_scale": ".weight",
    "_scale_inv": "", "_scales": "_blocks", "_scale": "",
}  # fmt: skip


def refuse_left_over(checkpoint: Checkpoint, encoded: Sequence[EncodedTensor], taken: Collection[str]) -> None:
    """Raises: CheckpointError, naming it, if a scale belongs to no codes: whether the tensor beside it was multiplied
    is not known.

    taken  names of the tensors that belong to codes, in whatever format
    """
    for part in checkpoint.parts:
        entries = [checkpoint.tensors[part.prefix + name] for name in part.checkpoint.tensors]
        scales = [e for e in entries if e.name not in taken and (end := _end(e)) and _is_scale(checkpoint, e, end)]
        if not scales:
            continue
        has_codes = any(one.codes.name.startswith(part.prefix) for one in encoded)
        if has_codes or declared_method(part.checkpoint.root, part.checkpoint.metadata):
            raise _error(checkpoint, scales)


def _end(entry: Entry) -> str:
    if not entry.name.endswith(tuple(_OWNERS)):  # nearly always
        return ""
    return next((end for end in _OWNERS if entry.name.endswith(end)), "")


def _is_scale(checkpoint: Checkpoint, entry: Entry, end: str) -> bool:
    if end == "_scales":
        return entry.dtype.name in ("U8", "F8_E8M0")
    if end != "_scale":
        return True
    # `logit_scale` is a parameter; `experts.gate_up_proj_scale` is none, beside `experts.gate_up_proj`.
    owner = checkpoint.tensors.get(entry.name.removesuffix(end))
    return owner is not None and len(owner.shape) > 1


def _error(checkpoint: Checkpoint, scales: Sequence[Entry]) -> Exception:
    first = scales[0]
    end = _end(first)
    owner = checkpoint.tensors.get(first.name.removesuffix(end) + _OWNERS[end])
    expected = quote(first.name.removesuffix(end) + _OWNERS[end])
    got = f"{described(owner)} holds no codes" if owner is not None else f"{expected} is not there"
    many = f", and so are {len(scales) - 1} more" if len(scales) > 1 else ""
    return fault(
        checkpoint,
        first,
        f"{described(first)} is a scale without codes{many}: {got}, so whether its numbers were multiplied by the "
        "scale is not known. Download or copy the checkpoint again; if they were multiplied, write it anew without "
        "its scales",
    )
