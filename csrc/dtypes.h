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

// The numbers stand in fastinterp/compute/dtypes.py too.
enum class DType : int { F64 = 0, F32 = 1, F16 = 2, BF16 = 3, F8_E4M3 = 4, F8_E5M2 = 5 };
constexpr int kDTypes = 6;

FI_INLINE int size_of(DType d) {
  return d == DType::F64 ? 8 : d == DType::F32 ? 4 : d == DType::F16 || d == DType::BF16 ? 2 : 1;
}

template <class To, class From>
FI_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

FI_INLINE float canonical_nan(float x) { return x == x ? x : bit_cast<float>(0x7fc00000u); }
FI_INLINE double canonical_nan(double x) { return x == x ? x : bit_cast<double>(0x7ff8000000000000ull); }

// What to do with a finite value beyond an fp8 format's largest finite one.
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

// ---- widen: exact ----------------------------------------------------------------------------------------------

// The magnitude's bits, moved to float's mantissa, are the value times 2^(bias - 127), subnormals included; one exact
// multiplication by a power of two puts the exponent right.
template <DType D>
FI_INLINE float widen_small(uint32_t b) {
  using F = Format<D>;
  const uint32_t mag = b & (F::kSign - 1), sign = b & F::kSign;
  constexpr int kSignShift = 31 - (F::kSign == 0x8000 ? 15 : 7);
  constexpr uint32_t kScale = uint32_t(127 + 127 - F::kBias) << 23;
  const float scaled = bit_cast<float>(mag << (23 - F::kMant)) * bit_cast<float>(kScale);
  uint32_t bits = bit_cast<uint32_t>(scaled);
  if (D == DType::F8_E4M3)
    bits = mag == F::kNan ? 0x7fc00000u : bits;
  else
    bits = mag >= F::kInf ? 0x7f800000u | (mag << (23 - F::kMant)) : bits;
  return bit_cast<float>(bits | (sign << kSignShift));
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

// Integer rounding of a magnitude to format D: the significand loses its low `drop` bits, more of them where D is
// subnormal, and a carry runs into the exponent by itself. `word` is the element's random word, used when kStochastic.
template <DType D, class Policy, bool kStochastic, class T>
FI_INLINE typename Format<D>::Bits round_to(T x, uint32_t word) {
  using F = Format<D>;
  using C = Compute<T>;
  using U = typename C::U;
  static_assert(C::kMant > F::kMant, "something is dropped");
  const U bits = bit_cast<U>(x), mag = bits & ~C::kSign;
  const uint32_t sign = (bits & C::kSign) ? F::kSign : 0;
  const int field = int(mag >> C::kMant);
  const U implicit = field ? U(1) << C::kMant : 0;
  const U sig = (mag & ((U(1) << C::kMant) - 1)) | implicit;
  const int exponent = (field ? field : 1) - C::kBias + F::kBias;  // biased as in D; below 1: D is subnormal there
  const int target = exponent < 1 ? 1 : exponent;
  const int drop = C::kMant - F::kMant + (target - exponent);
  U q;
  if constexpr (kStochastic) {
    const int d = drop > 60 ? 60 : drop;
    const uint64_t noise = d <= 32 ? uint64_t(word) >> (32 - d) : uint64_t(word) << (d - 32);
    q = drop > 60 ? U(0) : U((uint64_t(sig) + noise) >> d);
  } else {
    // Beyond kMant + 2 dropped bits the value is under half of D's smallest subnormal: it rounds to 0 all the same.
    const int d = drop > C::kMant + 2 ? C::kMant + 2 : drop;
    const U below_half = (U(1) << (d - 1)) - 1, odd = (sig >> d) & 1;
    q = (sig + below_half + odd) >> d;
  }
  U out = (U(target - 1) << F::kMant) + q;
  const uint32_t over = F::kFp8 && Policy::kSaturate ? F::kMax : F::kInf;
  out = out > F::kMax ? over : out;
  if (mag == C::kInf) out = F::kInf;
  out = out | sign;
  if (D == DType::F8_E4M3 && (out & 0x7f) == 0x7f) out = F::kNan;
  if (mag > C::kInf) out = F::kNan;
  return typename F::Bits(out);
}

// bf16 keeps float's exponent, so rounding is one integer addition. vcvtneps2bf16 is not used: it flushes subnormals.
FI_INLINE uint16_t bf16_nearest(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
  return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
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
  else
    return round_to<D, Policy, kStochastic>(x, word);
}

}  // namespace fi
