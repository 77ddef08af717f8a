"""What a masked sum comes to on the host, before any element is touched: who is read, who may take part, which keys.

Backends and the reference both start from here: rules 10, 13 and 14 of docs/NUMERICS.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.ops import steps
from fastinterp.ops.combine import philox_key
from fastinterp.ops.requests import ALL_BITS, Kept, Mask, MaskedCombine, MeasureKept, Score
from fastinterp.ops.steps import WORDS, MaskedOutput, MaskedTerm, MaskPlace, MaskTest

# Masks that masked statistics fill, by input, mask and seed.
Precomputed = Mapping[tuple[int, Mask, int], MaskPlace]
NOTHING = Mask(min_bits=ALL_BITS + 1)  # no magnitude is as large


def word_limits(mask: Mask) -> tuple[int, int]:
    """Limits of the random number, 0..2**32, for the smallest and for the largest magnitude of a row."""

    def limit(chance: float) -> int:
        return min(max(round(chance * WORDS), 0), WORDS)

    return limit(mask.probability - mask.rank_slope), limit(mask.probability + mask.rank_slope)


def terms(ask: MaskedCombine) -> list[tuple[int, Mask]]:
    """The inputs, beside the base, that a masked sum reads, in order, each with its mask.

    One whose weight, sign weight, share and sole weight are all 0 is not read, unless it counts in the score: then it
    is read, and nothing of it is kept. With an importance, the base is among the terms if it has a weight. Inputs that
    are only the importance of others are not listed. Empty: the sum is a copy of input 0.
    """
    _check(ask)
    tuples = [t for t in (ask.weights, ask.sign_weights, ask.shares, ask.sole_weights) if t is not None]
    scored = 0 if ask.score is None else len(ask.weights) if ask.score.kind == "variance" else 2
    used = [i for i in range(0 if ask.importance else 1, len(ask.weights)) if any(t[i] != 0.0 for t in tuples)]
    if not used:
        return []
    masks = dict.fromkeys(range(1, scored), NOTHING) | {i: ask.masks[i] if ask.masks else Mask() for i in used}
    return sorted(masks.items())


def read_inputs(ask: MaskedCombine) -> list[int]:
    """Every input that a masked sum reads, in ascending order: input 0, the terms, and their importances."""
    used = [i for i, _ in terms(ask)]
    return sorted({0, *used, *(ask.importance[i] for i in used if ask.importance)})


def _check(ask: MaskedCombine) -> None:
    n = len(ask.weights)
    for name in ("masks", "sign_weights", "shares", "sole_weights", "importance"):
        given = getattr(ask, name)
        if given is not None and len(given) != n:
            raise ValueError(f"{name} has {len(given)} entries for {n} weights")
    if ask.importance is None and ask.weights[0] != 0.0:
        raise ValueError("the base carries no weight of its own")
    others = (ask.masks, ask.sign_weights, ask.shares, ask.sole_weights, ask.score)
    if ask.importance is not None and any(given is not None for given in others):
        raise ValueError("importance goes with neither masks, sign_weights, shares, sole_weights nor a score")
    if any(mask.rank_slope < 0.0 for mask in ask.masks or ()):
        raise ValueError("the rank_slope of a mask must not be negative")


# --- as steps have it ------------------------------------------------------------------------------------------------


def mask_test(mask: Mask, key: int) -> MaskTest:
    """A mask for a step; `key` is that of the input's random numbers."""
    low, high = word_limits(mask)
    return MaskTest(mask.min_bits, mask.max_bits, low, high, key)


def mask_key(mask: Mask, i: int, *, name: str, seed: int) -> int:
    """The Philox key of input i's random numbers; 0 if none are drawn."""
    return philox_key(seed, 1 + i, name) if mask.is_random else 0


def masked_output(
    ask: MaskedCombine, *, name: str, seed: int, inputs: Sequence[int], precomputed: Precomputed | None = None
) -> MaskedOutput:
    """One output of a MaskedSum.

    name, seed   of the output tensor and of the recipe, for random masks
    inputs       the inputs that the step reads, in its order: `read_inputs`, of one output or of several together
    precomputed  what masks leave of this tensor's deltas, where masked statistics have found it: not used if there is a
                 limit, which changes the deltas

    Raises: ValueError, if there is nothing to add to input 0: that is a copy.
    """
    at = {i: k for k, i in enumerate(inputs)}
    precomputed = precomputed if precomputed and ask.limit == math.inf else {}
    found = tuple(
        MaskedTerm(
            input=at[i],
            weight=ask.weights[i],
            sign_weight=ask.sign_weights[i] if ask.sign_weights else 0.0,
            share=ask.shares[i] if ask.shares else 0.0,
            sole_weight=ask.sole_weights[i] if ask.sole_weights else 0.0,
            importance=at[ask.importance[i]] if ask.importance else -1,
            test=mask_test(mask, mask_key(mask, i, name=name, seed=seed)),
            precomputed_mask=precomputed.get((i, mask, seed)),
        )
        for i, mask in terms(ask)
    )
    if not found:
        raise ValueError("a masked sum without a term is a copy of its base")
    return MaskedOutput(
        base=at[0],
        terms=found,
        elects_signs=ask.sign_weights is not None,
        divides=ask.shares is not None,
        has_sole_weights=ask.sole_weights is not None,
        least_share=ask.least_share,
        other_share=ask.other_share,
        limit=ask.limit,
        score=score_of(ask.score),
    )


def kept_inputs(ask: MeasureKept) -> list[int]:
    """Every input that is read for it, in ascending order."""
    if ask.score is not None and None in ask.masks[1:]:
        raise ValueError("with a score every model needs a mask: all of them are read")
    return [0, *(i for i, mask in enumerate(ask.masks) if i and mask is not None)]


def kept_tests(ask: MeasureKept, *, name: str, seed: int) -> tuple[MaskTest, ...]:
    """The tests of a MaskedStats step, which reads `kept_inputs`."""
    found = [(i, ask.masks[i] or Mask()) for i in kept_inputs(ask)]
    return tuple(mask_test(mask, mask_key(mask, i, name=name, seed=seed)) for i, mask in found)


def filled_masks(ask: MeasureKept) -> dict[int, int]:
    """Per input that is read, which mask such a step is to fill with what is kept of it, -1 for none: those that cost
    most to find again. With a score there are none, since that is no part of a mask."""
    found, count = {}, 0
    for i in kept_inputs(ask):
        mask = ask.masks[i]
        fills = i > 0 and mask is not None and mask.is_random and ask.score is None
        found[i] = count if fills else -1
        count += fills
    return found


def kept_of(ask: MeasureKept, reals: Sequence[float], counts: Sequence[int]) -> Kept:
    """The answer to `ask` from that of such a step."""
    read = kept_inputs(ask)
    n, at = len(read), {i: k for k, i in enumerate(read)}

    def spread(found: Sequence[Any], zero: Any) -> tuple[Any, ...]:
        return tuple(found[at[i]] if i in at else zero for i in range(len(ask.masks)))

    l1, kept_l1, squares = (spread(reals[k * n : (k + 1) * n], 0.0) for k in range(3))
    return Kept(l1, kept_l1, spread(counts[:n], 0), spread(counts[n:], 0), squares)


def score_of(score: Score | None) -> steps.Score | None:
    """A score for a step."""
    if score is None:
        return None
    return steps.Score(score.kind, score.min_bits, score.factors)
