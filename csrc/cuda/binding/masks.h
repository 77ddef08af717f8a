// Mask tests and scores of a piece, as kernels take them.
#pragma once

#include "../tasks.h"
#include "folds.h"

namespace fi {
namespace cuda {

// Throws pybind11::value_error for a test whose limits depend on ranks, which has no kernel.
MaskRange range_of(const MaskTest& test);

// The range of a tensor's rows that a piece touches.
struct Rows {
  int64_t first, count, columns;
};
Rows rows_of(const ParsedPiece& piece);

// Device memory that launches read, until they are in the queue.
using Uploads = std::vector<std::unique_ptr<Scratch>>;

// Copies `from` to the device, where it lasts as long as `uploads`. Returns the address.
const void* upload(Queue* queue, const void* from, int64_t bytes, const char* what, Uploads* uploads);

// The factors of the piece's rows go to the device.
ScoreTask score_of(Queue* queue, const ParsedScore& parsed, const Rows& rows, Uploads* uploads);

}  // namespace cuda
}  // namespace fi
