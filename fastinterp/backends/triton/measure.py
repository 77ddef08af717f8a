"""Gram matrices, L1 norms and counts as launches of Triton kernels: chunks on the device, folded where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.launch import Answer, LaunchContext, alignment
from fastinterp.backends.triton.tables import Part, Table
from fastinterp.ops.contract import BLOCK_ROWS, CHUNK, LANES
from fastinterp.ops.steps import Measure

TOGETHER = 4  # inputs whose sums fit into registers
FETCHED = 1 << 20  # numbers that are folded on the host: more are folded on the device first


@dataclass(slots=True)
class Sums:
    """What one launch computes: of some inputs, the base first where deltas are asked for.

    pairs, alone  of these inputs, by their place among them
    places        of the sums and of the counts, in the answer
    """

    inputs: list[int]
    pairs: tuple[tuple[int, int], ...]
    alone: tuple[int, ...]
    places: tuple[int, ...]


def launches(n: int, deltas: bool) -> list[Sums]:
    """All sums of n vectors, in launches of a few."""
    groups = [list(range(i, min(i + TOGETHER, n))) for i in range(0, n, TOGETHER)]
    found = []
    for g, left in enumerate(groups):
        for right in groups[g:]:
            inputs = sorted({*left, *right, *([0] if deltas else [])})
            at = {i: k for k, i in enumerate(inputs)}
            pairs = [(i, j) for i in left for j in right if i <= j]
            alone = left if left is right else []
            places = [i * n - i * (i - 1) // 2 + j - i for i, j in pairs]
            places += [n * (n + 1) // 2 + i for i in alone] + list(alone)
            own = tuple((at[i], at[j]) for i, j in pairs)
            found.append(Sums(inputs, own, tuple(at[i] for i in alone), tuple(places)))
    return found


def measure(context: LaunchContext, pieces: Sequence[Piece]) -> list[Answer]:
    """Measures of tensors, rows or columns, of inputs or deltas."""
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, piece in enumerate(pieces):
        step = piece.step
        assert isinstance(step, Measure)
        same.setdefault((piece.codes, step.deltas, step.per), []).append(i)
    answers: list[Answer | None] = [None] * len(pieces)
    for (codes, deltas, per), places in same.items():
        some = [pieces[i] for i in places]
        found = _columns(context, some, codes, deltas) if per == "column" else _rows(context, some, codes, deltas, per)
        for i, answer in zip(places, found, strict=True):
            answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _width(n: int) -> int:
    return n * (n + 1) // 2 + n


def _part(piece: Piece, begin: int, count: int, columns: int, place: int) -> Part:
    """Some elements of a piece, in rows of so many; `place`: of their first answer."""
    part = Part(0, list(piece.inputs), piece.codes, [], [], [], bytearray(), [], 0, piece.numel, piece.first, columns)
    part = part.at(begin, count, 0)
    part.columns, part.place = columns, place
    return part


def _launch(
    context: LaunchContext, kernel: Any, parts: Sequence[Part], tiles: Sequence[int], deltas: bool, found: Any,
    counted: Any, ahead: int,
) -> None:  # fmt: skip
    """All sums of parts whose inputs have the same dtypes.

    tiles  of each, of which a program may do several
    ahead  steps of few inputs that are loaded while others are added: bytes in flight, as far as registers hold them
    """
    codes = parts[0].codes
    wide, together = 0 in codes, context.tile(1, 64)
    aligned: dict[int, list[int]] = {}
    for p, part in enumerate(parts):
        aligned.setdefault(alignment(part.addresses, codes, part.columns), []).append(p)
    for sums in launches(len(codes), deltas):
        for align, places in aligned.items():
            table = Table([parts[p].of(sums.inputs) for p in places], [-(-tiles[p] // together) for p in places])
            rows, _ = table.on(context)
            context.launch(
                kernel, table.tiles, rows, found, counted, len(places),
                DT=tuple(codes[i] for i in sums.inputs), WIDE=wide, DELTAS=deltas, PAIRS=sums.pairs, ALONE=sums.alone,
                PLACES=sums.places, WIDTH=_width(len(codes)), COUNTS=len(codes), ALIGN=align,
                AHEAD=context.tile(ahead if len(sums.inputs) <= 2 else 1, 1), TILES=together, STEPS=table.steps,
                warps=1 if len(sums.pairs) <= 3 else 2,
            )  # fmt: skip


def _rows(
    context: LaunchContext, pieces: Sequence[Piece], codes: tuple[int, ...], deltas: bool, per: str
) -> list[Answer]:
    """A tensor as a whole is one row."""
    from fastinterp._triton.measure import measure_kernel

    parts, tiles, shapes = [], [], []
    place = 0
    for piece in pieces:
        numel = piece.numel
        columns = piece.step.columns if per == "row" else numel
        rows, chunks = (numel // columns if columns else int(per == "tensor")), -(-columns // CHUNK)
        shapes.append((place, rows, chunks))
        # Whole chunks apart from the rest, whose end may be no multiple of 16.
        body = numel // CHUNK * CHUNK if per == "tensor" and numel % 16 else 0
        for begin, count in ((0, body), (body, numel - body)):
            if count:
                width = columns if per == "row" else count
                parts.append(_part(piece, begin, count, width, place + begin // CHUNK))
                tiles.append(rows * -(-width // CHUNK))
        place += rows * chunks
    found, counted = context.zeros("float64", place, _width(len(codes))), context.zeros("int32", place, len(codes))
    if parts:
        _launch(context, measure_kernel, parts, tiles, deltas, found, counted, 2)
    found, counted = fetched(context, found, counted)
    answers = []
    for place, rows, chunks in shapes:
        sums = found[place : place + rows * chunks].reshape(rows, chunks, found.shape[1])
        counts = counted[place : place + rows * chunks].reshape(rows, chunks, len(codes))
        answers.append(answer_of(context, sums, counts))
    return answers


def _columns(context: LaunchContext, pieces: Sequence[Piece], codes: tuple[int, ...], deltas: bool) -> list[Answer]:
    from fastinterp._triton.measure import measure_columns_kernel

    parts, tiles, shapes = [], [], []
    place = 0  # in columns of answers
    for piece in pieces:
        columns = piece.step.columns
        rows = piece.numel // columns
        blocks = -(-rows // BLOCK_ROWS)
        shapes.append((place, blocks, columns))
        if blocks:
            parts.append(_part(piece, 0, piece.numel, columns, place))
            tiles.append(blocks * -(-columns // LANES))
        place += blocks * columns
    width, n = _width(len(codes)), len(codes)
    found, counted = context.zeros("float64", place * width), context.zeros("int32", place * n)
    if parts:
        _launch(context, measure_columns_kernel, parts, tiles, deltas, found, counted, 2)
    found, counted = fetched(context, found, counted)
    answers = []
    for place, blocks, columns in shapes:
        end = place + blocks * columns
        sums = found[place * width : end * width].reshape(1, blocks, width * columns)
        counts = counted[place * n : end * n].reshape(1, blocks, n * columns)
        answers.append(answer_of(context, sums, counts, columns))
    return answers


def fetched(context: LaunchContext, found: Any, counted: Any) -> tuple[Any, Any]:
    """What a launch found, in one copy; or as it is, where there is so much that it is folded first."""
    return (found, counted) if found.numel() > FETCHED else (context.fetch(found), context.fetch(counted))


def answer_of(context: LaunchContext, sums: Any, counts: Any, columns: int = 1) -> Answer:
    """sums  f64[rows, chunks, numbers]; counts  i32, likewise: fetched or not. With `columns`, numbers are
    [kinds, columns]."""
    if sums.device.type != "cpu":
        sums, counts = context.fetch(fold(sums)), context.fetch(counts.sum(dim=1, keepdim=True))

    def answer() -> tuple[Any, Any]:
        reals, nonzero = fold(sums), counts.sum(dim=1)
        if columns > 1:
            reals, nonzero = (x.reshape(-1, columns).T for x in (reals, nonzero))
        return _bytes_of(reals, "d"), _bytes_of(nonzero, "q")

    return Answer(answer)


def fold(sums: Any) -> Any:
    """Chunks in adjacent pairs, an odd one carried: f64[rows, chunks, numbers] to f64[rows, 1, numbers]."""
    import torch

    if sums.shape[1] == 0:
        return sums.new_zeros(sums.shape[0], 1, sums.shape[2])
    while sums.shape[1] > 1:
        even = sums.shape[1] // 2 * 2
        sums = torch.cat([sums[:, 0:even:2] + sums[:, 1:even:2], sums[:, even:]], dim=1)
    return sums


def _bytes_of(tensor: Any, code: Literal["d", "q"]) -> Any:
    return memoryview(tensor.contiguous().numpy().tobytes()).cast(code)
