"""The numeric contract in numpy: slow, obvious, the specification that every backend is compared with, byte for byte.

Raw tensors are uint8 arrays of any alignment; `codes` are their elements as unsigned integers of the storage width.
Compute dtype: float32, or float64 if an input that the row reads is F64. It is set per row, so an output does not
depend on which other outputs share its read. Coefficients are float64 on the host, rounded once to the compute dtype.
Sources: IEEE 754-2019; OCP FP8 (E4M3 is "e4m3fn": no Inf, S.1111.111 is NaN); Salmon et al. 2011 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastinterp.ops.combine import Row
from fastinterp.ops.contract import CHUNK, LANES
from fastinterp.ops.dtypes import DTYPES, F8_E4M3, F32, F64, DType
from fastinterp.reference.fma import fma, fma64

Array = NDArray[Any]


FORMATS = {dtype: dtype.layout for dtype in DTYPES.values() if dtype.layout is not None}


@dataclass(frozen=True, slots=True)
class Stats:
    """What a combine measured of one row that is no copy.

    Counts are over all elements; the rest is over the sampled ones: chunks of 16384 elements of the tensor, chunk c
    if c % stats_every == 0 (none if stats_every is 0). p is the pivot, out the stored value widened, and the intended
    change D is acc if total == 1, else y - p. Differences are rounded to the compute dtype, products and sums are
    float64 in any order, so they agree only to a few n * eps of `scale_od` (or of themselves: their terms are squares).
    """

    nan_in: int  # over the inputs that the row reads
    inf_in: int
    nan_out: int
    inf_out: int
    sampled: int  # elements
    changed: int  # sampled elements stored otherwise than the pivot would be, to nearest
    sum_pp: float  # sum of p * p
    sum_dd: float  # sum of D * D
    sum_od: float  # sum of (out - p) * D; sum_od / sum_dd is the share of the intended change that took place
    scale_od: float  # sum of |(out - p) * D|, the scale of sum_od's rounding errors; backends do not return it


# --- storage <-> compute dtype ---------------------------------------------------------------------------------------


def codes_of(raw: Array, dtype: DType) -> Array:
    """The elements of `raw` (uint8[nbytes], any alignment) as unsigned integers: u8, u16, u32 or u64[numel], a copy."""
    return np.array(raw, dtype=np.uint8).view(f"u{dtype.bits // 8}")


def is_nan(codes: Array, dtype: DType) -> Array:
    """Which of `codes` are NaN: bool[numel]."""
    fmt = FORMATS[dtype]
    inf = fmt.largest if dtype is F8_E4M3 else fmt.largest + 1
    nan: Array = (codes & (fmt.sign - 1)) > inf
    return nan


def is_inf(codes: Array, dtype: DType) -> Array:
    """Which of `codes` are +Inf or -Inf: bool[numel]; never true for F8_E4M3, which has none."""
    fmt = FORMATS[dtype]
    infinite: Array = (codes & (fmt.sign - 1)) == fmt.largest + 1
    return infinite & (dtype is not F8_E4M3)


def widen(raw: Array, dtype: DType) -> Array:
    """The exact values of `raw` (uint8[nbytes], any alignment): f64[numel] for F64, else f32[numel].

    F64 and F32 keep their bits. In the others a NaN becomes a quiet NaN of unspecified payload and sign.
    """
    codes = codes_of(raw, dtype)
    if dtype in (F64, F32):
        return codes.view(f"f{dtype.bits // 8}")
    fmt = FORMATS[dtype]
    magnitude = codes.astype(np.int64) & (fmt.sign - 1)
    field = magnitude >> fmt.mantissa
    significand = (magnitude & ((1 << fmt.mantissa) - 1)) + np.where(field > 0, 1 << fmt.mantissa, 0)
    value = np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - fmt.bias - fmt.mantissa)
    value = np.where(is_inf(codes, dtype), np.inf, np.where(is_nan(codes, dtype), np.nan, value))
    return np.where(codes & fmt.sign, -value, value).astype(np.float32)  # exact: f32 holds every value of these dtypes


@np.errstate(all="ignore")
def narrow(
    x: Array,
    dtype: DType,
    *,
    rounding: str = "nearest",
    key: int = 0,
    first: int = 0,
    fp8_overflow: str = "saturate",
) -> Array:
    """Round `x` (f32 or f64[numel]) once to `dtype`: codes, u8, u16, u32 or u64[numel].

    The magnitude of x is an integer significand times a power of two. At the exponent of the result (which stops at the
    target's smallest normal one) its lowest `drop` bits do not fit. Then q = (significand + increment) >> drop, and
    the code is ((e - 1) << mantissa) + q, so that a carry moves into the exponent by itself. The increment is

        nearest      half of the last place, less one if q would be even: ties go to even
        stochastic   the first `drop` bits of the element's random word (followed by zeros if drop > 32), so that the
                     magnitude is rounded up with the probability of its distance from the lower neighbour.
                     `key` and `first` (index of x[0] in its tensor) choose the words: see random_words

    drop > 60 gives 0. Every NaN becomes the dtype's one quiet NaN with sign 0. Finite results beyond the largest finite
    value become Inf; in fp8, `fp8_overflow` = "saturate" makes them the largest finite value, "nonfinite" Inf (E5M2) or
    NaN (E4M3). Inf stays Inf, and becomes NaN in E4M3. F32 from F32 and F64 from F64 are the identity but for NaN.

    Raises: ValueError, if rounding or fp8_overflow is unknown.
    """
    if rounding not in ("nearest", "stochastic") or fp8_overflow not in ("saturate", "nonfinite"):
        raise ValueError(f"unknown {rounding=} or {fp8_overflow=}")
    fmt = FORMATS[dtype]
    if dtype is F64:
        x = x.astype(np.float64)
    source_dtype = F64 if x.dtype == np.float64 else F32
    source = FORMATS[source_dtype]
    bits = np.ascontiguousarray(x).view(f"u{source.bits // 8}")
    magnitude = bits.astype(np.uint64) & np.uint64(source.sign - 1)
    field = magnitude >> np.uint64(source.mantissa)
    hidden = np.where(field > 0, 1 << source.mantissa, 0).astype(np.uint64)
    significand = (magnitude & np.uint64((1 << source.mantissa) - 1)) | hidden
    exponent = np.maximum(field.astype(np.int64), 1) - source.bias + fmt.bias
    drop = source.mantissa - fmt.mantissa + np.maximum(1 - exponent, 0)
    vanishes = drop > 60
    drop = np.where(vanishes, 0, drop).astype(np.uint64)
    if rounding == "nearest":
        increment = _nearest_increment(significand, drop)
    else:
        increment = _stochastic_increment(random_words(key, first, x.size), drop)
    q = np.where(vanishes, 0, (significand + increment) >> drop).astype(np.int64)
    code = ((np.maximum(exponent, 1) - 1) << fmt.mantissa) + q
    saturates = dtype.bits == 8 and fp8_overflow == "saturate"
    code = np.where(code > fmt.largest, fmt.largest if saturates else fmt.largest + 1, code)
    code = np.where(is_inf(bits, source_dtype), fmt.largest + 1, code).astype(np.uint64)
    code |= np.where(bits & source.sign, np.uint64(fmt.sign), np.uint64(0))
    nan = is_nan(bits, source_dtype) | is_nan(code, dtype)  # the second: an overflow of E4M3, which drops its sign
    return np.where(nan, np.uint64(fmt.nan), code).astype(f"u{dtype.bits // 8}")


def _nearest_increment(significand: Array, drop: Array) -> Array:
    one = np.uint64(1)
    half = (one << drop) >> one  # 0 if nothing is dropped
    last_bit = (significand >> drop) & one
    return np.where(half > 0, half - one + last_bit, 0).astype(np.uint64)


def _stochastic_increment(words: Array, drop: Array) -> Array:
    r, limit = words.astype(np.uint64), np.uint64(32)
    return np.where(drop <= limit, r >> (limit - np.minimum(drop, limit)), r << (np.maximum(drop, limit) - limit))


# --- random words ----------------------------------------------------------------------------------------------------


def philox(counter: Array, key: int) -> Array:
    """Philox4x32-10: u32[..., 4] of `counter` u32[..., 4] under the 64-bit `key`, whose low word comes first."""
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint64) for i in range(4))
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (right >> shift) ^ x1 ^ np.uint64(k0),
            right & low,
            (left >> shift) ^ x3 ^ np.uint64(k1),
            left & low,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3], axis=-1).astype(np.uint32)


def random_words(key: int, first: int, numel: int) -> Array:
    """The random words of elements first .. first + numel - 1 of a tensor: u32[numel].

    Element e takes word (e // 16) % 4 of counter 16 * (e // 64) + e % 16: 64 elements share 16 counters, so that a
    16-lane vector unit stores the four words of its counters one after the other, without a transposition.
    """
    e = np.arange(numel, dtype=np.uint64) + np.uint64(first)
    c = np.uint64(16) * (e // np.uint64(64)) + e % np.uint64(16)
    zero = np.zeros_like(c)
    words = philox(np.stack([c & np.uint64(0xFFFFFFFF), c >> np.uint64(32), zero, zero], axis=-1), key)
    which = (e // np.uint64(16)) % np.uint64(4)
    return np.take_along_axis(words, which.astype(np.int64)[:, None], axis=1)[:, 0]


# --- combine ---------------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def combine(
    inputs: Sequence[Array],
    dtypes: Sequence[DType],
    rows: Sequence[Row],
    out_dtypes: DType | Sequence[DType],
    *,
    rounding: str = "nearest",
    keys: Sequence[int] = (),
    first: int = 0,
    fp8_overflow: str = "saturate",
    stats_every: int = 32,
) -> tuple[list[Array], list[Stats | None]]:
    """Write one output per row: rules 1 to 5 of docs/NUMERICS.md.

    inputs       uint8[nbytes] each, any alignment, `dtypes` theirs; the same number of elements in each
    out_dtypes   one for all rows, or one per row
    keys         64-bit Philox keys, one per row (stochastic rounding only); first: index of element 0 in its tensor

    A row:  p = widen(x[pivot]); acc = +0; for (i, w) in terms, in order: d = x_i - p; acc = fma(w, d, acc)
            y = p + acc if total == 1 (before any rounding of total), else fma(total, p, acc)
            out = narrow(y)
    A copy: (no terms, total 1) the same bytes if the dtypes agree, NaN payloads included; else narrow(widen(p)), with
            no addition, so that -0 stays -0. It is not measured: its Stats are None.

    Returns the outputs, uint8[nbytes] each, and their statistics.
    Raises: ValueError, if inputs differ in length or a key is missing.
    """
    numels = {raw.size * 8 // dtype.bits for raw, dtype in zip(inputs, dtypes, strict=True)}
    if len(numels) != 1:
        raise ValueError(f"inputs must have the same number of elements, got {sorted(numels)}")
    if rounding == "stochastic" and len(keys) != len(rows):
        raise ValueError(f"stochastic rounding needs a key per row: {len(rows)} rows, {len(keys)} keys")
    outs = [out_dtypes] * len(rows) if isinstance(out_dtypes, DType) else list(out_dtypes)
    chunk = np.arange(first, first + numels.pop()) // CHUNK
    sampled = chunk % stats_every == 0 if stats_every else np.zeros(chunk.shape, bool)
    outputs: list[Array] = []
    stats: list[Stats | None] = []
    for j, (row, out_dtype) in enumerate(zip(rows, outs, strict=True)):
        if row.is_copy and dtypes[row.pivot] is out_dtype:
            outputs.append(np.array(inputs[row.pivot], dtype=np.uint8))
            stats.append(None)
            continue
        x = {i: widen(inputs[i], dtypes[i]) for i in row.inputs}
        p, change, y = _run(row, x)
        key = keys[j] if rounding == "stochastic" else 0
        codes = narrow(y, out_dtype, rounding=rounding, key=key, first=first, fp8_overflow=fp8_overflow)
        outputs.append(codes.view(np.uint8))
        unmoved = narrow(p, out_dtype, fp8_overflow=fp8_overflow)
        stored = widen(outputs[j], out_dtype)
        changed = codes != unmoved
        stats.append(None if row.is_copy else sampled_stats([*x.values()], p, change, stored, changed, sampled))
    return outputs, stats


def _run(row: Row, x: dict[int, Array]) -> tuple[Array, Array, Array]:
    """The arithmetic of one row on widened inputs: p, the intended change D, and y, in the compute dtype."""
    compute: Any = np.float64 if any(v.dtype == np.float64 for v in x.values()) else np.float32
    p = x[row.pivot].astype(compute)
    acc = np.zeros_like(p)
    if row.is_copy:
        return p, acc, p
    for i, w in row.terms:
        acc = fma(compute(w), x[i].astype(compute) - p, acc)
    if row.total == 1.0:
        return p, acc, p + acc
    y = fma(compute(row.total), p, acc)
    return p, y - p, y


def sampled_stats(x: list[Array], p: Array, change: Array, stored: Array, changed: Array, sampled: Array) -> Stats:
    """Statistics of one row from the inputs that it reads, pivot, intended change, stored values, and what changed."""
    moved = stored.astype(p.dtype) - p  # in the compute dtype, as D is
    p64, d64, moved64 = (v[sampled].astype(np.float64) for v in (p, change, moved))
    od = moved64 * d64
    return Stats(
        nan_in=sum(int(np.isnan(v).sum()) for v in x),
        inf_in=sum(int(np.isinf(v).sum()) for v in x),
        nan_out=int(np.isnan(stored).sum()),
        inf_out=int(np.isinf(stored).sum()),
        sampled=int(sampled.sum()),
        changed=int(changed[sampled].sum()),
        sum_pp=float(np.sum(p64 * p64)),
        sum_dd=float(np.sum(d64 * d64)),
        sum_od=float(np.sum(od)),
        scale_od=float(np.sum(abs(od))),
    )


# --- measure ---------------------------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def measure(inputs: Sequence[Array], dtypes: Sequence[DType], deltas: bool) -> tuple[Array, Array]:
    """Sums over n vectors, in the order that rule 7 of docs/NUMERICS.md fixes: the inputs, or the first and x_i - x_0.

    inputs  uint8[nbytes] each, any alignment, `dtypes` theirs; the same number of elements in each

    Vectors are in the compute dtype, float64 if any of `dtypes` is F64; products and sums are fma in float64. In a
    chunk of 16384 elements, element i adds to lane i % 256, in index order. Lanes, then chunks, fold in adjacent pairs;
    an odd last one is carried along.

    Returns f64[n * (n + 1) / 2 + n], the upper triangle of the Gram matrix row by row and then the L1 norms, and
    i64[n], how many elements of each vector are not 0, NaN included.
    """
    compute: Any = np.float64 if F64 in dtypes else np.float32
    x = np.stack([widen(raw, dtype).astype(compute) for raw, dtype in zip(inputs, dtypes, strict=True)])
    if deltas:
        x[1:] -= x[0]
    n, numel = x.shape
    chunks = max(1, -(-numel // CHUNK))
    v = np.zeros((n, chunks * CHUNK))  # the zeros behind the last element change no sum
    v[:, :numel] = x
    v = v.reshape(n, chunks, CHUNK // LANES, LANES)
    gram = [_folded_dot(v[i], v[j]) for i in range(n) for j in range(i, n)]
    l1 = [_folded_dot(abs(v[i]), np.ones_like(v[i])) for i in range(n)]
    return np.array(gram + l1), np.count_nonzero(x, axis=1)


def lane_dot(a: Array, b: Array) -> float:
    """<a, b> of two f32 or f64[numel], in the same order."""
    padded = np.zeros((2, max(1, -(-a.size // CHUNK)) * CHUNK))
    padded[0, : a.size], padded[1, : a.size] = a, b
    x, y = padded.reshape(2, -1, CHUNK // LANES, LANES)
    return _folded_dot(x, y)


def _folded_dot(a: Array, b: Array) -> float:
    """<a, b> of f64[chunks, steps, LANES]."""
    lanes = np.zeros((a.shape[0], LANES))
    for step in range(a.shape[1]):
        lanes = fma64(a[:, step], b[:, step], lanes)
    while lanes.shape[1] > 1:
        lanes = lanes[:, 0::2] + lanes[:, 1::2]
    sums = lanes[:, 0]
    while sums.size > 1:
        even = sums.size // 2 * 2
        sums = np.append(sums[0:even:2] + sums[1:even:2], sums[even:])
    return float(sums[0])
