"""Weighted sums as launches of Triton kernels: tables of many tensors, and what is told of their outputs."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.effects import Effects, Written
from fastinterp.backends.triton.launch import Room
from fastinterp.backends.triton.tables import Part, Table, aligned, tiles_of

PLAIN, BY_ROW, BY_COLUMN, CONVERT, COPY = range(5)  # as in _triton/combine.py


def combine(room: Room, pieces: Sequence[Piece]) -> list[Written]:
    """Weighted sums, by tensor, row or column."""
    same: dict[tuple[Any, ...], list[Part]] = {}
    for i, piece in enumerate(pieces):
        parts = _groups(i, piece) if piece.get("per", "tensor") != "tensor" else _plain(i, piece)
        for part in parts:
            copies = part.kind == COPY  # whatever is asked of the others
            stochastic = bool(piece.get("keys")) and not copies
            every = 0 if copies else piece["stats_every"]
            alike = (part.kind, part.codes, piece["out_dtype"], stochastic, piece["fp8_saturate"] or copies, every)
            same.setdefault(alike, []).append(part)
    found = [Written(i, len(piece["outputs"])) for i, piece in enumerate(pieces)]
    for (kind, codes, out, stochastic, saturate, every), parts in same.items():
        constants = {"N": len(codes), "DT": codes, "OUT": out, "WIDE": 0 in codes, "PER": kind, "SATURATE": saturate}
        _run(room, parts, constants, stochastic, every, found)
    return found


def _plain(i: int, piece: Piece) -> list[Part]:
    """The outputs of a piece, those with the same pivot and terms together."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for j, (pivot, total, terms) in enumerate(piece["rows"]):
        kind = PLAIN
        if not terms and total == 1.0:
            kind = COPY if piece["inputs"][pivot][1] == piece["out_dtype"] else CONVERT
        alike.setdefault((kind, pivot, *[t for t, _ in terms]), []).append(j)
    parts = []
    for (kind, *used), rows in alike.items():
        numbers = array("d")
        for j in rows:
            _, total, terms = piece["rows"][j]
            numbers.append(total)
            numbers.extend([w for _, w in terms])
        parts.append(_part(i, piece, kind, used, rows, bytearray(numbers)))
    return parts


def _part(i: int, piece: Piece, kind: int, used: Sequence[int], rows: list[int], numbers: bytearray) -> Part:
    """`used`: pivot and terms."""
    inputs, outputs, keys = piece["inputs"], piece["outputs"], piece.get("keys")
    return Part(
        piece=i,
        addresses=[inputs[u][0] for u in used],
        codes=tuple([inputs[u][1] for u in used]),
        outs=[outputs[j] for j in rows],
        keys=[keys[j] for j in rows] if keys else [0] * len(rows),
        rows=rows,
        numbers=numbers,
        affine=[piece["rows"][j][1] == 1.0 for j in rows] if kind == PLAIN else [True] * len(rows),
        kind=kind,
        count=piece["numel"],
        first=piece["first"],
    )


def _groups(i: int, piece: Piece) -> list[Part]:
    """The outputs of a piece whose weights differ by row or by column: of the rows that it lies in, or of all
    columns."""
    columns, by_row = piece["columns"], piece["per"] == "row"
    begin = piece["first"] // columns if by_row else 0
    end = -(-(piece["first"] + piece["numel"]) // columns) if by_row else columns
    parts = []
    for j, (pivot, totals, inputs, weights) in enumerate(piece["rows"]):
        n = len(inputs)
        own = _doubles(totals)
        numbers = bytearray(own[begin:end].tobytes()) + _doubles(weights)[begin * n : end * n].tobytes()
        part = _part(i, piece, BY_ROW if by_row else BY_COLUMN, [pivot, *inputs], [j], numbers)
        part.affine = [list(own).count(1.0) == len(own)]
        part.columns, part.group, part.groups = columns, begin, end - begin
        parts.append(part)
    return parts


def _doubles(buffer: Any) -> memoryview[float]:
    return memoryview(buffer).cast("B").cast("d")


def _run(
    room: Room,
    parts: list[Part],
    constants: dict[str, Any],
    stochastic: bool,
    every: int,
    found: Sequence[Written],
) -> None:
    """Launches the kernels for parts that are alike."""
    from fastinterp._triton.combine import combine_kernel, effect_kernel

    flags = 0
    for part in parts:
        part.flags = flags
        flags += len(part.outs)
    told = room.zeros("int32", max(1, flags))
    # 16 elements a thread where they are few enough to be held in registers, else 8.
    few = constants["N"] <= 4 and constants["PER"] not in (BY_ROW, BY_COLUMN) and not stochastic
    block = room.tile(2048 if few else 1024, 8192)
    for align, some in aligned(parts, constants["OUT"]).items():
        table = Table(some, tiles_of(some, block))
        room.launch(
            combine_kernel, table.tiles, *table.on(room), told, len(some),
            **constants, STOCHASTIC=stochastic, TELL=every > 0, ALIGN=align, BLOCK=block, STEPS=table.steps,
        )  # fmt: skip
    if every > 0:
        measured = constants["PER"] != CONVERT
        effects = Effects(room, effect_kernel, parts, constants, every=every, measured=measured, flags=told)
        for i in dict.fromkeys(part.piece for part in parts):
            found[i].effects.append(effects)
