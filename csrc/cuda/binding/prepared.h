// Weighted sums of which only the row is to be told: pieces are parsed once, and run with many rows.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "../combine_prepared.h"
#include "pieces.h"

namespace fi {
namespace cuda {

// PreparedSums of fastinterp/backends/device.py. Threads may share it.
class PreparedSums {
 public:
  // Throws pybind11::value_error for pieces that are no sums of one output, or that want statistics.
  PreparedSums(int device, std::shared_ptr<HostPool> pool, const pybind11::iterable& pieces);
  // Enqueues all sums with this row.
  void run(Queue* queue, const pybind11::handle& row);

 private:
  std::mutex mutex_;
  std::vector<Sum> sums_, rest_;                        // all of them, and those that are in no table
  std::vector<std::unique_ptr<PreparedTable>> tables_;  // one of each dtype
};

}  // namespace cuda
}  // namespace fi
