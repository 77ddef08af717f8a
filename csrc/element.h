// The numeric contract for one element, host and device. Each line here decides output bits: see docs/NUMERICS.md.
#pragma once

#include "ops.h"

namespace fi {

FI_INLINE float fma_once(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FI_INLINE double fma_once(double a, double b, double c) { return __builtin_fma(a, b, c); }

// acc += w * (x - p): one rounding for the difference, one for the product and sum together.
template <class T>
FI_INLINE T add_term(T w, T x, T p, T acc) {
  return fma_once(w, x - p, acc);
}

// total * p + acc. A total of 1 needs no product: p + acc is the same number, and cheaper.
template <class T>
FI_INLINE T add_pivot(T total, T p, T acc) {
  return fma_once(total, p, acc);
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011). Element e of a tensor takes word (e / 16) % 4 of the counter
// 16 * (e / 64) + e % 16: sixteen counters serve 64 elements, so that a 16-lane unit needs no transposition.
constexpr int kPhiloxGroup = 64, kPhiloxLanes = 16;

template <class W>
struct PhiloxWords {
  W w[4];
};

// W is uint64_t, or a vector of them; product(c, k) multiplies the low half of each element of c by k. Words are in the
// low halves, and what the high halves hold does not matter.
template <class W, class Product>
FI_INLINE PhiloxWords<W> philox(W counter, uint64_t key, Product product) {
  W c0 = counter, c1 = counter >> 32, c2 = counter ^ counter, c3 = c2;
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const W a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ k0;
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ k1;
    c3 = a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fi
