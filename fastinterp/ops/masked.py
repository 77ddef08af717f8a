"""What a masked sum comes to on the host, before any element is touched: who is read, who may take part, which keys.

Backends and the reference both start from here: rules 10, 13 and 14 of docs/NUMERICS.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from fastinterp.ops import steps
from fastinterp.ops.combine import philox_key
from fastinterp.ops.requests import ALL_BITS, Keep, Kept, MaskedCombine, MeasureKept, Score
from fastinterp.ops.steps import WORDS, MaskedOutput, MaskedTerm, MaskPlace, MaskTest

# Masks that masked statistics fill, by input, keep and seed.
Precomputed = Mapping[tuple[int, Keep, int], MaskPlace]
NOTHING = Keep(least=ALL_BITS + 1)  # no magnitude is as large


def word_limits(keep: Keep) -> tuple[int, int]:
    """Limits of the random number, 0..2**32, for the smallest and for the largest magnitude of a row."""

    def limit(chance: float) -> int:
        return min(max(round(chance * WORDS), 0), WORDS)

    return limit(keep.chance - keep.spread), limit(keep.chance + keep.spread)


def terms(ask: MaskedCombine) -> list[tuple[int, Keep]]:
    """The inputs, beside the base, that a masked sum reads, in order, each with its keep.

    One of weight, vote, share and alone all 0 is not read, unless it counts in the score: then it is read, and nothing
    of it is kept. With an importance, the base is among the terms if it has a weight. Inputs that are only the
    importance of others are not listed. Empty: the sum is a copy of input 0.
    """
    _check(ask)
    tuples = [t for t in (ask.weights, ask.votes, ask.shares, ask.alone) if t is not None]
    scored = 0 if ask.score is None else len(ask.weights) if ask.score.kind == "spread" else 2
    used = [i for i in range(0 if ask.importance else 1, len(ask.weights)) if any(t[i] != 0.0 for t in tuples)]
    if not used:
        return []
    keeps = dict.fromkeys(range(1, scored), NOTHING) | {i: ask.keeps[i] if ask.keeps else Keep() for i in used}
    return sorted(keeps.items())


def read_inputs(ask: MaskedCombine) -> list[int]:
    """Every input that a masked sum reads, in ascending order: input 0, the terms, and their importances."""
    used = [i for i, _ in terms(ask)]
    return sorted({0, *used, *(ask.importance[i] for i in used if ask.importance)})


def _check(ask: MaskedCombine) -> None:
    n = len(ask.weights)
    for name in ("keeps", "votes", "shares", "alone", "importance"):
        given = getattr(ask, name)
        if given is not None and len(given) != n:
            raise ValueError(f"{name} has {len(given)} entries for {n} weights")
    if ask.importance is None and ask.weights[0] != 0.0:
        raise ValueError("the base carries no weight of its own")
    others = (ask.keeps, ask.votes, ask.shares, ask.alone, ask.score)
    if ask.importance is not None and any(given is not None for given in others):
        raise ValueError("importance goes with neither keeps, votes, shares, alone nor a score")
    if any(keep.spread < 0.0 for keep in ask.keeps or ()):
        raise ValueError("the spread of a keep must not be negative")


# --- as steps have it ------------------------------------------------------------------------------------------------


def mask_test(keep: Keep, key: int) -> MaskTest:
    """A keep for a step; `key` is that of the input's random numbers."""
    low, high = word_limits(keep)
    return MaskTest(keep.least, keep.most, low, high, key)


def keep_key(keep: Keep, i: int, *, name: str, seed: int) -> int:
    """The Philox key of input i's random numbers; 0 if none are drawn."""
    return philox_key(seed, 1 + i, name) if keep.is_random else 0


def masked_output(
    ask: MaskedCombine, *, name: str, seed: int, inputs: Sequence[int], precomputed: Precomputed | None = None
) -> MaskedOutput:
    """One output of a MaskedSum.

    name, seed   of the output tensor and of the recipe, for random keeps
    inputs       the inputs that the step reads, in its order: `read_inputs`, of one output or of several together
    precomputed  what keeps leave of this tensor's deltas, where masked statistics have found it: not used if there is a
                 limit, which changes the deltas

    Raises: ValueError, if there is nothing to add to input 0: that is a copy.
    """
    at = {i: k for k, i in enumerate(inputs)}
    precomputed = precomputed if precomputed and ask.limit == math.inf else {}
    found = tuple(
        MaskedTerm(
            input=at[i],
            weight=ask.weights[i],
            sign_weight=ask.votes[i] if ask.votes else 0.0,
            share=ask.shares[i] if ask.shares else 0.0,
            sole_weight=ask.alone[i] if ask.alone else 0.0,
            importance=at[ask.importance[i]] if ask.importance else -1,
            test=mask_test(keep, keep_key(keep, i, name=name, seed=seed)),
            precomputed_mask=precomputed.get((i, keep, seed)),
        )
        for i, keep in terms(ask)
    )
    if not found:
        raise ValueError("a masked sum without a term is a copy of its base")
    return MaskedOutput(
        base=at[0],
        terms=found,
        elects_signs=ask.votes is not None,
        divides=ask.shares is not None,
        has_sole_weights=ask.alone is not None,
        least_share=ask.least_share,
        other_share=ask.other_share,
        limit=ask.limit,
        score=score_of(ask.score),
    )


def kept_inputs(ask: MeasureKept) -> list[int]:
    """Every input that is read for it, in ascending order."""
    if ask.score is not None and None in ask.keeps[1:]:
        raise ValueError("with a score every model needs a keep: all of them are read")
    return [0, *(i for i, keep in enumerate(ask.keeps) if i and keep is not None)]


def kept_tests(ask: MeasureKept, *, name: str, seed: int) -> tuple[MaskTest, ...]:
    """The tests of a MaskedStats step, which reads `kept_inputs`."""
    found = [(i, ask.keeps[i] or Keep()) for i in kept_inputs(ask)]
    return tuple(mask_test(keep, keep_key(keep, i, name=name, seed=seed)) for i, keep in found)


def filled_masks(ask: MeasureKept) -> dict[int, int]:
    """Per input that is read, which mask such a step is to fill with what is kept of it, -1 for none: those that cost
    most to find again. With a score there are none, since that is no part of a keep."""
    found, count = {}, 0
    for i in kept_inputs(ask):
        keep = ask.keeps[i]
        fills = i > 0 and keep is not None and keep.is_random and ask.score is None
        found[i] = count if fills else -1
        count += fills
    return found


def kept_of(ask: MeasureKept, reals: Sequence[float], counts: Sequence[int]) -> Kept:
    """The answer to `ask` from that of such a step."""
    read = kept_inputs(ask)
    n, at = len(read), {i: k for k, i in enumerate(read)}

    def spread(found: Sequence[Any], zero: Any) -> tuple[Any, ...]:
        return tuple(found[at[i]] if i in at else zero for i in range(len(ask.keeps)))

    l1, kept_l1, squares = (spread(reals[k * n : (k + 1) * n], 0.0) for k in range(3))
    return Kept(l1, kept_l1, spread(counts[:n], 0), spread(counts[n:], 0), squares)


def score_of(score: Score | None) -> steps.Score | None:
    """A score for a step."""
    if score is None:
        return None
    kind: Literal["variance", "divergence"] = "variance" if score.kind == "spread" else "divergence"
    return steps.Score(kind, score.least, score.factors)
