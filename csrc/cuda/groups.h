// Sums whose weights differ by row or column, on a device: rule 11 of docs/NUMERICS.md.
#pragma once

#include <cuda_runtime.h>

#include "tasks.h"

namespace fi {
namespace cuda {

// One output of a piece. Numbers are float64 if `wide`, else float32.
struct GroupTask {
  InputTable inputs;
  int pivot, n_terms;
  bool wide, per_row;
  const void* totals;   // of each group; null if all are 1
  const void* weights;  // of the first term, one per group; then those of the second
  int64_t columns, groups, first_group;
  OutputTask to;
  int64_t numel, first;
  OutputStats stats;
  int terms[kMaxInputs];  // their inputs
};

// There is at least one element.
void group_sum(const GroupTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
