"""Launches of the Triton kernels for sums with masks, and for statistics of masked deltas."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Any

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.effects import Effects, Written
from fastinterp.backends.triton.histogram import add_factors, score_code
from fastinterp.backends.triton.launch import Answer, LaunchContext, alignment, signed
from fastinterp.backends.triton.measure import answer_of, fetched
from fastinterp.backends.triton.tables import Part, Table, aligned, tiles_of
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.steps import WORDS, MaskedOutput, MaskedStats, MaskedSum, MaskTest, Score

DRAWN = 3  # random masks that a thread holds in registers for 8 elements; with more masks, for 4
KEPT = {2: (32, 2), 3: (64, 2)}  # threads that sum so many inputs, and steps that they load ahead; more inputs: 64, 1
DELTAS = 3  # deltas whose sums a program of masked_stats_kernel holds in registers


def _tests(score: Score | None, tests: Sequence[MaskTest]) -> list[int]:
    """The words at EXTRA: see _triton/masked_sum.py."""
    numbers = [score.min_bits if score else 0]
    for test in tests:
        numbers += [test.min_bits, test.max_bits, min(test.low_limit, WORDS), signed(test.key)]
    return numbers


def masked_sum(context: LaunchContext, pieces: Sequence[Piece]) -> list[Written]:
    """Sums with masks, an output at a time. pieces: of MaskedSum steps."""
    same: dict[tuple[Any, ...], list[Part]] = {}
    for i, piece in enumerate(pieces):
        step = piece.step
        assert isinstance(step, MaskedSum)
        for j, output in enumerate(step.outputs):
            part, constants = _part(i, j, piece, step, output)
            rounding = (step.out_dtype, bool(step.keys), piece.fp8_saturate, piece.stats_every)
            same.setdefault((*rounding, constants), []).append(part)
    written = [Written(i, len(piece.outputs)) for i, piece in enumerate(pieces)]
    for (out, stochastic, saturate, every, constants), parts in same.items():
        _launch(context, parts, out, stochastic, saturate, every, constants, written)
    return written


def _part(i: int, j: int, piece: Piece, step: MaskedSum, output: MaskedOutput) -> tuple[Part, tuple[Any, ...]]:
    """The part of one output, and the constants of its kernel."""
    terms, score = output.terms, output.score
    important = terms[0].importance >= 0
    used = [output.base, *(t.input for t in terms), *(t.importance for t in terms if important)]
    reads = list(dict.fromkeys(used))
    numbers = array("d", (output.least_share, output.other_share, output.limit))
    for t in terms:
        numbers.extend((t.weight, t.sign_weight, t.share, t.sole_weight, t.weight * 1e-6))
    part = Part(
        piece=i,
        addresses=[piece.inputs[r] for r in reads],
        codes=tuple(step.inputs[r].dtype for r in reads),
        outs=[piece.outputs[j]],
        keys=[step.keys[j] if step.keys else 0],
        rows=[j],
        numbers=bytearray(),
        affine=[True],
        kind=0,
        count=piece.numel,
        first=piece.first,
        columns=step.columns,
        extra=_tests(score, [t.test for t in terms]),
    )
    add_factors(score, part)
    part.numbers = bytearray(numbers.tobytes()) + part.numbers
    constants = (
        part.codes,
        tuple(reads.index(t.input) for t in terms),
        tuple(reads.index(t.importance) for t in terms) if important else (),
        tuple(t.test.is_random for t in terms),
        *(output.elects_signs, output.divides, output.has_sole_weights),
        output.limit != math.inf,
        score_code(score),
    )
    return part, constants


def _launch(
    context: LaunchContext, parts: list[Part], out: int, stochastic: bool, saturate: bool, every: int,
    constants: Sequence[Any], written: Sequence[Written],
) -> None:  # fmt: skip
    from fastinterp._triton.masked_sum import masked_sum_effect_kernel, masked_sum_kernel

    codes, terms, importance, random, elects, divides, sole, limited, score = constants
    named = {
        "N": len(codes), "DT": codes, "OUT": out, "WIDE": 0 in codes, "TERMS": terms, "IMPORTANCE": importance,
        "RANDOM": random, "ELECTS": elects, "DIVIDES": divides, "SOLE": sole, "LIMITED": limited, "SCORE": score,
        "SATURATE": saturate,
    }  # fmt: skip
    for index, part in enumerate(parts):
        part.flags = index
    flags = context.zeros("int32", len(parts))
    block = context.tile(1024 if sum(random) <= DRAWN else 512, 8192)
    for align, some in aligned(parts, out).items():
        table = Table(some, tiles_of(some, block))
        context.launch(
            masked_sum_kernel, table.tiles, *table.on(context), flags, len(some),
            **named, STOCHASTIC=stochastic, MARK_NONFINITE=every > 0, ALIGN=align, BLOCK=block,
        )  # fmt: skip
    if every > 0:
        effects = Effects(
            context, masked_sum_effect_kernel, parts, named, every=every, measured=True, flags=flags, block=512,
        )  # fmt: skip
        for i in dict.fromkeys(part.piece for part in parts):
            written[i].effects.append(effects)


# --- statistics of masked deltas -------------------------------------------------------------------------------------


def masked_stats(context: LaunchContext, pieces: Sequence[Piece]) -> list[Answer]:
    """L1 norms, squares and counts of masked deltas. pieces: of MaskedStats steps."""
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, piece in enumerate(pieces):
        step = piece.step
        assert isinstance(step, MaskedStats)
        random = tuple(test.is_random for test in step.tests[1:])
        same.setdefault((piece.codes, random, score_code(step.score), step.l1, step.squares), []).append(i)
    answers: list[Answer | None] = [None] * len(pieces)
    for kind, indices in same.items():
        for i, answer in zip(indices, _stats(context, [pieces[i] for i in indices], *kind), strict=True):
            answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _stats(
    context: LaunchContext, pieces: Sequence[Piece], codes: tuple[int, ...], random: tuple[bool, ...], score: int,
    l1: bool, squares: bool,
) -> list[Answer]:  # fmt: skip
    """The statistics of pieces with the same constants."""
    from fastinterp._triton.masked_stats import masked_stats_kernel

    n = len(codes)
    threads, ahead = KEPT.get(n, (64, 1)) if sum(random) < DRAWN else (128, 1)
    together = context.tile(max(1, context.warp // threads), 16)
    ahead = context.tile(1 if any(random) else ahead, 1)
    shapes: list[tuple[int, int]] = []
    answers = 0
    alike: dict[int, list[tuple[Part, int]]] = {}
    for piece in pieces:
        part = _stats_part(piece, codes)
        part.groups = answers  # index of its first answer
        chunks = -(-part.count // CHUNK)
        alike.setdefault(alignment(part.addresses, codes, part.count), []).append((part, -(-chunks // together)))
        shapes.append((answers, answers + chunks))
        answers += chunks
    sums, counts = context.zeros("float64", answers, 3 * n), context.zeros("int32", answers, 2 * n)
    for align, some in alike.items():
        table = Table([part for part, _ in some], [tiles for _, tiles in some])
        words = table.on(context)
        for first in range(0, n - 1, DELTAS):
            context.launch(
                masked_stats_kernel, table.tiles, *words, sums, counts, len(some),
                N=n, DT=codes, WIDE=0 in codes, DELTAS=tuple(range(first, min(first + DELTAS, n - 1))), RANDOM=random,
                SCORE=score, L1=l1, SQUARES=squares, ALIGN=align, AHEAD=ahead, TILES=together, threads=threads,
            )  # fmt: skip
    sums, counts = fetched(context, sums, counts)
    return [answer_of(context, sums[None, begin:end], counts[None, begin:end]) for begin, end in shapes]


def _stats_part(piece: Piece, codes: tuple[int, ...]) -> Part:
    """The part of a piece of a MaskedStats step."""
    step = piece.step
    assert isinstance(step, MaskedStats)
    part = Part(
        0, list(piece.inputs), codes, [], [], [], bytearray(), [], 0, piece.numel, piece.first, step.columns,
        extra=_tests(step.score, step.tests[1:]),
    )  # fmt: skip
    add_factors(step.score, part)
    return part
