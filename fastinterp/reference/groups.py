"""The numeric contract for groups in numpy: sums and weights by row or by column, and the divergence of rows.

Part of the specification, beside combine.py: rules 7, 11 and 12 of docs/NUMERICS.md. A tensor is [rows, columns]:
`columns` is its last dimension. Element e is in row e // columns and in column e % columns.
Sources of exp and log: Taylor's series; fdlibm's reduction of arguments (Sun Microsystems 1993).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from fastinterp.ops.combine import GroupRow
from fastinterp.ops.contract import CHUNK, LANES
from fastinterp.ops.dtypes import F64, DType
from fastinterp.reference.combine import Array, Stats, narrow, sampled_stats, widen
from fastinterp.reference.fma import fma, fma64

BLOCK = 64  # rows that a column sums before blocks fold


def _vectors(inputs: Sequence[Array], dtypes: Sequence[DType], deltas: bool, columns: int) -> Array:
    """The vectors that are measured, in the compute dtype: [n, rows, columns]."""
    compute: Any = np.float64 if F64 in dtypes else np.float32
    x = np.stack([widen(raw, dtype).astype(compute) for raw, dtype in zip(inputs, dtypes, strict=True)])
    if deltas:
        x[1:] -= x[0]
    shaped: Array = x.reshape(len(inputs), -1, columns)
    return shaped


def _fold(sums: Array) -> Array:
    """Folds the second axis in adjacent pairs, an odd last one carried along: f64[groups, k] to f64[groups]."""
    while sums.shape[1] > 1:
        even = sums.shape[1] // 2 * 2
        sums = np.concatenate([sums[:, 0:even:2] + sums[:, 1:even:2], sums[:, even:]], axis=1)
    folded: Array = sums[:, 0] if sums.shape[1] else np.zeros(sums.shape[0])
    return folded


def dot_rows(a: Array, b: Array) -> Array:
    """<a, b> of every row, in the order of rule 7 as if the row were a tensor: f64[rows, columns] to f64[rows]."""
    rows, columns = a.shape
    chunks = max(1, -(-columns // CHUNK))
    padded = np.zeros((2, rows, chunks * CHUNK if chunks > 1 else -(-columns // LANES) * LANES))
    padded[0, :, :columns], padded[1, :, :columns] = a, b  # the zeros behind a row change no sum
    x, y = padded.reshape(2, rows, chunks, -1, LANES)
    lanes = np.zeros((rows, chunks, LANES))
    for step in range(x.shape[2]):
        lanes = fma64(x[:, :, step], y[:, :, step], lanes)
    return _fold(_fold(lanes.reshape(rows * chunks, LANES)).reshape(rows, chunks))


def dot_columns(a: Array, b: Array) -> Array:
    """<a, b> of every column, f64[rows, columns] to f64[columns]: by fma in blocks of 64 rows, which fold in pairs."""
    rows, columns = a.shape
    blocks = max(1, -(-rows // BLOCK))
    padded = np.zeros((2, blocks * BLOCK, columns))
    padded[0, :rows], padded[1, :rows] = a, b
    x, y = padded.reshape(2, blocks, BLOCK, columns)
    sums = np.zeros((blocks, columns))
    for row in range(BLOCK):
        sums = fma64(x[:, row], y[:, row], sums)
    return _fold(np.ascontiguousarray(sums.T))


@np.errstate(all="ignore")
def _measure(x: Array, per: Literal["row", "column"]) -> tuple[Array, Array]:
    n, dot, axis = len(x), dot_rows if per == "row" else dot_columns, 2 if per == "row" else 1
    v = x.astype(np.float64)
    sums = [dot(v[i], v[j]) for i in range(n) for j in range(i, n)]
    sums += [dot(abs(v[i]), np.ones_like(v[i])) for i in range(n)]
    return np.stack(sums, axis=1), np.count_nonzero(x, axis=axis).T


@np.errstate(all="ignore")
def measure_rows(inputs: Sequence[Array], dtypes: Sequence[DType], deltas: bool, columns: int) -> tuple[Array, Array]:
    """`reference.measure` of every row by itself; its lanes and chunks begin where the row does.

    inputs  uint8[nbytes] each, any alignment, `dtypes` theirs; the same number of elements in each, whole rows. F64
            among `dtypes` makes all rows float64

    Returns f64[rows, n * (n + 1) / 2 + n] and i64[rows, n].
    """
    return _measure(_vectors(inputs, dtypes, deltas, columns), "row")


@np.errstate(all="ignore")
def measure_columns(
    inputs: Sequence[Array], dtypes: Sequence[DType], deltas: bool, columns: int
) -> tuple[Array, Array]:
    """The same of every column: f64[columns, n * (n + 1) / 2 + n] and i64[columns, n].

    Rows add by fma, in order, in blocks of 64; blocks fold in adjacent pairs, an odd last one is carried along.
    """
    return _measure(_vectors(inputs, dtypes, deltas, columns), "column")


# --- combine ---------------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def combine_groups(
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    rows: Sequence[GroupRow],
    out_dtype: DType,
    per: Literal["row", "column"],
    columns: int,
    *,
    rounding: str = "nearest",
    keys: Sequence[int] = (),
    fp8_overflow: str = "saturate",
    stats_every: int = 32,
) -> tuple[list[Array], list[Stats]]:
    """`reference.combine` with a weight per group: rule 11. Never a copy.

    p = widen(x[pivot]); acc = +0; for every term, in order, where its weight w of the element's group, rounded to the
    compute dtype, is not 0: acc = fma(w, x_i - p, acc). y = fma(total, p, acc), total of the group; out = narrow(y)

    Counts of NaN and Inf are over what elements are made of: the pivot, and the terms that were not left out. The
    intended change is acc if every group's total is 1, else y - p.
    """
    numel = inputs[0].size * 8 // dtypes[0].bits
    e = np.arange(numel)
    group = e // columns if per == "row" else e % columns
    sampled = (e // CHUNK) % stats_every == 0 if stats_every else np.zeros(numel, bool)
    outputs, stats = [], []
    for j, row in enumerate(rows):
        read = (row.pivot, *row.inputs)
        compute: Any = np.float64 if any(dtypes[i] is F64 for i in read) else np.float32
        p = widen(inputs[row.pivot], dtypes[row.pivot]).astype(compute)
        weights = np.array(row.weights, np.float64).reshape(len(row.totals), len(row.inputs)).astype(compute)
        totals = np.array(row.totals, np.float64)
        acc, terms = np.zeros_like(p), [p]
        for t, i in enumerate(row.inputs):
            w, x = weights[group, t], widen(inputs[i], dtypes[i]).astype(compute)
            acc = np.where(w != 0, fma(w, x - p, acc), acc)
            terms.append(np.where(w != 0, x, 0))
        y = fma(totals.astype(compute)[group], p, acc)
        change = acc if (totals == 1).all() else y - p
        key = keys[j] if rounding == "stochastic" else 0
        codes = narrow(y, out_dtype, rounding=rounding, key=key, fp8_overflow=fp8_overflow)
        unmoved = narrow(p, out_dtype, fp8_overflow=fp8_overflow)
        outputs.append(codes.view(np.uint8))
        stored = widen(outputs[j], out_dtype)
        stats.append(sampled_stats(terms, p, change, stored, codes != unmoved, sampled))
    return outputs, stats


# --- divergence ------------------------------------------------------------------------------------------------------

LOG2_E = float.fromhex("0x1.71547652b82fep+0")
LN2_HIGH = float.fromhex("0x1.62e42fee00000p-1")  # times a whole number below 2^20 it is exact
LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
ROUND = 1.5 * 2.0**52  # adding it rounds to a whole number, which is then in the low bits
EXP_TERMS = [1.0 / math.factorial(i) for i in range(13, -1, -1)]
LOG_TERMS = [1.0 / (2 * i + 1) for i in range(10, 0, -1)]
LEAST = -708.0  # exp of less counts as 0
HALF_ROOT = 0x3FE6A09E667F3BCD  # bits of sqrt(1/2)
SOFT = 1e-8  # added to every probability


@np.errstate(all="ignore")
def exp(x: Array) -> Array:
    """e**x for f64 x <= 0 to 1e-15 of itself, 0 below -708: k = x / ln 2 to the nearest, r = x - k ln 2, 2^k e^r."""
    shifted = fma64(x, LOG2_E, ROUND)
    k = shifted - ROUND
    r = fma64(k, -LN2_LOW, fma64(k, -LN2_HIGH, x))
    y = np.full(x.shape, EXP_TERMS[0])
    for term in EXP_TERMS[1:]:
        y = fma64(y, r, term)
    scaled = (y.view(np.uint64) + (shifted.view(np.uint64) << np.uint64(52))).view(np.float64)
    return np.where(x < LEAST, 0.0, np.where(np.isnan(x), x, scaled))


@np.errstate(all="ignore")
def log(x: Array) -> Array:
    """ln x for normal f64 x > 0 to 1e-15 of itself: x = 2^k z, z about 1; ln z = 2 artanh((z - 1) / (z + 1))."""
    u = x.view(np.uint64) + np.uint64(0x3FF0000000000000 - HALF_ROOT)
    k = (u >> np.uint64(52)).astype(np.float64) - 1023.0
    z = ((u & np.uint64(0xFFFFFFFFFFFFF)) + np.uint64(HALF_ROOT)).view(np.float64)
    f = z - 1.0
    s = f / (z + 1.0)
    q = s * s
    y = np.full(x.shape, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        y = fma64(y, q, term)
    # 2 s (1 + q y): the large part last
    t = s + s
    ln_z = fma64(t * q, y, t)
    return np.where(np.isnan(x), x, fma64(k, LN2_HIGH, fma64(k, LN2_LOW, ln_z)))


@np.errstate(all="ignore")
def softmax(x: Array) -> Array:
    """exp(x - max) / sum + 1e-8 of every row, f64[rows, columns]; the sum in the order of rule 7."""
    top = np.fmax.reduce(x, axis=1, initial=-np.inf)[:, None]
    powers = exp(x - top)
    return powers / dot_rows(powers, np.ones_like(powers))[:, None] + SOFT


@np.errstate(all="ignore")
def divergence(inputs: Sequence[Array], dtypes: Sequence[DType], columns: int) -> Array:
    """sum p log(p / q) of every row, p = softmax(x_1), q = softmax(x_0), in float64: f64[rows]. Rule 12.

    The sums are in the order of rule 7, as if a row were a tensor. A NaN, or an infinity as maximum, makes it NaN.
    """
    q, p = (
        softmax(widen(raw, d).astype(np.float64).reshape(-1, columns)) for raw, d in zip(inputs, dtypes, strict=True)
    )
    return dot_rows(p, log(p / q))
