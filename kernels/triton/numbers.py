"""The numeric contract for one element, as csrc/dtypes.h and csrc/element.h have it. See docs/NUMERICS.md.

Elements are loaded and stored as unsigned integers ("codes"), and rounded by integer arithmetic: what a cast to a small
dtype does with NaN, overflow and subnormals differs between processors. dtype codes are those of ops/dtypes.py.
Branches are on constants and leave no trace in the compiled kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How a launch may touch memory: its addresses are multiples of 16 and so are its counts; or of the elements' sizes; or
# of nothing.
VECTORS = tl.constexpr(16)
ELEMENTS = tl.constexpr(0)
BYTES = tl.constexpr(1)


# --- memory ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_codes(address, offs, mask, D: tl.constexpr, ALIGN: tl.constexpr):
    """The elements `offs` of a tensor at `address` as u8, u16, u32 or u64; 0 where `mask` is not set."""
    if ALIGN == BYTES and D < 4:
        codes = _load_bytes(address, offs, mask, D)
    else:
        # The table stays in the first cache, and what is read but once leaves it first.
        codes = tl.load(_elements_at(address, D, ALIGN) + offs, mask=mask, other=0, eviction_policy="evict_first")
    return codes


@triton.jit
def _elements_at(address, D: tl.constexpr, ALIGN: tl.constexpr):
    if D == 0:
        p = address.to(tl.pointer_type(tl.uint64))
    elif D == 1:
        p = address.to(tl.pointer_type(tl.uint32))
    elif D <= 3:
        p = address.to(tl.pointer_type(tl.uint16))
    else:
        p = address.to(tl.pointer_type(tl.uint8))
    if ALIGN == VECTORS:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def _load_bytes(address, offs, mask, D: tl.constexpr):
    p = address.to(tl.pointer_type(tl.uint8))
    WIDTH: tl.constexpr = 8 if D == 0 else (4 if D == 1 else 2)
    code = tl.zeros(offs.shape, tl.uint64)
    for i in tl.static_range(WIDTH):
        code |= tl.load(p + offs * WIDTH + i, mask=mask, other=0).to(tl.uint64) << (8 * i)
    if D == 1:
        codes = code.to(tl.uint32)
    elif D > 1:
        codes = code.to(tl.uint16)
    else:
        codes = code
    return codes


@triton.jit
def store_codes(address, offs, codes, mask, D: tl.constexpr, ALIGN: tl.constexpr):
    if ALIGN == BYTES:
        WIDTH: tl.constexpr = 8 if D == 0 else (4 if D == 1 else (2 if D <= 3 else 1))
        p = address.to(tl.pointer_type(tl.uint8))
        for i in tl.static_range(WIDTH):
            tl.store(p + offs * WIDTH + i, (codes.to(tl.uint64) >> (8 * i)).to(tl.uint8), mask=mask)
    else:
        tl.store(_elements_at(address, D, ALIGN) + offs, codes, mask=mask, cache_modifier=".cs")


# --- widen: exact ----------------------------------------------------------------------------------------------------


@triton.jit
def widen(codes, D: tl.constexpr, WIDE: tl.constexpr):
    """The values of codes in the compute dtype: f64 if WIDE, else f32."""
    if D == 0:
        x = codes.to(tl.float64, bitcast=True)
    elif D == 1:
        x = codes.to(tl.float32, bitcast=True)
    elif D == 2:
        x = _widen_small(codes, 10, 15, 0x7C00, 0x8000, 16)
    elif D == 3:
        x = (codes.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif D == 4:
        x = _widen_small(codes, 3, 7, 0x7F, 0x80, 24)
    else:
        x = _widen_small(codes, 2, 15, 0x7C, 0x80, 24)
    if WIDE and D > 0:
        x = x.to(tl.float64)
    return x


@triton.jit
def _widen_small(
    codes, MANT: tl.constexpr, BIAS: tl.constexpr, INF: tl.constexpr, SIGN: tl.constexpr, SHIFT: tl.constexpr
):
    """Moves the magnitude's bits to their position in f32. A subnormal gets the exponent of the smallest normal number,
    and the leading 1 that this implies is subtracted again, exactly."""
    b = codes.to(tl.uint32)
    mag = b & (SIGN - 1)
    REBIAS: tl.constexpr = (127 - BIAS) << 23
    subnormal = mag < (1 << MANT)
    one = tl.where(subnormal, REBIAS + (1 << 23), 0).to(tl.uint32)
    placed = (mag << (23 - MANT)) + tl.where(subnormal, REBIAS + (1 << 23), REBIAS).to(tl.uint32)
    value = placed.to(tl.float32, bitcast=True) - one.to(tl.float32, bitcast=True)
    special = tl.where(mag >= INF, 0x7F800000, 0).to(tl.uint32)
    bits = value.to(tl.uint32, bitcast=True) | special | ((b & SIGN) << SHIFT)
    return bits.to(tl.float32, bitcast=True)


# --- narrow: one rounding --------------------------------------------------------------------------------------------


@triton.jit
def narrow(x, word, D: tl.constexpr, STOCHASTIC: tl.constexpr, SATURATE: tl.constexpr):
    """The codes of x (f32 or f64), rounded once: to nearest even, or by the random words (u32)."""
    WIDE: tl.constexpr = x.dtype == tl.float64
    if D == 0:
        u = x.to(tl.float64).to(tl.uint64, bitcast=True)
        codes = tl.where(x == x, u, 0x7FF8000000000000).to(tl.uint64)
    elif D == 1 and not WIDE:
        codes = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000).to(tl.uint32)
    elif D == 1:
        codes = _round(x, word, 23, 127, 0x7F800000, 0x7FC00000, 31, False, False, STOCHASTIC).to(tl.uint32)
    elif D == 2:
        codes = _round(x, word, 10, 15, 0x7C00, 0x7E00, 15, False, False, STOCHASTIC).to(tl.uint16)
    elif D == 3 and WIDE:
        codes = _round(x, word, 7, 127, 0x7F80, 0x7FC0, 15, False, False, STOCHASTIC).to(tl.uint16)
    elif D == 3:
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + (word >> 16)) >> 16 if STOCHASTIC else (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        codes = tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    elif D == 4:
        codes = _round(x, word, 3, 7, 0x7F, 0x7F, 7, SATURATE, True, STOCHASTIC).to(tl.uint8)
    else:
        codes = _round(x, word, 2, 15, 0x7C, 0x7E, 7, SATURATE, False, STOCHASTIC).to(tl.uint8)
    return codes


@triton.jit
def _round(
    x,
    word,
    MANT: tl.constexpr,  # of the target: bits of its mantissa, bias of its exponent, codes of its infinity and NaN
    BIAS: tl.constexpr,
    INF: tl.constexpr,
    NAN: tl.constexpr,
    SIGN: tl.constexpr,  # place of its sign
    SATURATE: tl.constexpr,
    E4M3: tl.constexpr,  # its infinity is its NaN
    STOCHASTIC: tl.constexpr,
):
    """`round_to` of csrc/dtypes.h: the significand in places of the result, added to the exponent's bits, where a carry
    does the right thing by itself."""
    if x.dtype == tl.float64:
        U: tl.constexpr = tl.uint64
        LONG: tl.constexpr = 52  # of x: bits of its mantissa
        REBIAS: tl.constexpr = (1023 - BIAS) << MANT
        TOP_BITS: tl.constexpr = 0x7FF0000000000000
        SHIFT: tl.constexpr = 63 - SIGN
        MOST: tl.constexpr = 60
        MAGNITUDE: tl.constexpr = 0x7FFFFFFFFFFFFFFF
    else:
        U: tl.constexpr = tl.uint32
        LONG: tl.constexpr = 23
        REBIAS: tl.constexpr = (127 - BIAS) << MANT
        TOP_BITS: tl.constexpr = 0x7F800000
        SHIFT: tl.constexpr = 31 - SIGN
        MOST: tl.constexpr = 31
        MAGNITUDE: tl.constexpr = 0x7FFFFFFF
    DROP: tl.constexpr = LONG - MANT
    TOP: tl.constexpr = INF - 1 if SATURATE else INF  # what overflow becomes
    LEAST: tl.constexpr = (REBIAS + (1 << MANT)) << DROP  # the target's smallest normal number
    BOUND: tl.constexpr = (REBIAS + TOP) << DROP  # what rounds to TOP without a remainder
    bits = x.to(U, bitcast=True)
    mag = bits & MAGNITUDE
    finite = tl.where(mag < BOUND, mag, BOUND).to(U)
    exponent = finite & TOP_BITS
    field = tl.where(exponent > LEAST, exponent, LEAST).to(U)
    biased = (finite >> LONG).to(tl.int32)
    sig = (finite & ((1 << LONG) - 1)) | tl.where(biased > 0, 1 << LONG, 0).to(U)
    drop = DROP + (field >> LONG).to(tl.int32) - tl.where(biased > 0, biased, 1)
    if STOCHASTIC:
        # word / 2^32 is added to what lies below the last place, and only the carry matters.
        sig = tl.where(drop > 60, 0, sig).to(U)
        left = tl.where(drop < 32, 32 - drop, 0)
        right = tl.where(drop < 32, 0, tl.where(drop > 60, 28, drop - 32))
        below = tl.where(drop < 32, sig.to(tl.uint64) << left.to(tl.uint64), sig.to(tl.uint64) >> right.to(tl.uint64))
        carry = (below.to(tl.uint32) + word) < word
        short = tl.where(drop > MOST, MOST, drop).to(U)
        places = tl.where(drop > 60, 0, tl.where(drop > MOST, 0, sig >> short)).to(U) + carry.to(U)
    else:
        d = tl.where(drop > MOST, MOST, drop).to(U)  # of more, nothing is left
        half = (tl.full(d.shape, 1, U) << d) >> 1
        places = (sig + half - 1 + ((sig >> d) & 1)) >> d
    out = (((field - LEAST) >> DROP) + places).to(tl.uint32)
    if SATURATE:
        out = tl.where(mag >= TOP_BITS, INF, out).to(tl.uint32)
    sign = (bits >> SHIFT).to(tl.uint32) & (1 << SIGN)
    nan = out == NAN if E4M3 else mag > TOP_BITS
    return tl.where(nan, NAN, out | sign).to(tl.uint32)


@triton.jit
def is_nonfinite(codes, D: tl.constexpr):
    """Where codes are NaN or an infinity."""
    return _magnitude(codes, D) >= _infinity(codes, D)


@triton.jit
def is_nan(codes, D: tl.constexpr):
    return _magnitude(codes, D) >= 0x7F if D == 4 else _magnitude(codes, D) > _infinity(codes, D)


@triton.jit
def _magnitude(codes, D: tl.constexpr):
    if D == 0:
        mag = codes & 0x7FFFFFFFFFFFFFFF
    elif D == 1:
        mag = codes & 0x7FFFFFFF
    else:
        mag = codes & (0x7FFF if D <= 3 else 0x7F)
    return mag


@triton.jit
def _infinity(codes, D: tl.constexpr):
    if D == 0:
        inf = 0x7FF0000000000000
    elif D == 1:
        inf = 0x7F800000
    elif D <= 3:
        inf = 0x7C00 if D == 2 else 0x7F80
    else:
        inf = 0x7F if D == 4 else 0x7C
    return tl.full(codes.shape, inf, codes.dtype)


# --- random words ----------------------------------------------------------------------------------------------------


@triton.jit
def _philox(c0, c1, c2, key):
    """Philox4x32-10 of counters (u32): four words. key: i64."""
    c3 = tl.zeros_like(c0)
    k0 = key.to(tl.uint32)
    k1 = (key.to(tl.uint64) >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * 0xD2511F53
        b = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = b.to(tl.uint32)
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = a.to(tl.uint32)
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _word_of(e, group: tl.constexpr, key, space):
    c = (e // group) * 16 + e % 16
    c2 = tl.zeros(e.shape, tl.uint32) + space
    w0, w1, w2, w3 = _philox(c.to(tl.uint32), (c >> 32).to(tl.uint32), c2, key)
    which = (e // 16) % 4
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def random_words(e, key):
    """The words that round elements e (i64, indices in the tensor): u32."""
    return _word_of(e, 64, key, 0)


@triton.jit
def is_drawn(e, limit, key):
    """Whether the random number of an element is below the limit of its mask (i64, below 2**32)."""
    late = e % 128 >= 64
    drawn = late & False
    ties = late | True
    space = limit.to(tl.int32) * 0
    tied = space + 1
    # The number's low half is computed only where the high one equals that of the limit: by the same code.
    while tied > 0:
        word = _word_of(e, 128, key, space)
        half = tl.where(late, word >> 16, word & 0xFFFF).to(tl.int64)
        part = tl.where(space == 0, limit >> 16, limit & 0xFFFF)
        drawn = drawn | (ties & (half < part))
        ties = ties & (half == part)
        tied = tl.where(space == 0, tl.max(tl.ravel(ties.to(tl.int32)), axis=0), 0)
        space += 1
    return drawn


# --- sums in a fixed order -------------------------------------------------------------------------------------------


@triton.jit
def fold(x, ROWS: tl.constexpr, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """The sums of rows of COUNT = 2**LEVELS numbers, in adjacent pairs: [ROWS, COUNT] to [ROWS].

    The order of `tl.sum` is not specified; of two numbers there is only one.
    """
    for level in tl.static_range(LEVELS):
        x = tl.sum(tl.reshape(x, [ROWS, COUNT >> (level + 1), 2]), axis=2)
    return tl.reshape(x, [ROWS])
