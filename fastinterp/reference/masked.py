"""The numeric contract in numpy, continued: masks, ranks, signs and scores. Rules 10, 13 and 14 of docs/NUMERICS.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastinterp.ops.combine import Row, philox_key
from fastinterp.ops.contract import CHUNK
from fastinterp.ops.dtypes import F64, DType
from fastinterp.ops.masked import mask_key, measured_inputs, measured_masked, read_inputs, terms, word_limits
from fastinterp.ops.requests import ALL_BITS, Mask, MaskedCombine, MeasuredMasked, MeasureMasked, Score
from fastinterp.reference import combine as reference
from fastinterp.reference.combine import Array, Stats, narrow, sampled_stats, widen
from fastinterp.reference.fma import fma

INF_BITS = 0x7F800000


def columns_of(shape: Sequence[int]) -> int:
    """Length of a row: the last dimension. A 0-d or 1-d tensor is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)


def deltas(inputs: Sequence[Array], dtypes: Sequence[DType]) -> list[Array]:
    """x_i - x_0 for every input but the first, in the compute dtype: float64 if any of `dtypes` is F64."""
    compute: Any = np.float64 if F64 in dtypes else np.float32
    x = [widen(raw, dtype).astype(compute) for raw, dtype in zip(inputs, dtypes, strict=True)]
    with np.errstate(all="ignore"):
        return [v - x[0] for v in x[1:]]


# --- rule 10: masks --------------------------------------------------------------------------------------------------


def magnitudes(d: Array) -> Array:
    """|d| (f32 or f64[numel]) rounded to float32, as bits: u32[numel]. Every NaN is 0x7FFFFFFF, above all else."""
    with np.errstate(all="ignore"):
        bits = abs(d).astype(np.float32).view(np.uint32)
    ordered: Array = np.where(bits > INF_BITS, np.uint32(ALL_BITS), bits)
    return ordered


def twice_ranks(mag: Array, columns: int) -> Array:
    """First plus last index of each element's run of equal magnitudes in its sorted row: i64[numel]."""
    ranks = np.empty(mag.shape, np.int64)
    for start in range(0, mag.size, max(columns, 1)):
        row = mag[start : start + columns]
        ordered = np.sort(row)
        last = np.searchsorted(ordered, row, "right") - 1
        ranks[start : start + columns] = np.searchsorted(ordered, row, "left") + last
    return ranks


