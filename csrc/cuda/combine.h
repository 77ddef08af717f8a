// Weighted sums of arrays in a device's memory: the operation `combine`, but for weights by row or column.
#pragma once

#include <vector>

#include "../ops.h"
#include "runtime.h"

namespace fi {
namespace cuda {

// total * x[pivot] + the terms, in their order, stored at `out`.
struct SumRow {
  int pivot;
  double total;
  std::vector<Term> terms;
  void* out;
  uint64_t key;
};

// Part of a tensor, as CombineArgs has it: `numel` elements from element `first` on, at any addresses.
struct Sum {
  std::vector<const void*> x;
  std::vector<DType> in;
  std::vector<SumRow> rows;
  DType out_dtype;
  bool stochastic, fp8_saturate;
  int stats_every;  // 0: nothing is sampled, and nothing is counted
  int64_t numel, first;
};

// The statistics of a sum's rows, valid once the queue has done it.
class SumStats {
 public:
  // offset: -1 if no statistics are wanted
  SumStats(size_t rows, int64_t chunks, int64_t offset) : rows_(rows), chunks_(chunks), offset_(offset) {}

  std::vector<RowStats> rows() const;
  void set(std::shared_ptr<const char> host) { host_ = std::move(host); }
  bool wanted() const { return offset_ >= 0; }
  int64_t offset() const { return offset_; }  // in the memory of the statistics

 private:
  size_t rows_;
  int64_t chunks_, offset_;
  std::shared_ptr<const char> host_;
};

// Puts the sums into the queue, in as few launches as their descriptions fit into. Nothing is allocated if no sum wants
// statistics.
std::vector<SumStats> combine(Queue* queue, const std::vector<Sum>& sums);

}  // namespace cuda
}  // namespace fi
