"""Shared by the methods that drop elements of deltas: the masks, the rescaling, and the election of signs.

All tuples have one entry per model, the base left out. A mask of None: the model adds nothing, and is not ranked.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

from fastinterp.errors import MethodError
from fastinterp.methods._weights import level, shares
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import ALL_BITS, Mask, MaskedCombine, MeasureMasked, Request, Select, Selected, Sum

Preset = Literal["mergekit", "paper", "peft"]
Masks = tuple[Mask | None, ...]
Band = tuple[int, int] | None  # the first and the last rank that stay, 1 for the largest magnitude; None: none stays
LEAST_L1 = 1e-7  # of mergekit: below it, nothing is rescaled
LEAST_ENERGY = 1e-6  # of mergekit: below it, models count alike


def element_count(density: float, size: int) -> int:
    """How many of `size` elements a density keeps: its floor, but at least one, and none for 0."""
    return min(size, max(1, math.floor(density * size))) if density > 0.0 else 0


def ranked(bands: Sequence[Band], size: int, whole: bool = False) -> Generator[Request, tuple[Selected, ...], Masks]:
    """The masks that leave these ranks, and all elements that equal the ends.

    size   the number of elements that are ranked: of the tensor, or with `whole` of the model
    """
    needed = ((i, k) for i, band in enumerate(bands, 1) if band for k, end in zip(band, (1, size), strict=True)
              if k != end)  # fmt: skip
    ranks = tuple(dict.fromkeys(needed))
    answer = (yield Select(ranks, whole=whole)) if ranks else ()
    bits = {rank: selected.min_bits for rank, selected in zip(ranks, answer, strict=True)}
    return tuple(
        Mask(
            min_bits=bits[i, band[1]] if band[1] < size else 0,
            max_bits=bits[i, band[0]] if band[0] > 1 else ALL_BITS,
        )
        if band
        else None
        for i, band in enumerate(bands, 1)
    )


def middle(
    tensor: Tensor, weight: Sequence[float], density: Sequence[float], gamma: Sequence[float]
) -> Generator[Request, tuple[Selected, ...], Masks]:
    """Masks of these densities that leave out the fraction gamma of the largest, and for the rest the smallest.

    A model whose weight is 0 adds nothing.
    """
    size, bands = tensor.numel, []
    for w, p, top in zip(weight, density, gamma, strict=True):
        count = element_count(p, size) if w else 0
        first = min(math.floor(top * size), size - count) + 1
        bands.append((first, first + count - 1) if count else None)
    return (yield from ranked(bands, size))


def by_rank(weight: Sequence[float], density: Sequence[float], epsilon: Sequence[float]) -> Masks:
    """Random masks whose probability grows with the rank in the row, from density - epsilon to density + epsilon.

    Raises: MethodError, if one of these is not between 0 and 1, for a density other than 0 and 1.
    """
    for p, e in zip(density, epsilon, strict=True):
        if 0.0 < p < 1.0 and not (p - e > 0.0 and p + e < 1.0):
            raise MethodError(
                f"`density` {p:g} with `epsilon` {e:g} gives probabilities from {p - e:g} to {p + e:g}, and they must "
                f"lie between 0 and 1. Use an `epsilon` below {min(p, 1.0 - p):g}"
            )
    return at_random(weight, density, epsilon)


def at_random(weight: Sequence[float], density: Sequence[float], rank_slope: Sequence[float] | None = None) -> Masks:
    """Random masks of these densities. Density 1 keeps all, whatever its slope; 0, or a weight of 0, adds nothing."""
    slopes = rank_slope or (0.0,) * len(density)
    return tuple(
        None if p == 0.0 or w == 0.0 else Mask() if p == 1.0 else Mask(probability=p, rank_slope=e)
        for w, p, e in zip(weight, density, slopes, strict=True)
    )


def dare_scales(
    tensor: Tensor, masks: Masks, rescale: bool, preset: Preset
) -> Generator[Request, Any, tuple[float, ...]]:
    """The factors that rescale what stays: the ratio of the L1 norms, or outside preset mergekit 1/density."""
    if rescale and preset != "mergekit":
        return tuple(1.0 / mask.probability if mask else 1.0 for mask in masks)
    return (yield from l1_ratios(tensor, masks, rescale))


def l1_ratios(tensor: Tensor, masks: Masks, rescale: bool) -> Generator[Request, Any, tuple[float, ...]]:
    """sum |d| / sum |d that stay|; 1 where all stay, without `rescale`, or if either sum is below 1e-7.

    Raises: MethodError, if a sum is not finite: the quotient would spoil the whole tensor.
    """
    if not rescale or all(mask is None or mask.keeps_all for mask in masks):
        return (1.0,) * len(masks)
    partial = (Mask(), *(None if mask is None or mask.keeps_all else mask for mask in masks))
    stats = yield MeasureMasked(partial, squares=False)
    ratios = []
    for i, mask in enumerate(partial[1:], 1):
        before, after = stats.l1[i], stats.masked_l1[i]
        if mask is not None and not math.isfinite(before):
            raise MethodError(
                f"{tensor.name} of model {i} (the base is 0) differs from the base by NaN or Inf, so what is dropped "
                "cannot be made up for. Repair or leave out that model, or write `rescale: false`"
            )
        ratios.append(before / after if before >= LEAST_L1 and after >= LEAST_L1 else 1.0)
    return tuple(ratios)


def energies(tensor: Tensor, squares: Sequence[float]) -> tuple[float, ...]:
    """Weights of sum 1 in proportion to sums of squares over the tensor; equal, if their mean adds to < 1e-6.

    Raises: MethodError, if a sum is not finite.
    """
    for i, square in enumerate(squares, 1):
        if not math.isfinite(square):
            raise MethodError(
                f"{tensor.name} of model {i} (the base is 0) differs from the base by NaN or Inf, or numbers beyond "
                "1e150, so that model has no weight. Repair it, or leave it out"
            )
    total = math.fsum(squares)
    if total / tensor.numel < LEAST_ENERGY:
        return (1.0 / len(squares),) * len(squares)
    return tuple(square / total for square in squares)


def summed(weight: Sequence[float], masks: Masks, scales: tuple[float, ...], lambda_: float) -> Sum:
    """x0 + lambda * sum_i w_i*s_i*d_i over what stays."""
    weights = _times(weight, masks, scales, lambda_)
    if all(mask is None or mask.keeps_all for mask in masks) or not any(weights):
        return Combine(weights, base=0)
    return MaskedCombine(weights, masks=_with_base(masks))


def elected(
    weight: tuple[float, ...],
    masks: Masks,
    scales: tuple[float, ...],
    *,
    normalize: bool,
    lambda_: float,
    count: bool = False,
) -> Sum:
    """x0 + lambda * sum_i w_i*s_i*d_i over what stays and has the elected sign; under `normalize`, divided by sum_i w_i
    over the same, a sum of 0 counting as 1.

    count  signs are elected by s_i*d_i instead of w_i*s_i*d_i, and the divisor is the number of models that agree
    """
    present = [i for i, mask in enumerate(masks) if mask is not None]
    if len(present) == 1:  # one model elects its own sign, and its weight divides itself
        weights_of_one = (1.0,) * len(masks) if normalize and not count else weight
        return summed(weights_of_one, masks, scales, lambda_)
    sign_weights = (1.0,) * len(masks) if count else level(weight)
    weights = _times(sign_weights if normalize and not count else weight, masks, scales, lambda_)
    if not any(weights):
        return Combine(weights, base=0)
    ones = (1.0,) * len(masks)
    return MaskedCombine(
        weights,
        masks=_with_base(masks),
        sign_weights=_times(sign_weights, masks, scales, 1.0),
        shares=_times(sign_weights, masks, ones, 1.0) if normalize else None,
        least_share=0.0 if count else _rounding_of_sums(sign_weights),
    )


def refuse_cancelling(weight: Sequence[float]) -> None:
    """Called before the first request of a method that divides by sums of weights: an error shows before data is read.

    Raises: MethodError, if the weights of all models cancel. All 0 is allowed: nothing is added then.
    """
    if any(weight):
        shares(weight)


def _times(weight: Sequence[float], masks: Masks, scales: Sequence[float], factor: float) -> tuple[float, ...]:
    """The products, after the 0 of the base; 0 for models that add nothing."""
    terms = zip(weight, masks, scales, strict=True)
    return (0.0, *(0.0 if mask is None else factor * w * scale for w, mask, scale in terms))


def _with_base(masks: Masks) -> tuple[Mask, ...] | None:
    """The masks of all inputs, the base first; None, if they mask everything."""
    all_masks = (Mask(), *(mask or Mask() for mask in masks))
    return None if all(mask.keeps_all for mask in all_masks) else all_masks


def _rounding_of_sums(weight: Sequence[float]) -> float:
    """The largest float32 sum that may be only the rounding error of weights that cancel: such a sum counts as 0.

    0 if all weights have one sign; never so large that a single weight would count as 0.
    """
    used = [w for w in weight if w != 0.0]
    if not used or min(used) > 0.0 or max(used) < 0.0:
        return 0.0
    return min(len(used) * 2.0**-24 * math.fsum(map(abs, used)), 0.5 * min(map(abs, used)))
