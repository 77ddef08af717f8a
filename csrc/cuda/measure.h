// Gram matrices, L1 norms and counts of tensors, of their rows or of their columns, on a device.
#pragma once

#include <cuda_runtime.h>

#include "folds.h"
#include "tasks.h"

namespace fi {
namespace cuda {

struct MeasureTask {
  InputTable inputs;
  int n;
  bool deltas;     // the vectors are input 0 and the others' deltas from it
  bool wide;       // compute in float64
  bool by_column;  // else by row
  int64_t numel;
  int64_t length;           // of a row; all elements if the tensor is measured as one
  double* sums;             // measure_width(n) of each part, the parts of a row, or blocks of rows, one after the other
  int64_t column, columns;  // by_column: the first that is measured, a multiple of kLanes, and how many are
  bool units;               // set by `measure`: units lie where they can be loaded whole
};

// Numbers of a vector of sums: measure_sums(n), then the counts of elements that are not 0.
inline int measure_width(int n) { return measure_sums(n) + n; }

// The fold of the task's parts, which are rows * count * width numbers.
FoldTask measure_parts(const MeasureTask& task);

// Fills task.sums. There is at least one element.
void measure(const MeasureTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
