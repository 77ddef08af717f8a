// For the kinds whose pieces have keeps and scores.
#pragma once

#include "bind_folds.h"
#include "tasks.h"

namespace fi {
namespace cuda {

// Raises ValueError for a keep by rank, which has no kernel.
KeepRange keep_of(const pybind11::dict& keep);

// Where a piece lies among the rows of its tensor.
struct Rows {
  int64_t first, count, columns;
};
Rows rows_of(const pybind11::dict& piece, const Operands& operands);

// Device memory that launches read, until they are in the queue.
using Uploads = std::vector<std::unique_ptr<Scratch>>;

// Copies `from` to the device, where it lasts as long as `uploads`. Returns the address.
const void* upload(Queue* queue, const void* from, int64_t bytes, const char* what, Uploads* uploads);

// None, or (kind, least, factors as float32, one per row of the tensor), of which those of the piece go to the device.
ScoreTask score_of(Queue* queue, const pybind11::object& given, const Rows& rows, Uploads* uploads);

}  // namespace cuda
}  // namespace fi
