"""The reference's conversions, fma and random words, against oracles: ml_dtypes, numpy, torch, and exact fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from fastinterp.ops.combine import philox_key
from fastinterp.ops.dtypes import BF16, F8_E4M3, F8_E5M2, F16, F32, F64, MERGING, DType
from fastinterp.reference import combine as reference
from fastinterp.reference import fma as exact_fma
from fastinterp.reference.combine import FORMATS, narrow, widen
from tests.support.numpy_dtypes import NUMPY

SMALL = tuple(d for d in MERGING if d.bits <= 16)
small = pytest.mark.parametrize("dtype", SMALL, ids=str)


def all_codes(dtype: DType) -> np.ndarray:
    return np.arange(1 << dtype.bits).astype(f"u{dtype.bits // 8}")


def finite_values(dtype: DType) -> np.ndarray:
    """Every value of a small dtype from 0 up, and the one that would follow the largest: f64."""
    x = widen(np.arange(FORMATS[dtype].largest + 1).astype(f"u{dtype.bits // 8}").view(np.uint8), dtype)
    x = x.astype(np.float64)
    return np.append(x, x[-1] + (x[-1] - x[-2]))


def boundaries(dtype: DType, kind: type = np.float64) -> np.ndarray:
    """All midpoints of neighbouring values of a small dtype, and the values themselves: positive."""
    x = finite_values(dtype)
    with np.errstate(over="ignore"):  # 2**128, which follows the largest bf16, becomes Inf in f32
        return np.concatenate([x, (x[1:] + x[:-1]) / 2]).astype(kind)


def random_bits(dtype: DType, n: int, seed: int) -> np.ndarray:
    """n values with uniformly random bits, NaN and Inf included: f32 or f64."""
    words = np.random.default_rng(seed).integers(0, 1 << 63, n, dtype=np.uint64) * np.uint64(2)
    return (words >> np.uint64(64 - dtype.bits)).astype(f"u{dtype.bits // 8}").view(f"f{dtype.bits // 8}")


def rounded(exact: Fraction, dtype: DType) -> int:
    """The code of a fraction rounded to nearest even by rational arithmetic; the code after the largest on overflow."""
    fmt = FORMATS[dtype]
    if not exact:
        return 0
    magnitude = abs(exact)
    e = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    e -= Fraction(2) ** e > magnitude
    e = max(e, 1 - fmt.bias)
    q = round(magnitude / Fraction(2) ** (e - fmt.mantissa))  # of a Fraction: half to even
    code = min(((e + fmt.bias - 1) << fmt.mantissa) + q, fmt.largest + 1)
    return code | (fmt.sign if exact < 0 else 0)


def assert_equal_codes(want: np.ndarray, got: np.ndarray, x: np.ndarray) -> None:
    wrong = np.flatnonzero(want != got)
    assert not wrong.size, f"{wrong.size} differ, first {x[wrong[0]]!r}: {want[wrong[0]]:x} != {got[wrong[0]]:x}"


# --- widen and narrow ------------------------------------------------------------------------------------------------


@small
def test_widen_of_all_patterns(dtype):
    codes = all_codes(dtype)
    want, got = codes.view(NUMPY[dtype]).astype(np.float32), widen(codes.view(np.uint8), dtype)
    assert got.dtype == np.float32
    nan = np.isnan(want)
    assert np.array_equal(nan, np.isnan(got)) and np.array_equal(nan, reference.is_nan(codes, dtype))
    assert np.array_equal(np.isinf(want), reference.is_inf(codes, dtype))
    assert np.array_equal(want[~nan].view(np.uint32), got[~nan].view(np.uint32))


def test_widen_takes_any_alignment():
    raw = np.arange(33, dtype=np.uint8)
    for dtype, at in itertools.product(MERGING, (0, 1, 3)):
        assert np.array_equal(
            widen(raw[at : at + 16], dtype).view(np.uint8), widen(raw[at : at + 16].copy(), dtype).view(np.uint8)
        )


@pytest.mark.parametrize("dtype", MERGING, ids=str)
def test_storing_what_was_read_keeps_every_pattern_but_nan(dtype):
    """Round trip over all patterns (random ones of F32 and F64); NaN becomes the one quiet NaN."""
    codes = all_codes(dtype) if dtype in SMALL else random_bits(dtype, 50000, 3).view(f"u{dtype.bits // 8}")
    nan = reference.is_nan(codes, dtype)
    back = narrow(widen(codes.view(np.uint8), dtype), dtype)
    assert nan.any() and np.array_equal(back, np.where(nan, FORMATS[dtype].nan, codes))


def test_the_one_quiet_nan_of_each_dtype():
    want = {BF16: 0x7FC0, F16: 0x7E00, F32: 0x7FC00000, F64: 0x7FF8 << 48, F8_E4M3: 0x7F, F8_E5M2: 0x7E}
    nans = np.array([0x7FC00000, 0xFFC00001, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    wide = np.array([0x7FF8 << 48, (0xFFF8 << 48) + 1, (0x7FF0 << 48) + 1], np.uint64).view(np.float64)
    for dtype, rounding in itertools.product(MERGING, ("nearest", "stochastic")):
        for x in (nans, wide):
            assert set(narrow(x, dtype, rounding=rounding, key=5).tolist()) == {want[dtype]}


@small
def test_narrow_of_f32_around_every_boundary(dtype):
    """All midpoints and values of the dtype, one f32 ulp below and above, and random bits: as ml_dtypes and numpy."""
    x = boundaries(dtype, np.float32)
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    x = np.concatenate([x, -x, random_bits(F32, 200000, 1)])
    with np.errstate(all="ignore"):
        oracle = x.astype(NUMPY[dtype])
    want = oracle.view(f"u{dtype.bits // 8}").copy()
    want[reference.is_nan(want, dtype)] = FORMATS[dtype].nan
    assert_equal_codes(want, narrow(x, dtype, fp8_overflow="nonfinite"), x)
    # "saturate" differs for finite values of which "nonfinite" makes Inf or NaN, and only in fp8.
    beyond = np.isfinite(x) & (reference.is_nan(want, dtype) | reference.is_inf(want, dtype))
    if dtype.bits == 8:
        largest = np.where(np.signbit(x), FORMATS[dtype].largest | FORMATS[dtype].sign, FORMATS[dtype].largest)
        want = np.where(beyond, largest.astype(np.uint8), want)
    assert beyond.any()
    assert_equal_codes(want, narrow(x, dtype), x)


@pytest.mark.parametrize("dtype", [F32, *SMALL], ids=str)
def test_narrow_of_f64_rounds_once(dtype):
    """f64 values beside midpoints, closer than f32 can tell: against exact fractions."""
    middle = boundaries(dtype) if dtype in SMALL else boundaries(F16) * 1.0000000596046448  # midpoints of f32
    rng = np.random.default_rng(4)
    x = rng.choice(middle[middle > 0], 1500)
    x = np.concatenate([x, x * (1 + 2.0**-40), x * (1 - 2.0**-40), np.nextafter(x, 0), np.nextafter(x, np.inf)])
    noise = random_bits(F64, 500, 5)
    x = np.concatenate([x * rng.choice([-1, 1], x.size), noise[np.isfinite(noise)]])
    want = np.array([rounded(Fraction(v), dtype) for v in x.tolist()], np.uint64).astype(f"u{dtype.bits // 8}")
    want[reference.is_nan(want, dtype)] = FORMATS[dtype].nan
    assert_equal_codes(want, narrow(x, dtype, fp8_overflow="nonfinite"), x)
    if dtype is not F32:
        with np.errstate(over="ignore"):
            twice = narrow(x.astype(np.float32), dtype, fp8_overflow="nonfinite")
        assert (twice != want).sum() > 100, "the inputs do not tell one rounding from two"


def test_inf_and_overflow_policies_of_fp8():
    x = np.array([np.inf, -np.inf, 1e9, -1e9, 464.0, 465.0, 448.0, -61439.0, 61440.0], np.float32)
    assert narrow(x, F8_E4M3).tolist() == [0x7F, 0x7F, 0x7E, 0xFE, 0x7E, 0x7E, 0x7E, 0xFE, 0x7E]
    e4m3 = narrow(x, F8_E4M3, fp8_overflow="nonfinite").tolist()
    assert e4m3 == [0x7F, 0x7F, 0x7F, 0x7F, 0x7E, 0x7F, 0x7E, 0x7F, 0x7F]
    assert narrow(x, F8_E5M2).tolist()[:4] == [0x7C, 0xFC, 0x7B, 0xFB]
    assert narrow(x, F8_E5M2).tolist()[-2:] == [0xFB, 0x7B]
    assert narrow(x, F8_E5M2, fp8_overflow="nonfinite").tolist()[2:4] == [0x7C, 0xFC]
    assert narrow(x, F8_E5M2, fp8_overflow="nonfinite").tolist()[-2:] == [0xFB, 0x7C]


@pytest.mark.parametrize(("dtype", "name"), [(BF16, "bfloat16"), (F16, "float16")], ids=["BF16", "F16"])
def test_torch_casts_alike(dtype, name):
    """torch's own cast from f32 gives our bits, NaN aside."""
    torch = pytest.importorskip("torch")
    x = np.concatenate([boundaries(dtype, np.float32), random_bits(F32, 100000, 2)])
    x = np.concatenate([x, -x])
    x = x[~np.isnan(x)]
    want = torch.from_numpy(x).to(getattr(torch, name)).view(torch.int16).numpy().view(np.uint16)
    assert_equal_codes(want, narrow(x, dtype), x)


