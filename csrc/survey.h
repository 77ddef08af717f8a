// Gram matrices, L1 norms and counts.
#pragma once

#include "step.h"

namespace fi {

// Folds sums, `width` of each chunk, one chunk after the other, in pairs, an odd one carried: to one of each.
void fold_chunks(size_t width, std::vector<double>* sums);

// Sums over the inputs, or over the first and the others' deltas from it: see MeasureArgs. Answers with measure_sums(n)
// reals and n counts.
class MeasureSurvey : public Survey {
 public:
  MeasureSurvey(const Backend& backend, std::vector<DType> dtypes, int64_t numel, bool deltas);
  int64_t piece() const override { return 16 * kChunk; }
  int64_t scratch_bytes() const override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override;

 private:
  const Backend& backend_;
  const std::vector<DType> dtypes_;
  const bool deltas_;
  bool wide_ = false;
  std::vector<double> sums_;      // of each chunk
  std::vector<int64_t> nonzero_;  // of each piece
};

}  // namespace fi
