// Sums of one dtype, rounded to nearest, of aligned operands: 16 bytes at a time.
#pragma once

#include "sums.h"

namespace fi {
namespace cuda {

constexpr int kFastThreads = 256;

// Vectors of each input that a thread loads before it needs the first, and blocks in a multiprocessor: with both, 48
// KiB and more are under way in it.
template <int N>
constexpr int kUnroll = N == 1   ? 4
                        : N == 2 ? 2
                                 : 1;
template <int N>
constexpr int kResident = N == 3   ? 4
                          : N <= 5 ? 3
                                   : 2;

template <DType D>
constexpr int kElements = 16 / int(sizeof(typename Format<D>::Bits));  // of a vector

template <DType D>
FI_DEVICE typename Format<D>::Bits element_of(const Vector16& v, int e) {
  if constexpr (sizeof(typename Format<D>::Bits) == 4)
    return v.w[e];
  else
    return uint16_t(v.w[e / 2] >> (16 * (e % 2)));
}

// One row of one vector, of which x[0] is the pivot; the row has `total`, and w[i] of x[i] if bit i of `terms` is set.
// `nonfinite` becomes true where a NaN or an infinity is stored.
template <DType D, int N, class Row>
FI_DEVICE Vector16 fast_sum(const Row& row, const Vector16 (&x)[N], bool* nonfinite) {
  constexpr int kE = kElements<D>;
  float p[kE], acc[kE];
#pragma unroll
  for (int e = 0; e < kE; ++e) {
    p[e] = widen_fast<float, D>(element_of<D>(x[0], e));
    acc[e] = 0;
  }
#pragma unroll
  for (int i = 1; i < N; ++i)
    if (row.terms >> i & 1)
#pragma unroll
      for (int e = 0; e < kE; ++e)
        acc[e] = add_term(row.w[i], widen_fast<float, D>(element_of<D>(x[i], e)), p[e], acc[e]);
  Vector16 y{};
#pragma unroll
  for (int e = 0; e < kE; ++e) {
    const uint32_t code = narrow_fast<D>(add_pivot(row.total, p[e], acc[e]));
    *nonfinite = *nonfinite || (code & Format<D>::kInf) == Format<D>::kInf;
    if constexpr (kE == 4)
      y.w[e] = code;
    else
      y.w[e / 2] |= code << (16 * (e % 2));
  }
  return y;
}

}  // namespace cuda
}  // namespace fi
