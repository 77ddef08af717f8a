// Elements of any dtype at any address: loads as float32 or float64, and stores of sums.
#pragma once

#include "../element.h"
#include "table.h"

namespace fi {
namespace cuda {

// f16 by the device's conversions, which round to nearest even and preserve subnormals.
template <class T, DType D>
FI_DEVICE T widen_fast(typename Format<D>::Bits b) {
#ifdef __CUDA_ARCH__
  if constexpr (D == DType::F16) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(b));
    return T(x);
  }
#endif
  return widen<T, D>(b);
}

template <DType D>
FI_DEVICE typename Format<D>::Bits narrow_fast(float y) {
#ifdef __CUDA_ARCH__
  if constexpr (D == DType::F16) {
    uint16_t b;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(b) : "f"(y));
    return y == y ? b : uint16_t(Format<D>::kNan);
  }
#endif
  return narrow<D, Fp8Saturate, false>(y, 0u);
}

template <class T, DType D>
FI_DEVICE T widen_at(const void* x, int64_t i) {
  using Bits = typename Format<D>::Bits;
  return widen<T, D>(load_bits<Bits>(static_cast<const Bits*>(x) + i));
}

// Element i of an array. T is double where it may be F64.
template <class T>
FI_DEVICE T widen_any(DType dtype, const void* x, int64_t i) {
  switch (dtype) {
    case DType::F64:
      if constexpr (sizeof(T) == 8) return widen_at<T, DType::F64>(x, i);
      return T(0);
    case DType::F32:
      return widen_at<T, DType::F32>(x, i);
    case DType::F16:
      return widen_at<T, DType::F16>(x, i);
    case DType::BF16:
      return widen_at<T, DType::BF16>(x, i);
    case DType::F8_E4M3:
      return widen_at<T, DType::F8_E4M3>(x, i);
    default:
      return widen_at<T, DType::F8_E5M2>(x, i);
  }
}

// The dtype and rounding of a row's output.
struct Store {
  DType dtype;
  bool stochastic, fp8_saturate;
};

template <DType D, class Policy, class T>
FI_DEVICE uint64_t code_by(bool stochastic, T y, uint32_t word) {
  return stochastic ? uint64_t(narrow<D, Policy, true>(y, word)) : uint64_t(narrow<D, Policy, false>(y, word));
}

// The bits that y is stored as.
template <class T>
FI_DEVICE uint64_t code_of(const Store& store, T y, uint32_t word) {
  switch (store.dtype) {
    case DType::F64:
      return narrow<DType::F64, Fp8Saturate, false>(y, word);
    case DType::F32:
      return code_by<DType::F32, Fp8Saturate>(store.stochastic, y, word);
    case DType::F16:
      return code_by<DType::F16, Fp8Saturate>(store.stochastic, y, word);
    case DType::BF16:
      return code_by<DType::BF16, Fp8Saturate>(store.stochastic, y, word);
    case DType::F8_E4M3:
      return store.fp8_saturate ? code_by<DType::F8_E4M3, Fp8Saturate>(store.stochastic, y, word)
                                : code_by<DType::F8_E4M3, Fp8Nonfinite>(store.stochastic, y, word);
    default:
      return store.fp8_saturate ? code_by<DType::F8_E5M2, Fp8Saturate>(store.stochastic, y, word)
                                : code_by<DType::F8_E5M2, Fp8Nonfinite>(store.stochastic, y, word);
  }
}

FI_DEVICE void store_any(DType dtype, void* x, int64_t i, uint64_t code) {
  switch (size_of(dtype)) {
    case 8:
      return store_bits(static_cast<uint64_t*>(x) + i, code);
    case 4:
      return store_bits(static_cast<uint32_t*>(x) + i, uint32_t(code));
    case 2:
      return store_bits(static_cast<uint16_t*>(x) + i, uint16_t(code));
    default:
      return store_bits(static_cast<uint8_t*>(x) + i, uint8_t(code));
  }
}

FI_DEVICE uint64_t load_any(DType dtype, const void* x, int64_t i) {
  switch (size_of(dtype)) {
    case 8:
      return load_bits<uint64_t>(static_cast<const uint64_t*>(x) + i);
    case 4:
      return load_bits<uint32_t>(static_cast<const uint32_t*>(x) + i);
    case 2:
      return load_bits<uint16_t>(static_cast<const uint16_t*>(x) + i);
    default:
      return load_bits<uint8_t>(static_cast<const uint8_t*>(x) + i);
  }
}

template <class T>
FI_DEVICE bool is_finite(T x) {
  return x - x == 0;
}

FI_DEVICE void count_one(double x, int64_t* nan, int64_t* inf) {
  if (x != x)
    atomic_add(nan, 1);
  else if (!is_finite(x))
    atomic_add(inf, 1);
}

// Philox words of elements 64 * group + 16 * w + lane of a tensor, w = 0..3.
FI_DEVICE PhiloxWords<uint64_t> words_of(int64_t group, uint32_t lane, uint64_t key) {
  const auto product = [](uint64_t c, uint32_t k) { return (c & 0xffffffffu) * k; };
  return philox(uint64_t(group) * kPhiloxLanes + lane, PhiloxKeys(key), product);
}

}  // namespace cuda
}  // namespace fi
