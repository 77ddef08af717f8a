"""Masked sums and masked statistics as steps: the inputs that are read, the tests of masks, the random keys. No I/O.

Backends and the reference both start from here: rules 10, 13 and 14 of docs/NUMERICS.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastinterp.ops import steps
from fastinterp.ops.combine import philox_key
from fastinterp.ops.requests import ALL_BITS, Mask, MaskedCombine, MeasuredMasked, MeasureMasked, Score
from fastinterp.ops.steps import WORDS, MaskedOutput, MaskedTerm, MaskPlace, MaskTest

# Masks that masked statistics fill, by input, mask and seed.
Precomputed = Mapping[tuple[int, Mask, int], MaskPlace]
NOTHING = Mask(min_bits=ALL_BITS + 1)  # no magnitude is as large


def word_limits(mask: Mask) -> tuple[int, int]:
    """Limits of the random number, 0..2**32, for the smallest and for the largest magnitude of a row."""

    def limit(probability: float) -> int:
        return min(max(round(probability * WORDS), 0), WORDS)

    return limit(mask.probability - mask.rank_slope), limit(mask.probability + mask.rank_slope)


def terms(combine: MaskedCombine) -> list[tuple[int, Mask]]:
    """The inputs, beside the base, that a masked sum reads, in order, each with its mask.

    One whose weight, sign weight, share and sole weight are all 0 is not read, unless it counts in the score: then it
    is read, with a mask that nothing passes. With an importance, the base is among the terms if it has a weight.
    Inputs that are only the importance of others are not listed. Empty: the sum is a copy of input 0.
    """
    _check(combine)
    tuples = [t for t in (combine.weights, combine.sign_weights, combine.shares, combine.sole_weights) if t is not None]
    scored = 0 if combine.score is None else len(combine.weights) if combine.score.kind == "variance" else 2
    used = [i for i in range(0 if combine.importance else 1, len(combine.weights)) if any(t[i] != 0.0 for t in tuples)]
    if not used:
        return []
    masks = dict.fromkeys(range(1, scored), NOTHING) | {i: combine.masks[i] if combine.masks else Mask() for i in used}
    return sorted(masks.items())


def read_inputs(combine: MaskedCombine) -> list[int]:
    """Every input that a masked sum reads, in ascending order: input 0, the terms, and their importances."""
    used = [i for i, _ in terms(combine)]
    return sorted({0, *used, *(combine.importance[i] for i in used if combine.importance)})


def _check(combine: MaskedCombine) -> None:
    n = len(combine.weights)
    for name in ("masks", "sign_weights", "shares", "sole_weights", "importance"):
        values = getattr(combine, name)
        if values is not None and len(values) != n:
            raise ValueError(f"{name} has {len(values)} entries for {n} weights")
    if combine.importance is None and combine.weights[0] != 0.0:
        raise ValueError("the base carries no weight")
    others = (combine.masks, combine.sign_weights, combine.shares, combine.sole_weights, combine.score)
    if combine.importance is not None and any(other is not None for other in others):
        raise ValueError("importance goes with neither masks, sign_weights, shares, sole_weights nor a score")
    if any(mask.rank_slope < 0.0 for mask in combine.masks or ()):
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
    combine: MaskedCombine, *, name: str, seed: int, inputs: Sequence[int], precomputed: Precomputed | None = None
) -> MaskedOutput:
    """One output of a MaskedSum.

    name, seed   of the output tensor and of the recipe, for random masks
    inputs       the inputs that the step reads, in its order: `read_inputs`, of one output or of several together
    precomputed  masks of this tensor's deltas that masked statistics have computed: not used if there is a limit, which
                 changes the deltas

    Raises: ValueError, if there is nothing to add to input 0: that is a copy.
    """
    at = {i: k for k, i in enumerate(inputs)}
    precomputed = precomputed if precomputed and combine.limit == math.inf else {}
    masked_terms = tuple(
        MaskedTerm(
            input=at[i],
            weight=combine.weights[i],
            sign_weight=combine.sign_weights[i] if combine.sign_weights else 0.0,
            share=combine.shares[i] if combine.shares else 0.0,
            sole_weight=combine.sole_weights[i] if combine.sole_weights else 0.0,
            importance=at[combine.importance[i]] if combine.importance else -1,
            test=mask_test(mask, mask_key(mask, i, name=name, seed=seed)),
            precomputed_mask=precomputed.get((i, mask, seed)),
        )
        for i, mask in terms(combine)
    )
    if not masked_terms:
        raise ValueError("a masked sum without a term is a copy of its base")
    return MaskedOutput(
        base=at[0],
        terms=masked_terms,
        elects_signs=combine.sign_weights is not None,
        divides=combine.shares is not None,
        has_sole_weights=combine.sole_weights is not None,
        least_share=combine.least_share,
        other_share=combine.other_share,
        limit=combine.limit,
        score=score_of(combine.score),
    )


def measured_inputs(request: MeasureMasked) -> list[int]:
    """Every input that the request reads, in ascending order.

    Raises: ValueError, if it has a score and an input has no mask.
    """
    if request.score is not None and None in request.masks[1:]:
        raise ValueError("with a score every model needs a mask: all of them are read")
    return [0, *(i for i, mask in enumerate(request.masks) if i and mask is not None)]


def mask_tests(request: MeasureMasked, *, name: str, seed: int) -> tuple[MaskTest, ...]:
    """The tests of a MaskedStats step, which reads `measured_inputs`."""
    masks = [(i, request.masks[i] or Mask()) for i in measured_inputs(request)]
    return tuple(mask_test(mask, mask_key(mask, i, name=name, seed=seed)) for i, mask in masks)


def filled_masks(request: MeasureMasked) -> dict[int, int]:
    """Per input that is read, the index of the mask that a MaskedStats step fills, -1 for none.

    Random masks are filled, since they cost most to compute again. With a score none is: a score is no part of a mask.
    """
    indices, count = {}, 0
    for i in measured_inputs(request):
        mask = request.masks[i]
        fills = i > 0 and mask is not None and mask.is_random and request.score is None
        indices[i] = count if fills else -1
        count += fills
    return indices


def measured_masked(request: MeasureMasked, reals: Sequence[float], counts: Sequence[int]) -> MeasuredMasked:
    """The answer to the request from that of a MaskedStats step."""
    read = measured_inputs(request)
    n, at = len(read), {i: k for k, i in enumerate(read)}

    def per_input(values: Sequence[Any], zero: Any) -> tuple[Any, ...]:
        return tuple(values[at[i]] if i in at else zero for i in range(len(request.masks)))

    l1, masked_l1, squares = (per_input(reals[k * n : (k + 1) * n], 0.0) for k in range(3))
    return MeasuredMasked(l1, masked_l1, per_input(counts[:n], 0), per_input(counts[n:], 0), squares)


def score_of(score: Score | None) -> steps.Score | None:
    """A score for a step."""
    if score is None:
        return None
    return steps.Score(score.kind, score.min_bits, score.factors)