def test_unknown_options_are_refused():
    x = np.ones(1, np.float32)
    with pytest.raises(ValueError, match="rounding='up'"):
        narrow(x, BF16, rounding="up")
    with pytest.raises(ValueError, match="fp8_overflow='wrap'"):
        narrow(x, F8_E4M3, fp8_overflow="wrap")


# --- fma -------------------------------------------------------------------------------------------------------------


def fma_operands(dtype: DType) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random bits, cancellation, halfway cases, subnormals and overflow; NaN and Inf aside."""
    rng = np.random.default_rng(6)
    fmt, kind = FORMATS[dtype], f"f{dtype.bits // 8}"
    edge = np.array([0, 1, 1 << fmt.mantissa, fmt.largest, fmt.bias << fmt.mantissa, (fmt.bias << fmt.mantissa) + 1])
    edge = edge.astype(f"u{dtype.bits // 8}").view(kind)
    edge = np.concatenate([edge, -edge])
    corners = np.array(list(itertools.product(edge, edge, edge)), kind).T
    bits = np.array([random_bits(dtype, 1500, seed) for seed in (7, 8, 9)])
    a, b = rng.normal(0, 1, 1000).astype(kind), rng.normal(0, 1, 1000).astype(kind)
    cancels = np.array([a, b, -(a * b)])
    # 1 + k * 2**-mantissa, plus half a last place, plus or minus almost nothing: wrong if the sum is rounded twice.
    c = (1 + rng.integers(0, 9, 1000) * 2.0**-fmt.mantissa).astype(kind)
    tiny = 2.0 ** -(fmt.mantissa + 1) * (1 + rng.choice([-1, 0, 1], 1000) * 2.0**-fmt.mantissa)
    halfway = np.array([tiny.astype(kind), (1 + rng.choice([-1, 0, 1], 1000) * 2.0**-fmt.mantissa).astype(kind), c])
    with np.errstate(over="ignore", under="ignore"):
        near_underflow = np.array([a * kind_scale(dtype), b * kind_scale(dtype), a * kind_scale(dtype) ** 2], kind)
    columns = np.concatenate([corners, bits, cancels, halfway, near_underflow], axis=1).astype(kind)
    columns = columns[:, np.isfinite(columns).all(axis=0)]
    return columns[0], columns[1], columns[2]


def kind_scale(dtype: DType) -> float:
    """A factor whose square is among the dtype's subnormals."""
    return 2.0 ** (-(FORMATS[dtype].bias + FORMATS[dtype].mantissa - 3) // 2)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_fma_rounds_once(dtype):
    """Against exact fractions, the sign of zero included."""
    a, b, c = fma_operands(dtype)
    got = (exact_fma.fma32 if dtype is F32 else exact_fma.fma64)(a, b, c)
    assert got.dtype == a.dtype
    want = []
    for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True):
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        minus = not exact and z == 0 and math.copysign(1, x) * math.copysign(1, y) == math.copysign(1, z) == -1
        code = FORMATS[dtype].sign if minus else rounded(exact, dtype)  # (-0) + (-0) is -0
        want.append(code)
    wide = np.array(want, np.uint64).astype(f"u{dtype.bits // 8}")
    assert_equal_codes(wide, got.view(wide.dtype), a)
    with np.errstate(all="ignore"):
        assert ((a * b + c) != got).sum() > 500, "the operands do not tell one rounding from two"


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fma_of_nan_and_inf(kind):
    inf, nan, big = np.inf, np.nan, np.finfo(kind).max
    a = np.array([inf, inf, 0, nan, big, big, 1, 1, inf, 1], kind)
    b = np.array([1, 1, inf, 1, big, 2, inf, nan, -1, 1], kind)
    c = np.array([-inf, 1, 1, 1, -inf, big, 1, 1, -inf, nan], kind)
    want = [nan, inf, nan, nan, -inf, inf, inf, nan, -inf, nan]
    assert np.array_equal(exact_fma.fma(a, b, c), np.array(want, kind), equal_nan=True)


