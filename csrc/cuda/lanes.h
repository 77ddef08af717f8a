// Sums of rule 7 of docs/NUMERICS.md: lanes fold within a block.
#pragma once

#include "../ops.h"
#include "grid.h"

namespace fi {
namespace cuda {

// The kCount sums of each thread fold over the threads of the block, kLanes of them, in adjacent pairs: that of sum s
// is lanes[s * kLanes] afterwards. lanes: shared memory for kCount * kLanes numbers, that nobody uses any more.
template <int kCount>
FI_DEVICE void fold_lanes(const double* sum, double* lanes) {
  const uint32_t t = thread_index();
  sync_threads();
  for (int s = 0; s < kCount; ++s) lanes[s * kLanes + t] = sum[s];
  for (uint32_t step = 1; step < kLanes; step *= 2) {
    sync_threads();
    const uint32_t pairs = kLanes / (2 * step);
    for (uint32_t i = t; i < kCount * pairs; i += kLanes) {
      double* const at = lanes + i / pairs * kLanes + i % pairs * 2 * step;
      at[0] += at[step];
    }
  }
  sync_threads();
}

}  // namespace cuda
}  // namespace fi
