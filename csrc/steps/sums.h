// The sums that write outputs.
#pragma once

#include "step.h"

namespace fi {

// Weighted sums with one weight per input.
class PlainSum : public Sum {
 public:
  // The rows' terms are `terms`, one list per row.
  PlainSum(const Backend& backend, std::vector<Row> rows, std::vector<std::vector<Term>> terms);
  void run(const CombineArgs& args, char* scratch) const override;
  int pivot(size_t output) const override { return is_copy(rows_[output]) ? -1 : rows_[output].pivot; }
  bool copies() const override { return rows_.size() == 1 && is_copy(rows_[0]); }

 private:
  const Backend& backend_;
  std::vector<Row> rows_;
  const std::vector<std::vector<Term>> terms_;
};

// Weighted sums with a weight per row or column of the tensor.
class GroupSum : public Sum {
 public:
  // The numbers of one output. weights: of the first group's terms, then of the second's, and so on.
  struct Output {
    int pivot;
    std::vector<int> inputs;
    std::vector<double> totals, weights;
  };
  GroupSum(const Backend& backend, std::vector<Output> outputs, bool per_row, int64_t columns, int64_t groups);
  void run(const CombineArgs& args, char* scratch) const override;
  int pivot(size_t output) const override { return rows_[output].pivot; }

 private:
  const Backend& backend_;
  std::vector<Output> outputs_;
  std::vector<GroupRow> rows_;
  const bool per_row_;
  const int64_t columns_, groups_;
};

}  // namespace fi