# --- random words and stochastic rounding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors published with Random123 (kat_vectors, philox4x32 with 10 rounds)."""
    low, high = (int(w, 16) for w in key.split())
    got = reference.philox(np.array([int(w, 16) for w in counter.split()], np.uint32), low | high << 32)
    assert [f"{w:08x}" for w in got.tolist()] == words.split()


def test_the_word_of_an_element():
    """Element e: word (e // 16) % 4 of counter 16 * (e // 64) + e % 16, wherever the array starts."""
    key = philox_key(3, 0, "w")
    for first in (0, 5, 2**32 - 70, 2**34 - 70, 2**40):
        words = reference.random_words(key, first, 200)
        for i in (0, 1, 15, 16, 63, 64, 100, 199):
            e = first + i
            c = 16 * (e // 64) + e % 16
            four = reference.philox(np.array([c & 0xFFFFFFFF, c >> 32, 0, 0], np.uint32), key)
            assert words[i] == four[e // 16 % 4]
    assert len(set(reference.random_words(key, 0, 4096).tolist())) > 4090  # no word is used twice, chance aside


def test_philox_key():
    """Pinned, since it decides the bytes of outputs; and every argument counts."""
    assert philox_key(0, 0, "model.embed_tokens.weight") == 0x561084B37DBEFB0C
    keys = [philox_key(s, t, n) for s, t, n in itertools.product((0, 1, 2**64 - 1), (0, 1), ("a", "b", "ä"))]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**64 for key in keys)


def draws(x: float, dtype: DType, kind: str, keys: int = 64, numel: int = 1024) -> np.ndarray:
    """Stochastic roundings of one value: codes, over many keys and elements."""
    same = np.full(numel, x, kind)
    return np.concatenate([narrow(same, dtype, rounding="stochastic", key=philox_key(k, 0, "x")) for k in range(keys)])


@pytest.mark.parametrize("kind", ["f4", "f8"])
@small
def test_stochastic_rounding_is_unbiased(dtype, kind):
    """Only the two neighbours occur, the upper one as often as the distance says: within 5 standard errors.

    A binomial count of n draws has standard error sqrt(n p (1 - p)); 5 of them are exceeded once in 1.7 million tries,
    and the draws are the same in every run. Among the values are subnormals of the target and its smallest value.
    """
    values = finite_values(dtype)
    for i, share in [(0, 0.3), (1, 0.5), (3, 0.01), (40, 0.25), (77, 0.999), (100, 0.625)]:
        low, high = values[i], values[i + 1]
        x = float(np.dtype(kind).type(low + share * (high - low)))
        for sign in (1, -1):
            codes = draws(sign * x, dtype, kind)
            base = i | (FORMATS[dtype].sign if sign < 0 else 0)
            ups = int((codes == base + 1).sum())
            assert ups + int((codes == base).sum()) == codes.size, "neither neighbour"
            p = (x - low) / (high - low)
            assert abs(ups - codes.size * p) <= 5 * math.sqrt(codes.size * p * (1 - p)), (i, share, sign)


@small
def test_stochastic_rounding_keeps_what_fits(dtype):
    """Values of the dtype are not touched, whatever the words; nor are NaN, Inf and F32 to F32."""
    codes = all_codes(dtype)
    x = widen(codes.view(np.uint8), dtype)
    for key in range(3):
        for wide in (x, x.astype(np.float64)):
            assert np.array_equal(narrow(wide, dtype, rounding="stochastic", key=key), narrow(x, dtype))
        assert np.array_equal(narrow(x, F32, rounding="stochastic", key=key), narrow(x, F32))


def test_stochastic_rounding_at_the_ends_of_the_range():
    """Far below the smallest value nothing is rounded up but what should be; above the largest there is Inf."""
    assert set(draws(2.0**-33, F16, "f8").tolist()) == {0}  # 61 bits are dropped: 0 by definition
    assert set(draws(2.0**-32, F16, "f8").tolist()) == {0, 1}  # 60 bits, and 1 chance in 256
    assert set(draws(1e-300, F16, "f8").tolist()) == {0}
    assert set(draws(2.0**-24 * 0.5, F16, "f4").tolist()) == {0, 1}
    assert set(draws(65519.0, F16, "f4").tolist()) == {0x7BFF, 0x7C00}  # to nearest it would always be 65504
    assert set(draws(460.0, F8_E4M3, "f4").tolist()) == {0x7E}  # saturates
    assert set(draws(-np.inf, BF16, "f4").tolist()) == {0xFF80}


def test_drop_beyond_32_bits():
    """From f64 to bf16, 45 bits are dropped: the 13 below the random word are compared with zeros."""
    one_up = np.nextafter(np.full(4096, 1.0), 2)
    assert set(narrow(one_up, BF16, rounding="stochastic", key=1).tolist()) == {0x3F80}
    almost = np.nextafter(np.full(4096, 1.0078125), 0)
    assert set(narrow(almost, BF16, rounding="stochastic", key=1).tolist()) == {0x3F81}
