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
  bool copies() const override { return rows_.size() == 1 && is_copy(rows_[0]); }

 private:
  const Backend& backend_;
  std::vector<Row> rows_;
  const std::vector<std::vector<Term>> terms_;
};

}  // namespace fi
