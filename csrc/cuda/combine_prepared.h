// Weighted sums whose addresses lie in the device's memory: a launch carries the weights alone, of however many
// tensors.
#pragma once

#include "combine.h"

namespace fi {
namespace cuda {

class PreparedTable {
 public:
  // Whether a sum of one row can be in a table: rounded to nearest, without statistics, all operands of one dtype, at
  // multiples of 16 bytes.
  static bool takes(const Sum& sum);
  // Whether a row can be told to a table.
  static bool takes(const SumRow& row);

  // sums: one at least, all of one dtype and with as many inputs. Returns when the device has the table.
  PreparedTable(int device, std::shared_ptr<HostPool> pool, const std::vector<Sum>& sums);
  // Puts all sums into the queue, with this row, whose `out` does not count. Nothing is allocated.
  void run(Queue* queue, const SumRow& row) const;

 private:
  const DType dtype_;
  const uint32_t pieces_, words_;  // words of 8 bytes of a piece
  uint32_t tiles_ = 0;
  Buffer memory_;
};

}  // namespace cuda
}  // namespace fi
