// The storage dtypes: how one element is widened to the compute type and narrowed from it. Nothing else.
// Host and device; every function is static, because each instruction set compiles its own copy and the linker
// must never pick one of them for all.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FI_HD __host__ __device__
#else
#define FI_HD
#endif
#define FI_INLINE FI_HD static inline __attribute__((always_inline, unused))

namespace fi {

// The numbers stand in fastinterp/ops/dtypes.py too.
enum class DType : int { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, F8_E4M3 = 4, F8_E5M2 = 5 };
constexpr int kDTypes = 6;

FI_INLINE int size_of(DType d) {
  return d == DType::F64 ? 8 : d == DType::F32 ? 4 : d == DType::F16 || d == DType::BF16 ? 2 : 1;
}

template <class To, class From>
FI_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast is between types of one size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FI_INLINE float canonical_nan(float x) { return x == x ? x : bit_cast<float>(0x7fc00000u); }
FI_INLINE double canonical_nan(double x) { return x == x ? x : bit_cast<double>(0x7ff8000000000000ull); }

// The policy for a finite value beyond an fp8 format's largest finite one.
struct Fp8Saturate {
  static constexpr bool kSaturate = true;
};
struct Fp8Nonfinite {
  static constexpr bool kSaturate = false;
};

// The layout of a small float: kMant mantissa bits, exponent bias, and the patterns of its special values.
template <DType D>
struct Format;
template <>
struct Format<DType::F64> {
  using Bits = uint64_t;
  static constexpr bool kFp8 = false;
};
template <>
struct Format<DType::F32> {
  using Bits = uint32_t;
  static constexpr int kMant = 23, kBias = 127;
  static constexpr uint32_t kInf = 0x7f800000u, kNan = 0x7fc00000u, kMax = 0x7f7fffffu, kSign = 0x80000000u;
  static constexpr bool kFp8 = false;
};
template <>
struct Format<DType::F16> {
  using Bits = uint16_t;
  static constexpr int kMant = 10, kBias = 15;
  static constexpr uint32_t kInf = 0x7c00, kNan = 0x7e00, kMax = 0x7bff, kSign = 0x8000;
  static constexpr bool kFp8 = false;
};
template <>
struct Format<DType::BF16> {
  using Bits = uint16_t;
  static constexpr int kMant = 7, kBias = 127;
  static constexpr uint32_t kInf = 0x7f80, kNan = 0x7fc0, kMax = 0x7f7f, kSign = 0x8000;
  static constexpr bool kFp8 = false;
};
template <>
struct Format<DType::F8_E4M3> {  // e4m3fn: no infinity, so an infinity is stored as NaN
  using Bits = uint8_t;
  static constexpr int kMant = 3, kBias = 7;
  static constexpr uint32_t kInf = 0x7f, kNan = 0x7f, kMax = 0x7e, kSign = 0x80;
  static constexpr bool kFp8 = true;
};
template <>
struct Format<DType::F8_E5M2> {
  using Bits = uint8_t;
  static constexpr int kMant = 2, kBias = 15;
  static constexpr uint32_t kInf = 0x7c, kNan = 0x7e, kMax = 0x7b, kSign = 0x80;
  static constexpr bool kFp8 = true;
};

// A choice that stays free of branches, which compilers would not turn into vectors.
FI_INLINE uint32_t choose(bool which, uint32_t yes, uint32_t no) { return no ^ ((no ^ yes) & (0u - uint32_t(which))); }

// ---- widen: exact ----------------------------------------------------------------------------------------------

// The magnitude's bits are moved to their position in float and the exponent is shifted to float's bias. A subnormal
// gets the exponent of the smallest normal number, and the leading 1 that this implies is taken off again, exactly.
// There is no branch, and no float subnormal, which some processors are slow at; specials retain their mantissa.
template <DType D>
FI_INLINE float widen_small(uint32_t b) {
  using F = Format<D>;
  const uint32_t mag = b & (F::kSign - 1), sign = b & F::kSign;
  constexpr int kSignShift = 31 - (F::kSign == 0x8000 ? 15 : 7);
  constexpr uint32_t kRebias = uint32_t(127 - F::kBias) << 23, kOne = 1u << 23;
  const bool subnormal = mag < (1u << F::kMant);
  const uint32_t shifted = (mag << (23 - F::kMant)) + choose(subnormal, kRebias + kOne, kRebias);
  const float value = bit_cast<float>(shifted) - bit_cast<float>(choose(subnormal, kRebias + kOne, 0));
  const uint32_t special = choose(mag >= F::kInf, 0x7f800000u, 0);
  return bit_cast<float>(bit_cast<uint32_t>(value) | special | (sign << kSignShift));
}
template <DType D>
FI_INLINE float widen_f32(typename Format<D>::Bits b) {
  if constexpr (D == DType::F32)
    return bit_cast<float>(b);
  else if constexpr (D == DType::BF16)
    return bit_cast<float>(uint32_t(b) << 16);
  else
    return widen_small<D>(b);
}

template <class T, DType D>
FI_INLINE T widen(typename Format<D>::Bits b) {
  if constexpr (D == DType::F64)
    return T(bit_cast<double>(b));
  else
    return T(widen_f32<D>(b));
}

// ---- narrow: one rounding --------------------------------------------------------------------------------------

template <class T>
struct Compute;
template <>
struct Compute<float> {
  using U = uint32_t;
  static constexpr int kMant = 23, kBias = 127;
  static constexpr U kInf = 0x7f800000u, kSign = 0x80000000u;
};
template <>
struct Compute<double> {
  using U = uint64_t;
  static constexpr int kMant = 52, kBias = 1023;
  static constexpr U kInf = 0x7ff0000000000000ull, kSign = 0x8000000000000000ull;
};

// Rounds a magnitude to format D. A unit in the last place (ulp) of D is 2^(field - bias - kMant), where `field` is the
// exponent's field or, where D is subnormal, that of D's smallest normal number. The result is the number of ulps,
// added to the exponent's bits, where a carry does the right thing by itself. `word` is the element's random word.
template <DType D, class Policy, bool kStochastic, class T>
FI_INLINE typename Format<D>::Bits round_to(T x, uint32_t word) {
  using F = Format<D>;
  using C = Compute<T>;
  using U = typename C::U;
  constexpr int kDrop = C::kMant - F::kMant;
  static_assert(kDrop > 0, "something is dropped");
  constexpr int kSignShift = 8 * int(sizeof(U) - sizeof(typename F::Bits));
  constexpr uint32_t kTop = F::kFp8 && Policy::kSaturate ? F::kMax : F::kMax + 1;  // what overflow becomes
  constexpr U kRebias = U(C::kBias - F::kBias) << F::kMant;
  constexpr U kLeast = (kRebias + (U(1) << F::kMant)) << kDrop;  // D's smallest normal number
  constexpr U kBound = (kRebias + kTop) << kDrop;                // the value that rounds to kTop without a remainder
  static_assert(F::kMax + 1 == F::kInf, "a carry out of the largest number is an infinity, in E4M3 a NaN");
  const U bits = bit_cast<U>(x), mag = bits & ~C::kSign;
  const uint32_t sign = uint32_t(bits >> kSignShift) & F::kSign;
  const U finite = mag < kBound ? mag : kBound;
  const U field = (finite & C::kInf) > kLeast ? finite & C::kInf : kLeast;
  U ulps;
  if constexpr (kStochastic) {
    // word / 2^32 is added to what lies below the last place, and only the carry matters.
    const int exponent = int(finite >> C::kMant);
    const U implicit = exponent ? U(1) << C::kMant : 0;
    const U sig = (finite & ((U(1) << C::kMant) - 1)) | implicit;
    const int drop = kDrop + int(field >> C::kMant) - (exponent ? exponent : 1);
    const int d = drop > 60 ? 60 : drop;
    const U sig_or_zero = drop > 60 ? U(0) : sig;
    const uint32_t below = d < 32 ? uint32_t(sig_or_zero << (32 - d)) : uint32_t(sig_or_zero >> (d - 32));
    const uint32_t carry = uint32_t(below + word) < word ? 1 : 0;
    ulps = (d < int(8 * sizeof(U)) ? sig_or_zero >> d : U(0)) + carry;
  } else {
    // Next to a number whose last place is D's, the sum's own rounding, to nearest even, is the one wanted.
    const U large = field + (U(kDrop) << C::kMant);
    ulps = bit_cast<U>(T(bit_cast<T>(finite) + bit_cast<T>(large))) - large;
  }
  uint32_t out = uint32_t((field - kLeast) >> kDrop) + uint32_t(ulps);
  if (kTop != F::kInf) out = choose(mag >= C::kInf, F::kInf, out);
  const bool nan = D == DType::F8_E4M3 ? out == F::kNan : mag > C::kInf;
  return typename F::Bits(choose(nan, F::kNan, out | sign));
}

// bf16 has float's exponent, so rounding is one integer addition. vcvtneps2bf16 is not used: it flushes subnormals.
FI_INLINE uint16_t bf16_nearest(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

FI_INLINE uint16_t bf16_stochastic(float x, uint32_t word) {
  const uint32_t u = bit_cast<uint32_t>(x);
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : (u + (word >> 16)) >> 16);
}

template <DType D, class Policy, bool kStochastic, class T>
FI_INLINE typename Format<D>::Bits narrow(T x, uint32_t word) {
  if constexpr (D == DType::F64)
    return bit_cast<uint64_t>(canonical_nan(double(x)));
  else if constexpr (D == DType::F32 && sizeof(T) == 4)
    return bit_cast<uint32_t>(canonical_nan(float(x)));
  else if constexpr (D == DType::F32 && !kStochastic)
    return bit_cast<uint32_t>(canonical_nan(float(x)));  // the conversion rounds once, to nearest even
  else if constexpr (D == DType::BF16 && !kStochastic && sizeof(T) == 4)
    return bf16_nearest(x);
  else if constexpr (D == DType::BF16 && sizeof(T) == 4)
    return bf16_stochastic(x, word);
  else
    return round_to<D, Policy, kStochastic>(x, word);
}

}  // namespace fi
