"""Sums with masks, and what keeps leave, as launches of Triton kernels."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.compute.device import Piece
from fastinterp.compute.triton_effects import Effects, Written
from fastinterp.compute.triton_histogram import factors_of, score_of
from fastinterp.compute.triton_measure import answer_of
from fastinterp.compute.triton_room import CHUNK, Answer, Room, alignment, signed
from fastinterp.compute.triton_tables import Part, Table, aligned, tiles_of

WORDS = 1 << 32  # a random limit that draws nothing
OWN = 3  # deltas whose sums a program of `kept` holds in registers


def is_random(keep: Mapping[str, int]) -> bool:
    return min(keep["lo"], WORDS) < WORDS


def _tests(score: tuple[str, int, bytes] | None, keeps: Sequence[Mapping[str, int]]) -> list[int]:
    """What stands at EXTRA: see _triton/masked.py."""
    tests = [score[1] if score else 0]
    for keep in keeps:
        tests += [keep["least"], keep["most"], min(keep["lo"], WORDS), signed(keep["key"])]
    return tests


def masked(room: Room, pieces: Sequence[Piece]) -> list[Written]:
    """Sums with masks, an output at a time."""
    same: dict[tuple[Any, ...], list[Part]] = {}
    for i, piece in enumerate(pieces):
        for j, asked in enumerate(piece["masked"]):
            part, constants = _part(i, j, piece, asked)
            rounding = (piece["out_dtype"], bool(piece.get("keys")), piece["fp8_saturate"], piece["stats_every"])
            same.setdefault((*rounding, constants), []).append(part)
    found = [Written(i, len(piece["outputs"])) for i, piece in enumerate(pieces)]
    for (out, stochastic, saturate, every, constants), parts in same.items():
        _launch(room, parts, out, stochastic, saturate, every, constants, found)
    return found


def _part(i: int, j: int, piece: Piece, asked: Mapping[str, Any]) -> tuple[Part, tuple[Any, ...]]:
    """One output, and the constants of its kernel."""
    terms, score = asked["terms"], asked["score"]
    important = terms[0]["importance"] >= 0
    used = [asked["base"], *(t["input"] for t in terms), *(t["importance"] for t in terms if important)]
    reads = list(dict.fromkeys(used))
    numbers = array("d", (asked["least_share"], asked["other_share"], asked["limit"]))
    for t in terms:
        numbers.extend((t["weight"], t["vote"], t["share"], t["alone"], t["weight"] * 1e-6))
    keys = piece.get("keys") or [0] * len(piece["outputs"])
    part = Part(
        piece=i,
        addresses=[piece["inputs"][r][0] for r in reads],
        codes=tuple(piece["inputs"][r][1] for r in reads),
        outs=[piece["outputs"][j]],
        keys=[keys[j]],
        rows=[j],
        numbers=bytearray(),
        affine=[True],
        kind=0,
        count=piece["numel"],
        first=piece["first"],
        columns=piece["columns"],
        extra=_tests(score, [t["keep"] for t in terms]),
    )
    if score and score[0] == "divergence":
        factors_of(score, part)
    part.numbers = bytearray(numbers.tobytes()) + part.numbers
    constants = (
        part.codes,
        tuple(reads.index(t["input"]) for t in terms),
        tuple(reads.index(t["importance"]) for t in terms) if important else (),
        tuple(is_random(t["keep"]) for t in terms),
        *(bool(asked[name]) for name in ("votes", "divides", "alone")),
        asked["limit"] != math.inf,
        score_of(score),
    )
    return part, constants


def _launch(
    room: Room, parts: list[Part], out: int, stochastic: bool, saturate: bool, every: int, constants: Sequence[Any],
    found: Sequence[Written],
) -> None:  # fmt: skip
    from fastinterp._triton.masked import masked_effect_kernel, masked_kernel

    codes, terms, importance, random, votes, divides, alone, limited, score = constants
    named = {
        "N": len(codes), "DT": codes, "OUT": out, "WIDE": 0 in codes, "TERMS": terms, "IMPORTANCE": importance,
        "RANDOM": random, "VOTES": votes, "DIVIDES": divides, "ALONE": alone, "LIMITED": limited, "SCORE": score,
        "SATURATE": saturate,
    }  # fmt: skip
    for place, part in enumerate(parts):
        part.flags = place
    flags = room.zeros("int32", len(parts))
    block = room.block(1024)
    for align, some in aligned(parts, out).items():
        table = Table(some, tiles_of(some, block))
        room.launch(
            masked_kernel, table.tiles, *table.on(room), flags, len(some),
            **named, STOCHASTIC=stochastic, TELL=every > 0, ALIGN=align, BLOCK=block, STEPS=table.steps,
        )  # fmt: skip
    if every > 0:
        effects = Effects(room, masked_effect_kernel, parts, named, every=every, measured=True, flags=flags)
        for i in dict.fromkeys(part.piece for part in parts):
            found[i].effects.append(effects)


# --- what keeps leave ------------------------------------------------------------------------------------------------


def kept(room: Room, pieces: Sequence[Piece]) -> list[Answer]:
    """L1 norms, squares and counts of what keeps leave of deltas."""
    from fastinterp._triton.kept import kept_kernel

    answers = []
    for piece in pieces:
        addresses, codes = zip(*piece["inputs"], strict=True)
        n, score, keeps = len(codes), piece["score"], piece["keeps"][1:]
        part = Part(
            0, list(addresses), codes, [], [], [], bytearray(), [], 0, piece["numel"], piece["first"], piece["columns"],
            extra=_tests(score, keeps),
        )  # fmt: skip
        if score and score[0] == "divergence":
            factors_of(score, part)
        part.groups = 0  # place of the first answer
        chunks, together = -(-part.count // CHUNK), 16 if room.on_host else 1
        found, counted = room.zeros("float64", chunks, 3 * n), room.zeros("int32", chunks, 2 * n)
        table = Table([part], [-(-chunks // together)])
        for first in range(0, n - 1, OWN):
            room.launch(
                kept_kernel, table.tiles, *table.on(room), found, counted, 1,
                N=n, DT=codes, WIDE=0 in codes, OWN=tuple(range(first, min(first + OWN, n - 1))),
                RANDOM=tuple(map(is_random, keeps)), SCORE=score_of(score), L1=piece["l1"], SQUARES=piece["squares"],
                ALIGN=alignment(addresses, codes, part.count), TILES=together, STEPS=table.steps, warps=2,
            )  # fmt: skip
        answers.append(answer_of(room, found[None], counted[None]))
    return answers
