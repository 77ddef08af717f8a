"""Gram matrices, L1 norms and counts as launches of Triton kernels: chunks on the device, folded where they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.launch import Answer, LaunchContext, alignment
from fastinterp.backends.triton.tables import Part, Table
from fastinterp.ops.contract import BLOCK_ROWS, CHUNK, LANES
from fastinterp.ops.dtypes import CODE_BYTES
from fastinterp.ops.steps import Measure

TOGETHER = 4  # inputs whose sums fit into registers
# Bytes of an input that a lane loads ahead, to keep memory busy, and for which there are registers, too: half of them
# where there are more inputs, or columns of more than two, whose elements have addresses of their own.
AHEAD = 8
FETCHED = 1 << 20  # numbers that are folded on the host: more are folded on the device first


@dataclass(slots=True)
class Sums:
    """The sums that one launch computes, of some inputs; the base is the first of them where deltas are measured.

    pairs    products, by index among `inputs`
    norms    vectors whose L1 norms and counts are computed, by index among `inputs`
    columns  columns of the answer for the products, the norms and the counts
    """

    inputs: list[int]
    pairs: tuple[tuple[int, int], ...]
    norms: tuple[int, ...]
    columns: tuple[int, ...]


def launches(n: int, deltas: bool) -> list[Sums]:
    """All sums of n vectors, divided into launches of few vectors."""
    groups = [list(range(i, min(i + TOGETHER, n))) for i in range(0, n, TOGETHER)]
    sums = []
    for g, left in enumerate(groups):
        for right in groups[g:]:
            inputs = sorted({*left, *right, *([0] if deltas else [])})
            at = {i: k for k, i in enumerate(inputs)}
            pairs = [(i, j) for i in left for j in right if i <= j]
            norms = left if left is right else []
            columns = [i * n - i * (i - 1) // 2 + j - i for i, j in pairs]
            columns += [n * (n + 1) // 2 + i for i in norms] + list(norms)
            indices = tuple((at[i], at[j]) for i, j in pairs)
            sums.append(Sums(inputs, indices, tuple(at[i] for i in norms), tuple(columns)))
    return sums


def measure(context: LaunchContext, pieces: Sequence[Piece]) -> list[Answer]:
    """Gram matrices, L1 norms and counts of tensors, rows or columns. pieces: of Measure steps."""
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, piece in enumerate(pieces):
        step = piece.step
        assert isinstance(step, Measure)
        same.setdefault((piece.codes, step.deltas, step.per), []).append(i)
    answers: list[Answer | None] = [None] * len(pieces)
    for (codes, deltas, per), indices in same.items():
        some = [pieces[i] for i in indices]
        of_pieces = (
            _columns(context, some, codes, deltas) if per == "column" else _rows(context, some, codes, deltas, per)
        )
        for i, answer in zip(indices, of_pieces, strict=True):
            answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _width(n: int) -> int:
    """The number of sums of n vectors: products and L1 norms."""
    return n * (n + 1) // 2 + n


def _part(piece: Piece, begin: int, count: int, columns: int, answer: int) -> Part:
    """Elements [begin, begin + count) of a piece, in rows of `columns`. answer: index of their first answer."""
    part = Part(0, list(piece.inputs), piece.codes, [], [], [], bytearray(), [], 0, piece.numel, piece.first, columns)
    part = part.at(begin, count, 0)
    part.columns, part.answer = columns, answer
    return part


def _launch(
    context: LaunchContext, kernel: Any, parts: Sequence[Part], tiles: Sequence[int], deltas: bool, sums: Any,
    counts: Any,
) -> None:  # fmt: skip
    """Launch all sums of parts whose inputs have the same dtypes.

    sums, counts  the results of all parts
    tiles         number of tiles of each part, of which a program may do several
    """
    from fastinterp._triton.measure import measure_columns_kernel

    codes = parts[0].codes
    aligned: dict[int, list[int]] = {}
    for p, part in enumerate(parts):
        aligned.setdefault(alignment(part.addresses, codes, part.columns), []).append(p)
    for launch in launches(len(codes), deltas):
        # A thread sums 8 lanes of a tile, so that it loads 16 bytes of small dtypes; the sums of many pairs fit into
        # its registers for 4 lanes.
        threads = 32 if len(launch.pairs) <= 3 else 64
        together = context.tile(max(1, context.warp // threads), 64)
        widest = max(2, *[CODE_BYTES[codes[i]] for i in launch.inputs])
        most = AHEAD >> (len(launch.inputs) > TOGETHER) + (kernel is measure_columns_kernel and len(launch.inputs) > 2)
        ahead = context.tile(max(1, most // widest), 1)
        for align, indices in aligned.items():
            table = Table([parts[p].of(launch.inputs) for p in indices], [-(-tiles[p] // together) for p in indices])
            rows, _ = table.on(context)
            context.launch(
                kernel, table.tiles, rows, sums, counts, len(indices),
                DT=tuple(codes[i] for i in launch.inputs), WIDE=0 in codes, DELTAS=deltas, PAIRS=launch.pairs,
                NORMS=launch.norms, SUMS=launch.columns, WIDTH=_width(len(codes)), COUNTS=len(codes), ALIGN=align,
                AHEAD=ahead, TILES=together, threads=threads,
            )  # fmt: skip


def _rows(
    context: LaunchContext, pieces: Sequence[Piece], codes: tuple[int, ...], deltas: bool, per: str
) -> list[Answer]:
    """Sums of tensors or of their rows: a tensor as a whole is one row."""
    from fastinterp._triton.measure import measure_kernel

    parts, tiles, shapes = [], [], []
    answer_at = 0
    for piece in pieces:
        numel = piece.numel
        columns = piece.step.columns if per == "row" else numel
        rows, chunks = (numel // columns if columns else int(per == "tensor")), -(-columns // CHUNK)
        shapes.append((answer_at, rows, chunks))
        # Whole chunks apart from the rest, whose end may be no multiple of 16.
        body = numel // CHUNK * CHUNK if per == "tensor" and numel % 16 else 0
        for begin, count in ((0, body), (body, numel - body)):
            if count:
                width = columns if per == "row" else count
                parts.append(_part(piece, begin, count, width, answer_at + begin // CHUNK))
                tiles.append(rows * -(-width // CHUNK))
        answer_at += rows * chunks
    sums, counts = (
        context.zeros("float64", answer_at, _width(len(codes))),
        context.zeros("int32", answer_at, len(codes)),
    )
    if parts:
        _launch(context, measure_kernel, parts, tiles, deltas, sums, counts)
    sums, counts = fetched(context, sums, counts)
    answers = []
    for answer_at, rows, chunks in shapes:
        of_piece = sums[answer_at : answer_at + rows * chunks].reshape(rows, chunks, sums.shape[1])
        counts_of_piece = counts[answer_at : answer_at + rows * chunks].reshape(rows, chunks, len(codes))
        answers.append(answer_of(context, of_piece, counts_of_piece))
    return answers


def _columns(context: LaunchContext, pieces: Sequence[Piece], codes: tuple[int, ...], deltas: bool) -> list[Answer]:
    from fastinterp._triton.measure import measure_columns_kernel

    parts, tiles, shapes = [], [], []
    answer_at = 0  # in columns of answers
    for piece in pieces:
        columns = piece.step.columns
        rows = piece.numel // columns
        blocks = -(-rows // BLOCK_ROWS)
        shapes.append((answer_at, blocks, columns))
        if blocks:
            parts.append(_part(piece, 0, piece.numel, columns, answer_at))
            tiles.append(blocks * -(-columns // LANES))
        answer_at += -(-blocks * columns // 16) * 16  # where vectors can be stored
    width, n = _width(len(codes)), len(codes)
    sums, counts = context.zeros("float64", answer_at * width), context.zeros("int32", answer_at * n)
    if parts:
        _launch(context, measure_columns_kernel, parts, tiles, deltas, sums, counts)
    sums, counts = fetched(context, sums, counts)
    answers = []
    for answer_at, blocks, columns in shapes:
        end = answer_at + blocks * columns
        of_piece = sums[answer_at * width : end * width].reshape(1, blocks, width * columns)
        counts_of_piece = counts[answer_at * n : end * n].reshape(1, blocks, n * columns)
        answers.append(answer_of(context, of_piece, counts_of_piece, columns))
    return answers


def fetched(context: LaunchContext, sums: Any, counts: Any) -> tuple[Any, Any]:
    """The results of a launch on the host; on the device, where there are so many that they are folded there first."""
    return (sums, counts) if sums.numel() > FETCHED else (context.fetch(sums), context.fetch(counts))


def answer_of(context: LaunchContext, sums: Any, counts: Any, columns: int = 1) -> Answer:
    """The answer of a piece from its sums of chunks.

    sums    f64[rows, chunks, numbers], on the host or on the device
    counts  i32, likewise. With `columns`, numbers are [kinds, columns]
    """
    if sums.device.type != "cpu":
        sums, counts = context.fetch(fold(sums)), context.fetch(counts.sum(dim=1, keepdim=True))

    def answer() -> tuple[Any, Any]:
        reals, nonzero = fold(sums), counts.sum(dim=1)
        if columns > 1:
            reals, nonzero = (x.reshape(-1, columns).T for x in (reals, nonzero))
        return _bytes_of(reals, "d"), _bytes_of(nonzero, "q")

    return Answer(answer)


def fold(sums: Any) -> Any:
    """Add chunks in adjacent pairs, an odd one carried: f64[rows, chunks, numbers] to f64[rows, 1, numbers]."""
    import torch

    if sums.shape[1] == 0:
        return sums.new_zeros(sums.shape[0], 1, sums.shape[2])
    while sums.shape[1] > 1:
        even = sums.shape[1] // 2 * 2
        sums = torch.cat([sums[:, 0:even:2] + sums[:, 1:even:2], sums[:, even:]], dim=1)
    return sums


def _bytes_of(tensor: Any, code: Literal["d", "q"]) -> Any:
    return memoryview(tensor.contiguous().numpy().tobytes()).cast(code)
