"""Launches of the Triton kernels for weighted sums, many tensors at a time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.effects import Effects, Written
from fastinterp.backends.triton.launch import LaunchContext
from fastinterp.backends.triton.tables import Part, Table, aligned, tiles_of
from fastinterp.ops.steps import Combine, GroupCombine

PLAIN, BY_ROW, BY_COLUMN, CONVERT, COPY = range(5)  # as in _triton/combine.py


def combine(context: LaunchContext, pieces: Sequence[Piece]) -> list[Written]:
    """Weighted sums of tensors. pieces: of Combine steps."""
    return _launched(context, pieces, [part for i, piece in enumerate(pieces) for part in _plain(i, piece)])


def group_combine(context: LaunchContext, pieces: Sequence[Piece]) -> list[Written]:
    """Weighted sums by row or by column. pieces: of GroupCombine steps."""
    return _launched(context, pieces, [part for i, piece in enumerate(pieces) for part in _groups(i, piece)])


def _launched(context: LaunchContext, pieces: Sequence[Piece], parts: Sequence[Part]) -> list[Written]:
    same: dict[tuple[Any, ...], list[Part]] = {}
    for part in parts:
        piece = pieces[part.piece]
        step = piece.sum_step
        copies = part.kind == COPY  # neither rounded nor measured
        stochastic = bool(step.keys) and not copies
        every = 0 if copies else piece.stats_every
        alike = (part.kind, part.codes, step.out_dtype, stochastic, piece.fp8_saturate or copies, every)
        same.setdefault(alike, []).append(part)
    written = [Written(i, len(piece.outputs)) for i, piece in enumerate(pieces)]
    for (kind, codes, out, stochastic, saturate, every), some in same.items():
        constants = {"N": len(codes), "DT": codes, "OUT": out, "WIDE": 0 in codes, "PER": kind, "SATURATE": saturate}
        _run(context, some, constants, stochastic, every, written)
    return written


def _plain(i: int, piece: Piece) -> list[Part]:
    """The parts of a piece: its outputs, grouped by pivot and terms."""
    step = piece.step
    assert isinstance(step, Combine)
    alike: dict[tuple[Any, ...], list[int]] = {}
    for j, row in enumerate(step.rows):
        kind = PLAIN
        if row.is_copy:
            kind = COPY if step.inputs[row.pivot].dtype == step.out_dtype else CONVERT
        alike.setdefault((kind, row.pivot, *[t for t, _ in row.terms]), []).append(j)
    parts = []
    for (kind, *used), rows in alike.items():
        numbers = array("d")
        for j in rows:
            numbers.append(step.rows[j].total)
            numbers.extend([w for _, w in step.rows[j].terms])
        part = _part(i, piece, kind, used, rows, bytearray(numbers))
        part.affine = [kind != PLAIN or step.rows[j].total == 1.0 for j in rows]
        parts.append(part)
    return parts


def _part(i: int, piece: Piece, kind: int, used: Sequence[int], rows: list[int], numbers: bytearray) -> Part:
    """Some outputs of a piece. used: the inputs of their sum, pivot first."""
    step = piece.sum_step
    return Part(
        piece=i,
        addresses=[piece.inputs[u] for u in used],
        codes=tuple([step.inputs[u].dtype for u in used]),
        outs=[piece.outputs[j] for j in rows],
        keys=[step.keys[j] for j in rows] if step.keys else [0] * len(rows),
        rows=rows,
        numbers=numbers,
        affine=[True] * len(rows),
        kind=kind,
        count=piece.numel,
        first=piece.first,
    )


def _groups(i: int, piece: Piece) -> list[Part]:
    """The parts of a piece whose weights differ by row or by column, one per output, with the weights of its rows or of
    all columns."""
    step = piece.step
    assert isinstance(step, GroupCombine)
    columns, by_row = step.columns, step.per == "row"
    begin = piece.first // columns if by_row else 0
    end = -(-(piece.first + piece.numel) // columns) if by_row else columns
    parts = []
    for j, row in enumerate(step.rows):
        n = len(row.inputs)
        totals = _doubles(row.totals)
        numbers = bytearray(totals[begin:end].tobytes()) + _doubles(row.weights)[begin * n : end * n].tobytes()
        part = _part(i, piece, BY_ROW if by_row else BY_COLUMN, [row.pivot, *row.inputs], [j], numbers)
        part.affine = [list(totals).count(1.0) == len(totals)]
        part.columns, part.group, part.groups = columns, begin, end - begin
        parts.append(part)
    return parts


def _doubles(buffer: Any) -> memoryview[float]:
    return memoryview(buffer).cast("B").cast("d")


def _run(
    context: LaunchContext,
    parts: list[Part],
    constants: dict[str, Any],
    stochastic: bool,
    every: int,
    written: Sequence[Written],
) -> None:
    """Launch the kernels for parts with the same constants."""
    from fastinterp._triton.combine import combine_kernel, effect_kernel

    flags = 0
    for part in parts:
        part.flags = flags
        flags += len(part.outs)
    nonfinite = context.zeros("int32", max(1, flags))
    # 16 elements a thread where registers hold as many, else 8.
    few = constants["N"] <= 4 and constants["PER"] not in (BY_ROW, BY_COLUMN) and not stochastic
    block = context.tile(2048 if few else 1024, 8192)
    for align, some in aligned(parts, constants["OUT"]).items():
        table = Table(some, tiles_of(some, block))
        context.launch(
            combine_kernel, table.tiles, *table.on(context), nonfinite, len(some),
            **constants, STOCHASTIC=stochastic, MARK_NONFINITE=every > 0, ALIGN=align, BLOCK=block,
        )  # fmt: skip
    if every > 0:
        measured = constants["PER"] != CONVERT
        effects = Effects(context, effect_kernel, parts, constants, every=every, measured=measured, flags=nonfinite)
        for i in dict.fromkeys(part.piece for part in parts):
            written[i].effects.append(effects)
