// Sums of rule 7 of docs/NUMERICS.md: lanes fold within a block, and what blocks found folds in memory.
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

// Numbers, `width` of each of `count` parts, one part after the other, of each of `rows` rows: parts fold in adjacent
// pairs, an odd one carried, to one of each row.
struct FoldTask {
  int64_t rows, count, width;
};

// How many numbers fold_parts needs room for beside them.
int64_t fold_scratch(const FoldTask& task);

// Returns where the folded numbers will be, rows * width: at `parts`, which is overwritten, or at `scratch`.
double* fold_parts(const FoldTask& task, double* parts, double* scratch, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
