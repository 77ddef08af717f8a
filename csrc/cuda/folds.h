// Sums of rule 7 of docs/NUMERICS.md: what blocks found folds in memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fi {
namespace cuda {

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
