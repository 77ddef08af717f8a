#include "magnitudes.h"

#include <algorithm>

namespace fi {

namespace {

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

}  // namespace

SumMagnitudes::SumMagnitudes(const Backend& backend, std::shared_ptr<const Sum> sum, std::vector<DType> dtypes,
                             size_t outputs, Codes codes, int64_t numel, int64_t matrix)
    : backend_(backend),
      sum_(std::move(sum)),
      dtypes_(std::move(dtypes)),
      outputs_(outputs),
      codes_(codes),
      matrix_(matrix),
      piece_(round_up(16 * kChunk, sum_->grain())),
      span_(round_up(std::max(kChunk / sum_->grain(), int64_t(1)) * sum_->grain(), sum_->grain())),
      raw_bytes_(round_up(span_ * 8, 4096)),
      sum_bytes_(round_up(sum_->scratch_bytes(span_), 4096)),
      magnitudes_(outputs * size_t(numel / matrix)) {}

// Inputs, the sum's scratch, and a span of each output.
int64_t SumMagnitudes::scratch_bytes() const {
  return raw_bytes_ * int64_t(dtypes_.size()) + sum_bytes_ + span_ * int64_t(sizeof(float) * outputs_);
}

void SumMagnitudes::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  const size_t n = dtypes_.size();
  char* const sum_scratch = scratch + raw_bytes_ * int64_t(n);
  std::vector<const void*> x(n);
  std::vector<void*> out;
  for (size_t k = 0; k < outputs_; ++k) out.push_back(sum_scratch + sum_bytes_ + span_ * int64_t(sizeof(float) * k));
  const int64_t begin = first / matrix_, matrices = (first + count - 1) / matrix_ + 1 - begin;
  std::vector<uint32_t> found(outputs_ * size_t(matrices));
  for (int64_t e = first; e < first + count; e += span_) {
    const int64_t some = std::min(span_, first + count - e);
    for (size_t i = 0; i < n; ++i) x[i] = inputs.get(i, e, some, scratch + raw_bytes_ * int64_t(i));
    std::vector<RowStats> ignored(outputs_);
    CombineArgs args{};
    args.x = x.data();
    args.in = dtypes_.data();
    args.out = out.data();
    args.n = int(n);
    args.k = int(outputs_);
    args.out_dtype = DType::F32;
    args.numel = some;
    args.first = e;
    args.stats = ignored.data();
    sum_->run(args, sum_scratch);
    for (size_t k = 0; k < outputs_; ++k)
      for (int64_t done = 0; done < some;) {
        EncodeArgs part{};
        part.x = static_cast<const float*>(out[k]) + done;
        part.numel = std::min(some - done, matrix_ - (e + done) % matrix_);
        part.block = part.numel;
        part.codes = codes_;
        backend_.magnitudes(part, &found[k * size_t(matrices) + size_t((e + done) / matrix_ - begin)]);
        done += part.numel;
      }
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t all = magnitudes_.size() / outputs_;
  for (size_t k = 0; k < outputs_; ++k)
    for (int64_t m = 0; m < matrices; ++m) {
      uint32_t& most = magnitudes_[k * all + size_t(begin + m)];
      most = std::max(most, found[k * size_t(matrices) + size_t(m)]);
    }
}

Answer SumMagnitudes::answer() const {
  Answer answer;
  for (const uint32_t magnitude : magnitudes_) answer.reals.push_back(double(bit_cast<float>(magnitude)));
  return answer;
}

}  // namespace fi
