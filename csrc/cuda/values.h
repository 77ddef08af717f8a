// Units of elements of a kernel's inputs.
#pragma once

#include "sums.h"
#include "tasks.h"

namespace fi {
namespace cuda {

// Elements [i, i + n) of the unit that begins with i, 0 for the rest of it.
template <class T, DType D>
FI_DEVICE void unit(const void* x, int64_t i, int n, T* to) {
  using Bits = typename Format<D>::Bits;
  const char* const at = static_cast<const char*>(x) + i * int64_t(sizeof(Bits));
  constexpr int kBytes = kUnit * int(sizeof(Bits)), kVector = kBytes < 16 ? kBytes : 16;
  if (n == kUnit && uintptr_t(at) % kVector == 0) {
    if constexpr (kBytes < 16) {
      const uint64_t all = load_bits<uint64_t>(at);
      for (int j = 0; j < kUnit; ++j) to[j] = widen<T, D>(Bits(all >> (8 * j)));
    } else {
      constexpr int kEach = 16 / int(sizeof(Bits));
      for (int v = 0; v < kBytes / 16; ++v) {
        const Vector16 all = load_once(at + 16 * v);
        Bits bits[kEach];
        memcpy(bits, &all, sizeof bits);
        for (int j = 0; j < kEach; ++j) to[v * kEach + j] = widen<T, D>(bits[j]);
      }
    }
    return;
  }
  for (int j = 0; j < kUnit; ++j) to[j] = j < n ? widen_at<T, D>(x, i + j) : T(0);
}

// T is double where it may be F64.
template <class T>
FI_DEVICE void unit(DType dtype, const void* x, int64_t i, int n, T* to) {
  switch (dtype) {
    case DType::F64:
      if constexpr (sizeof(T) == 8) unit<T, DType::F64>(x, i, n, to);
      return;
    case DType::F32:
      return unit<T, DType::F32>(x, i, n, to);
    case DType::F16:
      return unit<T, DType::F16>(x, i, n, to);
    case DType::BF16:
      return unit<T, DType::BF16>(x, i, n, to);
    case DType::F8_E4M3:
      return unit<T, DType::F8_E4M3>(x, i, n, to);
    default:
      return unit<T, DType::F8_E5M2>(x, i, n, to);
  }
}

}  // namespace cuda
}  // namespace fi
