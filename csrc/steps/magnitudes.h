// The largest magnitudes of sums that are not written: scales of whole tensors need them before anything is encoded.
#pragma once

#include <mutex>

#include "step.h"

namespace fi {

// Answers with the largest magnitude of each matrix of each output of a sum, `matrix` elements each: of finite numbers
// alone where codes can store NaN and Inf.
class SumMagnitudes : public Survey {
 public:
  SumMagnitudes(const Backend& backend, std::shared_ptr<const Sum> sum, std::vector<DType> dtypes, size_t outputs,
                Codes codes, int64_t numel, int64_t matrix);
  int64_t piece() const override { return piece_; }
  int64_t scratch_bytes() const override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override;

 private:
  const Backend& backend_;
  const std::shared_ptr<const Sum> sum_;
  const std::vector<DType> dtypes_;
  const size_t outputs_;
  const Codes codes_;
  const int64_t matrix_;
  int64_t piece_, span_, raw_bytes_, sum_bytes_;
  std::mutex mutex_;
  std::vector<uint32_t> magnitudes_;  // of the matrices of the first output, then of the second's
};

}  // namespace fi
