// Units of elements of a kernel's inputs: loaded as vectors, all of them first, and widened later.
#pragma once

#include "sums.h"
#include "tasks.h"

namespace fi {
namespace cuda {

constexpr int kAnyDType = -1;  // in the place of a DType that is known when a kernel is compiled

// The bits of a unit. kSame: its dtype, or kAnyDType; then T is double where it may be F64.
template <class T, int kSame>
struct Raw {
  static constexpr int kWords = kSame == kAnyDType ? 2 * int(sizeof(T)) : [] {
    return 2 * int(sizeof(typename Format<DType(kSame == kAnyDType ? 0 : kSame)>::Bits));
  }();
  uint32_t w[kWords] = {};
};

// Loads a unit whose elements all exist, if `wanted`, else zeros. Its address is a multiple of 16, or of the unit's
// size if that is less. No branch: loads of several inputs are in flight together.
template <class T, int kSame>
FI_DEVICE void load_unit(DType dtype, const void* x, int64_t i, bool wanted, Raw<T, kSame>* to) {
  constexpr int kWords = Raw<T, kSame>::kWords;
  *to = Raw<T, kSame>();
  if constexpr (kSame != kAnyDType) {
    const char* const at = static_cast<const char*>(x) + i * (kWords / 2);
    if constexpr (kWords == 2)
      load_once_if(wanted, at, to->w, to->w + 1);
    else
      for (int v = 0; v < kWords / 4; ++v) load_once_if(wanted, at + 16 * v, to->w + 4 * v);
  } else {
    const int size = size_of(dtype);
    const char* const at = static_cast<const char*>(x) + i * size;
    load_once_if(wanted && size == 1, at, to->w, to->w + 1);
    for (int v = 0; v < kWords / 4; ++v) load_once_if(wanted && size > 2 * v && size > 1, at + 16 * v, to->w + 4 * v);
  }
}

template <class T, DType D, class R>
FI_DEVICE void widen_unit_of(const R& raw, T* to) {
  using Bits = typename Format<D>::Bits;
  if constexpr (2 * int(sizeof(Bits)) <= R::kWords) {
    constexpr int kEach = 4 / int(sizeof(Bits));  // elements of a word; 0 of F64
    for (int j = 0; j < kUnit; ++j) {
      if constexpr (kEach == 0)
        to[j] = widen<T, D>(raw.w[2 * j] | uint64_t(raw.w[2 * j + 1]) << 32);
      else
        to[j] = widen_fast<T, D>(Bits(raw.w[j / kEach] >> (8 * int(sizeof(Bits)) * (j % kEach)) % 32));
    }
  }
}

template <class T, int kSame>
FI_DEVICE void widen_unit(DType dtype, const Raw<T, kSame>& raw, T* to) {
  if constexpr (kSame != kAnyDType) {
    widen_unit_of<T, DType(kSame)>(raw, to);
  } else {
    switch (dtype) {
      case DType::F64:
        return widen_unit_of<T, DType::F64>(raw, to);
      case DType::F32:
        return widen_unit_of<T, DType::F32>(raw, to);
      case DType::F16:
        return widen_unit_of<T, DType::F16>(raw, to);
      case DType::BF16:
        return widen_unit_of<T, DType::BF16>(raw, to);
      case DType::F8_E4M3:
        return widen_unit_of<T, DType::F8_E4M3>(raw, to);
      default:
        return widen_unit_of<T, DType::F8_E5M2>(raw, to);
    }
  }
}

// Elements [i, i + n) of the unit that begins with i, 0 for the rest of it. n: at most kUnit; any address.
template <class T>
FI_DEVICE void unit(DType dtype, const void* x, int64_t i, int n, T* to) {
  const int size = size_of(dtype), bytes = kUnit * size;
  if (n == kUnit && (uintptr_t(x) + uintptr_t(i) * uintptr_t(size)) % uintptr_t(bytes < 16 ? bytes : 16) == 0) {
    Raw<T, kAnyDType> raw;
    load_unit(dtype, x, i, true, &raw);
    return widen_unit(dtype, raw, to);
  }
#pragma unroll 1
  for (int j = 0; j < kUnit; ++j) {
    const T value = j < n ? widen_any<T>(dtype, x, i + j) : T(0);
#pragma unroll
    for (int k = 0; k < kUnit; ++k)  // an index that is not known would put the unit into slow local memory
      if (k == j) to[k] = value;
  }
}

// Whether the units of a piece that begins with element `first` of its tensor lie where load_unit needs them.
inline bool has_units(const void* x, DType dtype, int64_t first) {
  const int64_t size = size_of(dtype), bytes = kUnit * size;
  return (int64_t(uintptr_t(x)) - first * size) % (bytes < 16 ? bytes : 16) == 0;
}

}  // namespace cuda
}  // namespace fi
