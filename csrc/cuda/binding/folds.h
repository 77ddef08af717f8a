// Pieces that answer with sums: the parts that kernels write are folded on the device.
#pragma once

#include <functional>

#include "../folds.h"
#include "../tasks.h"
#include "pieces.h"

namespace fi {
namespace cuda {

InputTable table_of(const ParsedPiece& piece);

// (f64[groups * reals], i64[groups * counts]), all 0: of a piece without elements.
std::shared_ptr<Pending> no_sums(int64_t groups, int64_t reals, int64_t counts);

// The same of numbers in the device's memory: of each group its reals, then its counts, as float64.
std::shared_ptr<Pending> fetched_sums(Queue* queue, const double* totals, int64_t groups, int64_t reals,
                                      int64_t counts);

// Sums of a piece, computed on the device: `fill` launches what fills the parts, which are then folded.
std::shared_ptr<Pending> folded(Queue* queue, const FoldTask& parts, int64_t groups, int64_t reals, int64_t counts,
                                const char* kernel, const std::function<void(double*)>& fill);

}  // namespace cuda
}  // namespace fi
