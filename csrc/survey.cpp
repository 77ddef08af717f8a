#include "survey.h"

#include <algorithm>

namespace fi {

namespace {

constexpr int64_t kRawBytes = kChunk * 8 + 4096;  // of one chunk of one input, as stored

int64_t pieces(int64_t numel, int64_t size) { return (numel + size - 1) / size; }

}  // namespace

void fold_chunks(size_t width, std::vector<double>* sums) {
  sums->resize(std::max(sums->size(), width));  // a tensor without elements sums to 0
  double* const s = sums->data();
  for (size_t count = sums->size() / width; count > 1; count = (count + 1) / 2)
    for (size_t c = 0; c < (count + 1) / 2; ++c)
      for (size_t i = 0; i < width; ++i)
        s[c * width + i] = 2 * c + 1 < count ? s[2 * c * width + i] + s[(2 * c + 1) * width + i] : s[2 * c * width + i];
  sums->resize(width);
}

MeasureSurvey::MeasureSurvey(const Backend& backend, std::vector<DType> dtypes, int64_t numel, bool deltas)
    : backend_(backend), dtypes_(std::move(dtypes)), deltas_(deltas) {
  for (const DType d : dtypes_) wide_ = wide_ || d == DType::F64;
  sums_.resize(size_t(pieces(numel, kChunk)) * size_t(measure_sums(int(dtypes_.size()))));
  nonzero_.resize(size_t(pieces(numel, piece())) * dtypes_.size());
}

int64_t MeasureSurvey::scratch_bytes() const { return int64_t(dtypes_.size()) * (kRawBytes + kChunk * 8); }

void MeasureSurvey::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  const size_t n = dtypes_.size();
  std::vector<const void*> x(n);
  MeasureArgs args{};
  args.x = x.data();
  args.in = dtypes_.data();
  args.n = int(n);
  args.deltas = deltas_;
  args.wide = wide_;
  args.scratch = scratch + kRawBytes * int64_t(n);
  args.nonzero = &nonzero_[size_t(first / piece()) * n];
  for (int64_t done = 0; done < count; done += kChunk) {
    args.numel = std::min(kChunk, count - done);
    for (size_t i = 0; i < n; ++i) x[i] = inputs.get(i, first + done, args.numel, scratch + kRawBytes * int64_t(i));
    args.sums = &sums_[size_t((first + done) / kChunk) * size_t(measure_sums(args.n))];
    backend_.measure(args);
  }
}

Answer MeasureSurvey::answer() const {
  const size_t n = dtypes_.size(), width = size_t(measure_sums(int(n)));
  Answer found{sums_, std::vector<int64_t>(n)};
  fold_chunks(width, &found.reals);
  for (size_t i = 0; i < nonzero_.size(); ++i) found.counts[i % n] += nonzero_[i];
  return found;
}

}  // namespace fi
