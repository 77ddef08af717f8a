// Storing of outputs, and statistics of sampled chunks, for masked sums and sums by group.
#pragma once

#include "sums.h"
#include "tasks.h"

namespace fi {
namespace cuda {

FI_DEVICE Store store_of(const OutputTask& to, bool stochastic) { return {to.dtype, stochastic, to.fp8_saturate}; }

constexpr int kSampleThreads = 256;

// The sums of a block's threads over its chunk.
struct Sampling {
  double sampled = 0, changed = 0, pp = 0, dd = 0, od = 0;

  // An element: its pivot, what it was intended to move by, and where it was stored.
  template <class T>
  FI_HD void take(T p, T intended, T stored, bool differs) {
    const T moved = stored - p;
    sampled += 1;
    changed += differs;
    pp += double(p) * double(p);
    dd += double(intended) * double(intended);
    od += double(moved) * double(intended);
  }
};

// Adds the sums of a block's threads and stores the block's sample. Called by all threads of the block, which has chunk
// `block_index()` of those that are sampled.
FI_DEVICE void store_sample(const OutputStats& stats, const Sampling& sampling) {
  FI_SHARED double sums[5][kSampleThreads];
  const uint32_t me = thread_index();
  sums[0][me] = sampling.sampled, sums[1][me] = sampling.changed, sums[2][me] = sampling.pp, sums[3][me] = sampling.dd,
  sums[4][me] = sampling.od;
  for (uint32_t half = kSampleThreads / 2; half > 0; half /= 2) {
    sync_threads();
    if (me < half)
      for (int j = 0; j < 5; ++j) sums[j][me] += sums[j][me + half];
  }
  if (me == 0)
    stats.samples[block_index()] = {int64_t(sums[0][0]), int64_t(sums[1][0]), sums[2][0], sums[3][0], sums[4][0]};
}

}  // namespace cuda
}  // namespace fi
