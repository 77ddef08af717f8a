// The numeric contract for one element, host and device. Each line here decides output bits: see docs/NUMERICS.md.
#pragma once

#include "ops.h"

namespace fi {

#ifdef __CUDA_ARCH__
FI_INLINE float fma_once(float a, float b, float c) { return __fmaf_rn(a, b, c); }
FI_INLINE double fma_once(double a, double b, double c) { return __fma_rn(a, b, c); }
#else
FI_INLINE float fma_once(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FI_INLINE double fma_once(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

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

// Choices as bits, because compilers make branches of others, and no vectors then.
FI_INLINE uint64_t ones_if(bool which) { return 0 - uint64_t(which); }

// e^x for x <= 0 to 1e-15 of itself, 0 below -708: x = k ln 2 + r, and Taylor's series. Written out, because compilers
// find no vectors in a loop over the terms.
FI_INLINE double exp_once(double x) {
  const double shifted = fma_once(x, 0x1.71547652b82fep+0, 0x1.8p+52), k = shifted - 0x1.8p+52;
  const double r = fma_once(k, -0x1.a39ef35793c76p-33, fma_once(k, -0x1.62e42fee00000p-1, x));
  double y = 1.0 / 6227020800;
  y = fma_once(y, r, 1.0 / 479001600);
  y = fma_once(y, r, 1.0 / 39916800);
  y = fma_once(y, r, 1.0 / 3628800);
  y = fma_once(y, r, 1.0 / 362880);
  y = fma_once(y, r, 1.0 / 40320);
  y = fma_once(y, r, 1.0 / 5040);
  y = fma_once(y, r, 1.0 / 720);
  y = fma_once(y, r, 1.0 / 120);
  y = fma_once(y, r, 1.0 / 24);
  y = fma_once(y, r, 1.0 / 6);
  y = fma_once(y, r, 1.0 / 2);
  y = fma_once(y, r, 1.0);
  y = fma_once(y, r, 1.0);
  y = bit_cast<double>(bit_cast<uint64_t>(y) + (bit_cast<uint64_t>(shifted) << 52));
  const uint64_t bits = bit_cast<uint64_t>(y) & ~ones_if(x < -708.0), nan = ones_if(x != x);
  return bit_cast<double>((bits & ~nan) | (bit_cast<uint64_t>(x) & nan));
}

// ln x for normal x > 0 to 1e-15 of itself: x = 2^k z with z about 1, and the series of artanh.
FI_INLINE double log_once(double x) {
  constexpr uint64_t kHalfRoot = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  const uint64_t u = bit_cast<uint64_t>(x) + (0x3ff0000000000000 - kHalfRoot);
  const double k = bit_cast<double>((u >> 52) | 0x4330000000000000) - (0x1p+52 + 1023.0);
  const double z = bit_cast<double>((u & 0xfffffffffffff) + kHalfRoot), s = (z - 1.0) / (z + 1.0), q = s * s;
  double y = 1.0 / 21;
  y = fma_once(y, q, 1.0 / 19);
  y = fma_once(y, q, 1.0 / 17);
  y = fma_once(y, q, 1.0 / 15);
  y = fma_once(y, q, 1.0 / 13);
  y = fma_once(y, q, 1.0 / 11);
  y = fma_once(y, q, 1.0 / 9);
  y = fma_once(y, q, 1.0 / 7);
  y = fma_once(y, q, 1.0 / 5);
  y = fma_once(y, q, 1.0 / 3);
  const double twice = s + s, ln_z = fma_once(twice * q, y, twice);
  const double ln_x = fma_once(k, 0x1.62e42fee00000p-1, fma_once(k, 0x1.a39ef35793c76p-33, ln_z));
  const uint64_t nan = ones_if(x != x);
  return bit_cast<double>((bit_cast<uint64_t>(ln_x) & ~nan) | (bit_cast<uint64_t>(x) & nan));
}

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011). Element e of a tensor takes word (e / 16) % 4 of the counter
// 16 * (e / 64) + e % 16: sixteen counters serve 64 elements, so that a 16-lane unit needs no transposition.
constexpr int kPhiloxGroup = 64, kPhiloxLanes = 16;

constexpr int kPhiloxRounds = 10;

// The key of each round, in memory: vector units take it from there.
struct PhiloxKeys {
  uint64_t low[kPhiloxRounds], high[kPhiloxRounds];
  FI_HD explicit PhiloxKeys(uint64_t key) {
    uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      low[round] = k0;
      high[round] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

template <class W>
struct PhiloxWords {
  W w[4];
};

// W is uint64_t, or a vector of them; product(c, k) multiplies the low half of each element of c by k. Words are in the
// low halves, and what the high halves hold does not matter.
// `space`: 0 or 1, the third word of the counter.
template <class W, class Product>
FI_INLINE PhiloxWords<W> philox(W counter, const PhiloxKeys& keys, Product product, uint32_t space = 0) {
  W c0 = counter, c1 = counter >> 32, c3 = counter ^ counter, c2 = c3 | space;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const W a = product(c0, 0xD2511F53u), b = product(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ keys.low[round];
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ keys.high[round];
    c3 = a;
  }
  return {{c0, c1, c2, c3}};
}

// The random number of a mask test has two halves of 16 bits. Element e takes them from word (e / 16) % 4 of the
// counter 16 * (e / 128) + e % 16, in space 0 its high half and in space 1 its low half: of the word the low half if e
// % 128 < 64, else the high one. The low half is looked at only where the high one equals that of the limit.
constexpr int kMaskGroup = 2 * kPhiloxGroup;

FI_INLINE uint32_t low_half(int64_t e, uint64_t key) {
  const uint64_t counter = uint64_t(e / kMaskGroup) * kPhiloxLanes + uint64_t(e % kPhiloxLanes);
  const auto product = [](uint64_t c, uint32_t k) { return (c & 0xffffffffu) * k; };
  const uint32_t word = uint32_t(philox(counter, PhiloxKeys(key), product, 1).w[e / kPhiloxLanes % 4]);
  return e % kMaskGroup < kPhiloxGroup ? word & 0xffffu : word >> 16;
}

// Whether the random number of element e, whose high half is `high`, is below a limit of 0..2^32.
FI_INLINE bool is_below(uint32_t high, uint64_t limit, int64_t e, uint64_t key) {
  if (high != limit >> 16) return high < limit >> 16;
  return (limit & 0xffffu) != 0 && low_half(e, key) < (limit & 0xffffu);
}

}  // namespace fi