def mask_numbers(key: int, numel: int) -> Array:
    """The random numbers of a mask, one for each element of a tensor: u32[numel].

    The halves of element e, the high one from space 0 and the low one from space 1, the third word of the counter: of
    word (e // 16) % 4 of counter 16 * (e // 128) + e % 16 the low 16 bits if e % 128 < 64, else the high ones.
    """
    e = np.arange(numel, dtype=np.uint64)
    c = np.uint64(16) * (e // np.uint64(128)) + e % np.uint64(16)
    which = ((e // np.uint64(16)) % np.uint64(4)).astype(np.int64)[:, None]
    shift = np.where(e % np.uint64(128) < 64, 0, 16).astype(np.uint32)
    halves = []
    for space in (0, 1):
        counter = [c & np.uint64(0xFFFFFFFF), c >> np.uint64(32), np.full_like(c, space), np.zeros_like(c)]
        words = np.take_along_axis(reference.philox(np.stack(counter, axis=-1), key), which, axis=1)[:, 0]
        halves.append(words >> shift & np.uint32(0xFFFF))
    numbers: Array = halves[0] << np.uint32(16) | halves[1]
    return numbers


def mask_elements(mag: Array, mask: Mask, columns: int, key: int) -> Array:
    """The elements of a tensor that pass a mask: bool[numel].

    mag      u32[numel], its magnitudes
    columns  length of a row
    key      of the random numbers, unused where none are drawn
    """
    passes: Array = (mag >= mask.min_bits) & (mag <= mask.max_bits)
    if not mask.is_random:
        return passes
    lo, hi = word_limits(mask)
    if columns == 1:
        limit: Any = (lo + hi) // 2
    else:
        limit = lo + (hi - lo) * twice_ranks(mag, columns) // (2 * (columns - 1)) if hi != lo else lo
    passes &= mask_numbers(key, mag.size).astype(np.int64) < limit
    return passes


@np.errstate(all="ignore")
def scores(d: Sequence[Array], score: Score, columns: int) -> Array:
    """A score of every element, as float32 bits: u32[numel], NaN as in `magnitudes`. Rule 13.

    d        the deltas of all inputs but the base, f32 or f64[numel], limited if the sum limits them
    columns  length of a row
    """
    compute = d[0].dtype.type
    if score.kind == "divergence":
        factors = np.frombuffer(score.factors, np.float32)
        return magnitudes(abs(d[0]) * np.repeat(factors, columns).astype(compute))
    mean = np.zeros_like(d[0])
    for v in d:
        mean = mean + v
    mean = mean / compute(len(d))
    total = np.zeros_like(mean)
    for v in d:
        total = fma(v - mean, v - mean, total)
    return magnitudes(total)


@np.errstate(all="ignore")
def measure_masked(
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    request: MeasureMasked,
    shape: Sequence[int],
    *,
    name: str = "",
    seed: int = 0,
) -> MeasuredMasked:
    """Statistics of masked deltas x_i - x_0. Sums in the order of rule 7, to which a dropped element adds 0.

    inputs  uint8[nbytes] each, any alignment, `dtypes` theirs, of a tensor of `shape`; input 0 is the base
    name, seed  of the tensor and of the recipe, for random masks
    """
    read, columns = measured_inputs(request), columns_of(shape)
    ds, passes = deltas([inputs[i] for i in read], [dtypes[i] for i in read]), []
    for i, d in zip(read[1:], ds, strict=True):
        mask = request.masks[i] or Mask()
        passes.append(mask_elements(magnitudes(d), mask, columns, mask_key(mask, i, name=name, seed=seed)))
        if request.score is not None:
            passes[-1] &= scores(ds, request.score, columns) >= request.score.min_bits
    count = np.sum(passes, axis=0)
    masked_ds = [np.where(m, d, 0) for m, d in zip(passes, ds, strict=True)]

    def l1(d: Array) -> float:
        return reference.lane_dot(abs(d), np.ones_like(d)) if request.l1 else 0.0

    reals = [
        *(0.0, *(l1(d) for d in ds)),
        *(0.0, *(l1(d) for d in masked_ds)),
        *(0.0, *(reference.lane_dot(d, d) if request.squares else 0.0 for d in masked_ds)),
    ]
    counts = [0, *(int(m.sum()) for m in passes), 0, *(int((m & (count > 1)).sum()) for m in passes)]
    return measured_masked(request, reals, counts)


# --- rule 14: masked sums --------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def masked(
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    combine: MaskedCombine,
    out_dtype: DType,
    shape: Sequence[int],
    *,
    name: str = "",
    seed: int = 0,
    rounding: str = "nearest",
    fp8_overflow: str = "saturate",
    stats_every: int = 32,
) -> tuple[Array, Stats | None]:
    """out = x_0 + step, narrowed once, as MaskedCombine defines it. Without a term it is a copy of input 0.

    inputs      uint8[nbytes] each, any alignment, `dtypes` theirs, of a tensor of `shape`
    name, seed  of the tensor and of the recipe, for random masks and stochastic rounding

    Compute dtype: float64 if an input that is read is F64. Returns uint8[nbytes] and the statistics, None of a copy;
    their intended change D is `step`.
    """
    key = philox_key(seed, 0, name)
    masked_terms = terms(combine)
    if not masked_terms:
        outs, stats = reference.combine(
            inputs[:1], dtypes[:1], [Row(0)], out_dtype, rounding=rounding, keys=[key], fp8_overflow=fp8_overflow
        )
        return outs[0], stats[0]
    read = read_inputs(combine)
    compute: Any = np.float64 if any(dtypes[i] is F64 for i in read) else np.float32
    x = {i: widen(inputs[i], dtypes[i]).astype(compute) for i in read}
    p = x[0]
    d = {i: _limited(x[i] - p if i else np.zeros_like(p), compute(combine.limit)) for i, _ in masked_terms}
    columns = columns_of(shape)
    if combine.importance:
        step = _important(combine, d, x)
    else:
        step = _step(combine, d, _taking_part(combine, d, columns, name, seed))
    y = p + step
    codes = narrow(y, out_dtype, rounding=rounding, key=key, fp8_overflow=fp8_overflow)
    chunk = np.arange(p.size) // CHUNK
    sampled = chunk % stats_every == 0 if stats_every else np.zeros(chunk.shape, bool)
    changed = codes != narrow(p, out_dtype, fp8_overflow=fp8_overflow)
    stored = widen(codes.view(np.uint8), out_dtype)
    return codes.view(np.uint8), sampled_stats(list(x.values()), p, step, stored, changed, sampled)


def _limited(d: Array, limit: Any) -> Array:
    d = np.where(d < -limit, -limit, d)
    return np.where(d > limit, limit, d)


def _taking_part(combine: MaskedCombine, d: dict[int, Array], columns: int, name: str, seed: int) -> dict[int, Array]:
    """Which elements of each delta take part: those that pass its mask and the score, and have the elected sign."""
    part = {
        i: mask_elements(magnitudes(d[i]), mask, columns, mask_key(mask, i, name=name, seed=seed))
        for i, mask in terms(combine)
    }
    if combine.score is not None:
        high = scores(list(d.values()), combine.score, columns) >= combine.score.min_bits
        part = {i: mask & high for i, mask in part.items()}
    if combine.sign_weights is None:
        return part
    total = np.zeros_like(next(iter(d.values())))
    for i, mask in part.items():
        if combine.sign_weights[i] != 0.0:
            total = np.where(mask, fma(total.dtype.type(combine.sign_weights[i]), d[i], total), total)
    minus = total < 0
    for i, mask in part.items():
        agrees = np.isnan(d[i]) | ((d[i] != 0) & ((np.signbit(d[i]) ^ (combine.sign_weights[i] < 0)) == minus))
        part[i] = mask & agrees & (combine.sign_weights[i] != 0.0)
    return part


def _step(combine: MaskedCombine, d: dict[int, Array], part: dict[int, Array]) -> Array:
    zero = np.zeros_like(next(iter(d.values())))
    compute = zero.dtype.type
    step, share, sole = zero, zero, zero
    for i, mask in part.items():
        step = np.where(mask, fma(compute(combine.weights[i]), d[i], step), step)
        if combine.shares is not None:
            share = np.where(mask, share + compute(combine.shares[i]), share)
        if combine.sole_weights is not None:
            sole = np.where(mask, fma(compute(combine.sole_weights[i]), d[i], zero), sole)
    if combine.shares is not None:
        other = (share == 0) | (abs(share) < compute(combine.least_share))
        step = step / np.where(other, compute(combine.other_share), share)
    if combine.sole_weights is not None:
        step = np.where(np.sum(list(part.values()), axis=0) == 1, sole, step)
    return step


def _important(combine: MaskedCombine, d: dict[int, Array], x: dict[int, Array]) -> Array:
    assert combine.importance is not None
    total = weight = np.zeros_like(x[0])
    for i, v in d.items():
        w = x[0].dtype.type
        g = fma(w(combine.weights[i]), x[combine.importance[i]], np.full_like(weight, combine.weights[i] * 1e-6))
        total, weight = fma(g, v, total), weight + g
    return np.where(weight == 0, 0, total / weight).astype(x[0].dtype)
