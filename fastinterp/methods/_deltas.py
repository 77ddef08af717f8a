"""What the methods that thin out deltas share: which elements stay, what makes up for the rest, and who outvotes whom.

All tuples have one entry per model, the base left out. A keep of None: the model adds nothing, and is not ranked.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

from fastinterp.errors import MethodError
from fastinterp.methods._weights import level, shares
from fastinterp.ops.combine import Combine, Tensor
from fastinterp.ops.requests import ALL_BITS, Keep, MaskedCombine, MeasureKept, Request, Select, Selected, Sum

Preset = Literal["mergekit", "paper", "peft"]
Keeps = tuple[Keep | None, ...]
Band = tuple[int, int] | None  # the first and the last rank that stay, 1 for the largest magnitude; None: none stays
LEAST_L1 = 1e-7  # of mergekit: below it, nothing is rescaled
LEAST_ENERGY = 1e-6  # of mergekit: below it, models count alike


def number_kept(density: float, size: int) -> int:
    """How many of `size` elements a density keeps: its floor, but at least one, and none for 0."""
    return min(size, max(1, math.floor(density * size))) if density > 0.0 else 0


def ranked(bands: Sequence[Band], size: int, whole: bool = False) -> Generator[Request, tuple[Selected, ...], Keeps]:
    """The keeps that leave these ranks, and all elements that equal the ends.

    size   the number of elements that are ranked: of the tensor, or with `whole` of the model
    """
    wanted = ((i, k) for i, band in enumerate(bands, 1) if band for k, end in zip(band, (1, size), strict=True)
              if k != end)  # fmt: skip
    ranks = tuple(dict.fromkeys(wanted))
    answer = (yield Select(ranks, whole=whole)) if ranks else ()
    bits = {rank: found.least for rank, found in zip(ranks, answer, strict=True)}
    return tuple(
        Keep(
            least=bits[i, band[1]] if band[1] < size else 0,
            most=bits[i, band[0]] if band[0] > 1 else ALL_BITS,
        )
        if band
        else None
        for i, band in enumerate(bands, 1)
    )


def middle(
    tensor: Tensor, weight: Sequence[float], density: Sequence[float], gamma: Sequence[float]
) -> Generator[Request, tuple[Selected, ...], Keeps]:
    """Keeps of these densities that leave out the fraction gamma of the largest, and for the rest the smallest.

    A model whose weight is 0 adds nothing.
    """
    size, bands = tensor.numel, []
    for w, p, top in zip(weight, density, gamma, strict=True):
        count = number_kept(p, size) if w else 0
        first = min(math.floor(top * size), size - count) + 1
        bands.append((first, first + count - 1) if count else None)
    return (yield from ranked(bands, size))


def by_rank(weight: Sequence[float], density: Sequence[float], epsilon: Sequence[float]) -> Keeps:
    """Random keeps whose chance grows with the rank in the row, from density - epsilon to density + epsilon.

    Raises: MethodError, if one of these is not between 0 and 1, for a density other than 0 and 1.
    """
    for p, e in zip(density, epsilon, strict=True):
        if 0.0 < p < 1.0 and not (p - e > 0.0 and p + e < 1.0):
            raise MethodError(
                f"`density` {p:g} with `epsilon` {e:g} gives probabilities from {p - e:g} to {p + e:g}, and they must "
                f"lie between 0 and 1. Use an `epsilon` below {min(p, 1.0 - p):g}"
            )
    return at_random(weight, density, epsilon)


def at_random(weight: Sequence[float], density: Sequence[float], spread: Sequence[float] | None = None) -> Keeps:
    """Random keeps of these densities. Density 1 keeps all, whatever its spread; 0, or a weight of 0, adds nothing."""
    spreads = spread or (0.0,) * len(density)
    return tuple(
        None if p == 0.0 or w == 0.0 else Keep() if p == 1.0 else Keep(chance=p, spread=e)
        for w, p, e in zip(weight, density, spreads, strict=True)
    )


def dare_scales(
    tensor: Tensor, keeps: Keeps, rescale: bool, preset: Preset
) -> Generator[Request, Any, tuple[float, ...]]:
    """What makes up for dropped elements: the ratio of the L1 norms, or outside mergekit 1/density."""
    if rescale and preset != "mergekit":
        return tuple(1.0 / keep.chance if keep else 1.0 for keep in keeps)
    return (yield from l1_ratios(tensor, keeps, rescale))


def l1_ratios(tensor: Tensor, keeps: Keeps, rescale: bool) -> Generator[Request, Any, tuple[float, ...]]:
    """sum |d| / sum |d that stay|; 1 where all stay, without `rescale`, or if either sum is below 1e-7.

    Raises: MethodError, if a sum is not finite: the quotient would spoil the whole tensor.
    """
    if not rescale or all(keep is None or keep.keeps_all for keep in keeps):
        return (1.0,) * len(keeps)
    asked = (Keep(), *(None if keep is None or keep.keeps_all else keep for keep in keeps))
    found = yield MeasureKept(asked, squares=False)
    ratios = []
    for i, keep in enumerate(asked[1:], 1):
        before, after = found.l1[i], found.kept_l1[i]
        if keep is not None and not math.isfinite(before):
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


def summed(weight: Sequence[float], keeps: Keeps, scales: tuple[float, ...], lambda_: float) -> Sum:
    """x0 + lambda * sum_i w_i*s_i*d_i over what stays."""
    weights = _times(weight, keeps, scales, lambda_)
    if all(keep is None or keep.keeps_all for keep in keeps) or not any(weights):
        return Combine(weights, base=0)
    return MaskedCombine(weights, keeps=_masks(keeps))


def elected(
    weight: tuple[float, ...],
    keeps: Keeps,
    scales: tuple[float, ...],
    *,
    normalize: bool,
    lambda_: float,
    count: bool = False,
) -> Sum:
    """x0 + lambda * sum_i w_i*s_i*d_i over what stays and has the elected sign; under `normalize`, divided by sum_i w_i
    over the same, a sum of 0 counting as 1.

    count  the votes are s_i*d_i instead of w_i*s_i*d_i, and the divisor is the number of models that agree
    """
    present = [i for i, keep in enumerate(keeps) if keep is not None]
    if len(present) == 1:  # without opposition the sign is its own, and its weight divides itself
        alone = (1.0,) * len(keeps) if normalize and not count else weight
        return summed(alone, keeps, scales, lambda_)
    voices = (1.0,) * len(keeps) if count else level(weight)
    weights = _times(voices if normalize and not count else weight, keeps, scales, lambda_)
    if not any(weights):
        return Combine(weights, base=0)
    ones = (1.0,) * len(keeps)
    return MaskedCombine(
        weights,
        keeps=_masks(keeps),
        votes=_times(voices, keeps, scales, 1.0),
        shares=_times(voices, keeps, ones, 1.0) if normalize else None,
        least_share=0.0 if count else _rounding_of_sums(voices),
    )


def refuse_cancelling(weight: Sequence[float]) -> None:
    """Called before the first request of a method that divides by sums of weights: an error shows before data is read.

    Raises: MethodError, if the weights of all models cancel. All 0 is allowed: nothing is added then.
    """
    if any(weight):
        shares(weight)


def _times(weight: Sequence[float], keeps: Keeps, scales: Sequence[float], factor: float) -> tuple[float, ...]:
    """The products, after the 0 of the base; 0 for models that add nothing."""
    terms = zip(weight, keeps, scales, strict=True)
    return (0.0, *(0.0 if keep is None else factor * w * scale for w, keep, scale in terms))


def _masks(keeps: Keeps) -> tuple[Keep, ...] | None:
    masks = (Keep(), *(keep or Keep() for keep in keeps))
    return None if all(keep.keeps_all for keep in masks) else masks


def _rounding_of_sums(weight: Sequence[float]) -> float:
    """The largest sum in float32 that may be nothing but the rounding of weights that cancel: it counts as 0.

    0 if all weights have one sign; never so large that a single weight would count as 0.
    """
    used = [w for w in weight if w != 0.0]
    if not used or min(used) > 0.0 or max(used) < 0.0:
        return 0.0
    return min(len(used) * 2.0**-24 * math.fsum(map(abs, used)), 0.5 * min(map(abs, used)))
