// Sums of rule 7 of docs/NUMERICS.md: the sums of blocks are folded in memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fi {
namespace cuda {

// Numbers, `width` of each of `count` parts, one part after the other, of each of `rows` rows: parts fold in adjacent
// pairs, an unpaired one going on to the next level, to one of each row.
struct FoldTask {
  int64_t rows, count, width;
};

// The size of fold_parts' scratch, in numbers.
int64_t fold_scratch(const FoldTask& task);

// Folds the parts. Returns the address of the results, rows * width numbers: `parts`, which is overwritten, or
// `scratch`.
double* fold_parts(const FoldTask& task, double* parts, double* scratch, cudaStream_t stream);

// The kernel, as cudaFuncGetAttributes takes it: all kernels of a build have code for the same devices.
const void* fold_function();

}  // namespace cuda
}  // namespace fi
