// Magnitudes, scores and random masks in kernels: rules 10 and 13 of docs/NUMERICS.md.
#pragma once

#include "sums.h"
#include "tasks.h"

namespace fi {
namespace cuda {

template <class T>
FI_DEVICE uint32_t magnitude(T d) {
  const uint32_t mag = bit_cast<uint32_t>(float(d)) & kMostMagnitude;
  return mag > 0x7f800000u ? kMostMagnitude : mag;
}

FI_DEVICE bool in_range(const MaskRange& test, uint32_t mag) { return mag - test.min_bits <= test.span; }

// A thread has the elements of one counter of a random test's numbers: 128 * group + 64 * h + 16 * w + lane of the
// tensor, h = 0, 1 and w = 0..3. Bit 4 * h + w of the result: whether that element passes the test's limit.
constexpr int kCounterElements = kMaskGroup / kPhiloxLanes;

FI_DEVICE uint32_t drawn_by(const MaskRange& test, int64_t group, uint32_t lane) {
  if (test.limit >= kWords) return 0xff;
  const auto product = [](uint64_t c, uint32_t k) { return (c & 0xffffffffu) * k; };
  const uint64_t counter = uint64_t(group) * kPhiloxLanes + lane;
  const PhiloxKeys keys(test.key);
  const PhiloxWords<uint64_t> high = philox(counter, keys, product);
  const uint32_t limit = uint32_t(test.limit >> 16), rest = uint32_t(test.limit) & 0xffffu;
  uint32_t below = 0, equal = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t half = uint32_t(high.w[w]) >> (16 * h) & 0xffffu;
      below |= uint32_t(half < limit) << (4 * h + w);
      equal |= uint32_t(half == limit) << (4 * h + w);
    }
  if (equal == 0 || rest == 0) return below;
  const PhiloxWords<uint64_t> low = philox(counter, keys, product, 1);
#pragma unroll
  for (int w = 0; w < 4; ++w)
#pragma unroll
    for (int h = 0; h < 2; ++h)
      below |= uint32_t((uint32_t(low.w[w]) >> (16 * h) & 0xffffu) < rest) << (4 * h + w) & equal;
  return below;
}

// The score of element e of the tensor from delta(t), t < terms. kMost: how many terms there may be, 0 for any number.
template <class T, int kMost, class Delta>
FI_DEVICE T score_of(const ScoreTask& score, int terms, int64_t e, Delta delta) {
  if (score.kind == Score::kDivergence) {
    const T d = delta(0);
    return (d < 0 ? -d : d) * T(score.factors[e / score.columns - score.first_row]);
  }
  T mean = 0, sum = 0;
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < (kMost ? kMost : terms); ++t)
    if (t < terms) mean += delta(t);
  mean /= T(terms);
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < (kMost ? kMost : terms); ++t) {
    if (t >= terms) continue;
    const T away = delta(t) - mean;
    sum = fma_once(away, away, sum);
  }
  return sum;
}

}  // namespace cuda
}  // namespace fi
