"""Sums with masks, and what keeps leave, as launches of Triton kernels."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.backends.device import Piece
from fastinterp.backends.triton.effects import Effects, Written
from fastinterp.backends.triton.histogram import factors_of, score_of
from fastinterp.backends.triton.launch import CHUNK, Answer, Room, alignment, signed
from fastinterp.backends.triton.measure import answer_of, fetched
from fastinterp.backends.triton.tables import Part, Table, aligned, tiles_of

WORDS = 1 << 32  # a random limit that draws nothing
DRAWN = 3  # random keeps that a thread holds in registers for 4 or 8 elements; of more keeps, it does half as many
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
    block = room.tile(1024, 8192)
    warps = 4 if sum(random) <= DRAWN else 8
    for align, some in aligned(parts, out).items():
        table = Table(some, tiles_of(some, block))
        room.launch(
            masked_kernel, table.tiles, *table.on(room), flags, len(some),
            **named, STOCHASTIC=stochastic, TELL=every > 0, ALIGN=align, BLOCK=block, STEPS=table.steps, warps=warps,
        )  # fmt: skip
    if every > 0:
        effects = Effects(
            room, masked_effect_kernel, parts, named, every=every, measured=True, flags=flags, warps=warps
        )
        for i in dict.fromkeys(part.piece for part in parts):
            found[i].effects.append(effects)


# --- what keeps leave ------------------------------------------------------------------------------------------------


def kept(room: Room, pieces: Sequence[Piece]) -> list[Answer]:
    """L1 norms, squares and counts of what keeps leave of deltas."""
    same: dict[tuple[Any, ...], list[int]] = {}
    for i, piece in enumerate(pieces):
        kind = (
            tuple(code for _, code in piece["inputs"]), tuple(map(is_random, piece["keeps"][1:])),
            score_of(piece["score"]), piece["l1"], piece["squares"],
        )  # fmt: skip
        same.setdefault(kind, []).append(i)
    answers: list[Answer | None] = [None] * len(pieces)
    for kind, places in same.items():
        for i, answer in zip(places, _kept(room, [pieces[i] for i in places], *kind), strict=True):
            answers[i] = answer
    return [answer for answer in answers if answer is not None]


def _kept(
    room: Room, pieces: Sequence[Piece], codes: tuple[int, ...], random: tuple[bool, ...], score: int, l1: bool,
    squares: bool,
) -> list[Answer]:  # fmt: skip
    """Of pieces that are alike."""
    from fastinterp._triton.kept import kept_kernel

    n, together = len(codes), room.tile(1, 16)
    warps = 2 if n <= 4 and sum(random) < DRAWN else 4
    shapes: list[tuple[int, int]] = []
    places = 0
    alike: dict[int, list[tuple[Part, int]]] = {}
    for piece in pieces:
        part = _left(piece, codes)
        part.groups = places  # of its first answer
        chunks = -(-part.count // CHUNK)
        alike.setdefault(alignment(part.addresses, codes, part.count), []).append((part, -(-chunks // together)))
        shapes.append((places, places + chunks))
        places += chunks
    found, counted = room.zeros("float64", places, 3 * n), room.zeros("int32", places, 2 * n)
    for align, some in alike.items():
        table = Table([part for part, _ in some], [tiles for _, tiles in some])
        told = table.on(room)
        for first in range(0, n - 1, OWN):
            room.launch(
                kept_kernel, table.tiles, *told, found, counted, len(some),
                N=n, DT=codes, WIDE=0 in codes, OWN=tuple(range(first, min(first + OWN, n - 1))), RANDOM=random,
                SCORE=score, L1=l1, SQUARES=squares, ALIGN=align, TILES=together, STEPS=table.steps, warps=warps,
            )  # fmt: skip
    found, counted = fetched(room, found, counted)
    return [answer_of(room, found[None, begin:end], counted[None, begin:end]) for begin, end in shapes]


def _left(piece: Piece, codes: tuple[int, ...]) -> Part:
    addresses = [address for address, _ in piece["inputs"]]
    part = Part(
        0, addresses, codes, [], [], [], bytearray(), [], 0, piece["numel"], piece["first"], piece["columns"],
        extra=_tests(piece["score"], piece["keeps"][1:]),
    )  # fmt: skip
    if piece["score"] and piece["score"][0] == "divergence":
        factors_of(piece["score"], part)
    return part
