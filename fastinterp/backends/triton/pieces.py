"""Dispatches pieces to the launches of their kinds, and names the steps without a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastinterp.backends.device import Pending, Piece
from fastinterp.backends.triton.launch import LaunchContext
from fastinterp.ops.steps import CopyEqual, Divergence, Step


def refuses(step: Step) -> str | None:
    """The reason why no kernel supports this step, such as "random masks by rank"; None if one does."""
    if isinstance(step, Divergence):
        return "the divergence of rows"
    if isinstance(step, CopyEqual):
        return "bytes that are only compared"
    if step.gathers:
        return "rows gathered from several places"
    if step.decodes:
        return "encoded inputs"
    if step.encodes:
        return "encoded outputs"
    return "random masks by rank" if step.by_rank else None


def run(context: LaunchContext, pieces: Sequence[Piece]) -> list[Pending]:
    """Launch kernels for pieces of any kinds; their results, in order."""
    from fastinterp.backends.triton.combine import combine, group_combine
    from fastinterp.backends.triton.histogram import histogram
    from fastinterp.backends.triton.masked import masked_stats, masked_sum
    from fastinterp.backends.triton.measure import measure

    kernels: dict[str, Callable[[LaunchContext, list[Piece]], Sequence[Pending]]] = {
        "combine": combine, "group_combine": group_combine, "measure": measure, "histogram": histogram,
        "masked_sum": masked_sum, "masked_stats": masked_stats,
    }  # fmt: skip
    pending: list[Pending | None] = [None] * len(pieces)
    kinds: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        kinds.setdefault(piece.step.kind, []).append(i)
    for kind, indices in kinds.items():
        some = kernels[kind](context, [pieces[i] for i in indices])
        for i, one in zip(indices, some, strict=True):
            pending[i] = one
    return [one for one in pending if one is not None]
