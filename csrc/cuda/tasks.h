// Parts of kernel arguments that several kernels share. Plain data, for the host too.
#pragma once

#include "../ops.h"

namespace fi {
namespace cuda {

// Inputs of a kernel. As an argument it lies in constant memory, where an index costs nothing.
struct InputTable {
  const void* x[kMaxInputs];
  DType in[kMaxInputs];
};

constexpr int kUnit = 8;  // elements that a thread loads together: 16 bytes of the 16-bit dtypes

// The bounds of a MaskTest, so that one comparison does for both, and its random numbers.
struct MaskRange {
  uint32_t min_bits, span;
  uint64_t limit, key;  // kWords draws nothing
};

// A Score, whose factors are those of the rows from `first_row` on.
struct ScoreTask {
  Score::Kind kind;
  uint32_t min_bits;
  const float* factors;
  int64_t first_row, columns;
};

// The address, dtype and rounding of an output.
struct OutputTask {
  void* out;
  DType dtype;
  bool stochastic, fp8_saturate;
  uint64_t key;
};

// Statistics of an output: exact counts, and sums over sampled chunks.
struct ChunkSample {
  int64_t sampled, changed;
  double sum_pp, sum_dd, sum_od;
};
struct OutputStats {
  int64_t* counts;       // nan_in, inf_in, nan_out, inf_out, added to; null: nothing is counted
  ChunkSample* samples;  // of every sampled chunk of the tensor that the piece touches
  int64_t first_chunk, every, chunks;
};

}  // namespace cuda
}  // namespace fi
