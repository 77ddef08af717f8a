// Weighted sums of arrays in memory, on several threads.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"

namespace fi {

// `args` describes the whole call; its x, out and stats are ignored: `inputs` and `outputs` are the addresses. Threads
// take ranges of whole chunks, and the statistics, one per row, fold in the order of the ranges. Runs on fewer threads
// where the system allows no more. Throws std::bad_alloc.
std::vector<RowStats> combine_in_memory(const Backend& backend, const std::vector<uintptr_t>& inputs,
                                        const std::vector<uintptr_t>& outputs, const CombineArgs& args, int threads);

// One of many sums with the same row. Addresses of `numel` elements each.
struct MemorySum {
  std::vector<uintptr_t> inputs;
  std::vector<DType> in;
  uintptr_t out;
  DType out_dtype;
  int64_t numel;
};

// Compute sums whose outputs overlap no input, rounded to nearest, without statistics. Threads as above.
void sum_in_memory(const Backend& backend, const std::vector<MemorySum>& sums, const Row& row, int threads);

}  // namespace fi
