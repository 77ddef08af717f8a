// What keeps leave of deltas, on a device: rule 10 of docs/NUMERICS.md.
#pragma once

#include <cuda_runtime.h>

#include "folds.h"
#include "tasks.h"

namespace fi {
namespace cuda {

struct KeptTask {
  InputTable inputs;  // the first is the base
  int n;              // two at least
  bool wide, l1, squares, random;
  ScoreTask score;
  int64_t numel, first;  // a multiple of kChunk
  double* sums;          // kept_width(n) of each chunk
  KeepRange keeps[kMaxInputs];
};

// The three sums and two counts of each input: see KeptArgs.
inline int kept_width(int n) { return 5 * n; }

// Fills task.sums. There is at least one element.
void kept(const KeptTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
