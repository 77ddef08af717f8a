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

}  // namespace fi
