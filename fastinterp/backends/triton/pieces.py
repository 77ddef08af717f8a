"""Pieces of the pump's steps, by their kinds, as launches of Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastinterp.backends.device import Pending, Piece
from fastinterp.backends.triton.launch import Room


def refuses(step: Mapping[str, Any]) -> str | None:
    """Why no kernel here does this step, as "random keeps by rank"; None if one does."""
    kind = step["kind"]
    if kind == "divergence":
        return "the divergence of rows"
    if kind == "same":
        return "bytes that are only compared"
    if any(isinstance(operand[0], list) for operand in step["inputs"]):
        return "rows gathered from several places"
    keeps = step["keeps"][1:] if kind == "kept" else []
    keeps += [term["keep"] for asked in step.get("masked", ()) for term in asked["terms"]]
    if any(min(keep["lo"], 1 << 32) != min(keep["hi"], 1 << 32) for keep in keeps):
        return "random keeps by rank"
    return None


def run(room: Room, pieces: Sequence[Piece]) -> list[Pending]:
    from fastinterp.backends.triton.combine import combine
    from fastinterp.backends.triton.histogram import histogram
    from fastinterp.backends.triton.masked import kept, masked
    from fastinterp.backends.triton.measure import measure

    kernels: dict[str, Callable[[Room, list[Piece]], Sequence[Pending]]] = {
        "combine": combine, "measure": measure, "measure_deltas": measure, "histogram": histogram, "masked": masked,
        "kept": kept,
    }  # fmt: skip
    pending: list[Pending | None] = [None] * len(pieces)
    kinds: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        kinds.setdefault(piece["kind"], []).append(i)
    for kind, places in kinds.items():
        some = kernels[kind](room, [pieces[i] for i in places])
        for i, one in zip(places, some, strict=True):
            pending[i] = one
    return [one for one in pending if one is not None]
