// Statistics of masked deltas, on a device: rule 10 of docs/NUMERICS.md.
#pragma once

#include <cuda_runtime.h>

#include "folds.h"
#include "tasks.h"

namespace fi {
namespace cuda {

struct MaskedStatsTask {
  InputTable inputs;  // the first is the base
  int n;              // two at least
  bool wide, l1, squares, random;
  ScoreTask score;
  int64_t numel, first;  // a multiple of kChunk
  double* sums;          // masked_stats_width(n) of each chunk
  MaskRange tests[kMaxInputs];
};

// The three sums and two counts of each input: see MaskedStatsArgs.
inline int masked_stats_width(int n) { return 5 * n; }

// Fills task.sums. There is at least one element.
void masked_stats(const MaskedStatsTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
