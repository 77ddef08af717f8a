#include "survey.h"

#include <algorithm>
#include <cmath>

namespace fi {

namespace {

constexpr int64_t kPiece = 16 * kChunk;     // elements that a thread takes at a time, or a row more
constexpr int64_t kBlockBytes = 256 << 10;  // of one input, that is read for a block of columns

constexpr DivergenceArgs::Pass kPasses[] = {DivergenceArgs::kTop, DivergenceArgs::kPowers, DivergenceArgs::kTerms};

int64_t pieces(int64_t numel, int64_t size) { return (numel + size - 1) / size; }

// Whole rows, as many as make a piece.
int64_t row_piece(int64_t columns) { return std::max<int64_t>(1, kPiece / columns) * columns; }

bool any_f64(const std::vector<DType>& dtypes) {
  return std::find(dtypes.begin(), dtypes.end(), DType::F64) != dtypes.end();
}

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
    : backend_(backend), dtypes_(std::move(dtypes)), deltas_(deltas), wide_(any_f64(dtypes_)) {
  sums_.resize(size_t(pieces(numel, kChunk)) * size_t(measure_sums(int(dtypes_.size()))));
  nonzero_.resize(size_t(pieces(numel, piece())) * dtypes_.size());
}

int64_t MeasureSurvey::scratch_bytes() const { return int64_t(dtypes_.size()) * (kRawBytes + kChunk * 8); }

void MeasureSurvey::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  const size_t n = dtypes_.size();
  std::vector<const void*> x(n), read(n);
  MeasureArgs args{};
  args.x = x.data();
  args.in = dtypes_.data();
  args.n = int(n);
  args.deltas = deltas_;
  args.wide = wide_;
  args.scratch = scratch + kRawBytes * int64_t(n);
  args.nonzero = &nonzero_[size_t(first / piece()) * n];
  const int64_t span = read_span(dtypes_);
  for (int64_t done = 0; done < count; done += kChunk) {
    const int64_t at = done % span;
    if (at == 0)
      for (size_t i = 0; i < n; ++i)
        read[i] = inputs.get(i, first + done, std::min(span, count - done), scratch + kRawBytes * int64_t(i));
    for (size_t i = 0; i < n; ++i) x[i] = static_cast<const char*>(read[i]) + at * size_of(dtypes_[i]);
    args.numel = std::min(kChunk, count - done);
    args.sums = &sums_[size_t((first + done) / kChunk) * size_t(measure_sums(args.n))];
    backend_.measure(args);
  }
}

Answer MeasureSurvey::answer() const {
  const size_t n = dtypes_.size(), width = size_t(measure_sums(int(n)));
  Answer result{sums_, std::vector<int64_t>(n)};
  fold_chunks(width, &result.reals);
  for (size_t i = 0; i < nonzero_.size(); ++i) result.counts[i % n] += nonzero_[i];
  return result;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

MeasureRows::MeasureRows(const Backend& backend, std::vector<DType> dtypes, int64_t numel, bool deltas, int64_t columns)
    : backend_(backend), dtypes_(std::move(dtypes)), deltas_(deltas), columns_(columns), wide_(any_f64(dtypes_)) {
  sums_.resize(size_t(numel / columns) * size_t(measure_sums(int(dtypes_.size()))));
  nonzero_.resize(size_t(numel / columns) * dtypes_.size());
}

int64_t MeasureRows::piece() const { return row_piece(columns_); }

int64_t MeasureRows::scratch_bytes() const { return int64_t(dtypes_.size()) * (kRawBytes + kChunk * 8); }

void MeasureRows::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  const size_t n = dtypes_.size();
  std::vector<const void*> x(n), at(n);
  MeasureArgs args{};
  args.x = x.data();
  args.in = dtypes_.data();
  args.n = int(n);
  args.deltas = deltas_;
  args.wide = wide_;
  args.scratch = scratch + kRawBytes * int64_t(n);
  const int64_t together = kChunk / columns_ * columns_;  // short rows are read together
  for (int64_t done = 0; done < count;) {
    int64_t row = (first + done) / columns_;
    if (together == 0) {
      long_row(inputs, row, &args, scratch);
      done += columns_;
      continue;
    }
    const int64_t here = std::min(together, count - done);
    for (size_t i = 0; i < n; ++i) at[i] = inputs.get(i, first + done, here, scratch + kRawBytes * int64_t(i));
    args.numel = columns_;
    for (int64_t e = 0; e < here; e += columns_, ++row) {
      for (size_t i = 0; i < n; ++i) x[i] = static_cast<const char*>(at[i]) + e * size_of(dtypes_[i]);
      args.sums = &sums_[size_t(row) * size_t(measure_sums(args.n))];
      args.nonzero = &nonzero_[size_t(row) * n];
      backend_.measure(args);
    }
    done += here;
  }
}

// A row of more than one chunk.
void MeasureRows::long_row(const Inputs& inputs, int64_t row, MeasureArgs* args, char* scratch) {
  const size_t n = dtypes_.size(), width = size_t(measure_sums(int(n)));
  std::vector<const void*> x(n);
  std::vector<double> sums(size_t(pieces(columns_, kChunk)) * width);
  args->x = x.data();
  args->nonzero = &nonzero_[size_t(row) * n];
  for (int64_t done = 0; done < columns_; done += kChunk) {
    args->numel = std::min(kChunk, columns_ - done);
    for (size_t i = 0; i < n; ++i)
      x[i] = inputs.get(i, row * columns_ + done, args->numel, scratch + kRawBytes * int64_t(i));
    args->sums = &sums[size_t(done / kChunk) * width];
    backend_.measure(*args);
  }
  fold_chunks(width, &sums);
  std::copy(sums.begin(), sums.end(), &sums_[size_t(row) * width]);
}

// ---- columns -------------------------------------------------------------------------------------------------------

MeasureColumns::MeasureColumns(const Backend& backend, std::vector<DType> dtypes, int64_t numel, bool deltas,
                               int64_t columns)
    : backend_(backend),
      dtypes_(std::move(dtypes)),
      deltas_(deltas),
      columns_(columns),
      rows_(numel / columns),
      wide_(any_f64(dtypes_)) {
  int widest = 1;
  for (const DType d : dtypes_) widest = std::max(widest, size_of(d));
  read_columns_ = std::min<int64_t>(columns, kBlockBytes / kBlockRows / widest);
}

int64_t MeasureColumns::piece() const {
  return std::max<int64_t>(1, kPiece / (kBlockRows * columns_)) * kBlockRows * columns_;
}

int64_t MeasureColumns::scratch_bytes() const { return int64_t(dtypes_.size()) * (kBlockBytes + kChunk * 8); }

void MeasureColumns::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  const int64_t begin = first / columns_, end = (first + count) / columns_;
  for (int64_t row = begin; row < end; row += kBlockRows) {
    Sums sums(size_t(columns_ * width()));
    block(inputs, row, std::min<int64_t>(kBlockRows, end - row), scratch, &sums);
    fold(row / kBlockRows, std::move(sums));
  }
}

void MeasureColumns::block(const Inputs& inputs, int64_t first_row, int64_t rows, char* scratch, Sums* sums) const {
  const size_t n = dtypes_.size();
  std::vector<const void*> read(n), x(n);
  ColumnArgs args{};
  args.x = x.data();
  args.in = dtypes_.data();
  args.n = int(n);
  args.deltas = deltas_;
  args.wide = wide_;
  args.rows = int(rows);
  args.scratch = scratch + kBlockBytes * int64_t(n);
  for (int64_t column = 0; column < columns_; column += read_columns_) {
    const int64_t columns = std::min(read_columns_, columns_ - column);
    for (size_t i = 0; i < n; ++i) {
      char* const to = scratch + kBlockBytes * int64_t(i);
      if (columns == columns_) {
        read[i] = inputs.get(i, first_row * columns_, rows * columns_, to);
        continue;
      }
      for (int64_t r = 0; r < rows; ++r)
        inputs.read(i, (first_row + r) * columns_ + column, columns, to + r * columns * size_of(dtypes_[i]));
      read[i] = to;
    }
    args.stride = columns;
    for (int64_t c = 0; c < columns; c += kLanes) {
      for (size_t i = 0; i < n; ++i) x[i] = static_cast<const char*>(read[i]) + c * size_of(dtypes_[i]);
      args.columns = int(std::min<int64_t>(kLanes, columns - c));
      args.sums = &(*sums)[size_t((column + c) * width())];
      backend_.measure_columns(args);
    }
  }
}

void MeasureColumns::fold(int64_t index, Sums sums) {
  int level = 0;
  for (int64_t count = pieces(rows_, kBlockRows); count > 1; count = (count + 1) / 2, index /= 2, ++level) {
    if (index == count - 1 && count % 2 == 1) continue;
    Sums other;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto sibling = waiting_.find({level, index ^ 1});
      if (sibling == waiting_.end()) {
        waiting_[{level, index}] = std::move(sums);
        return;
      }
      other = std::move(sibling->second);
      waiting_.erase(sibling);
    }
    for (size_t i = 0; i < sums.size(); ++i) sums[i] += other[i];
  }
  whole_ = std::move(sums);
}

Answer MeasureColumns::answer() const {
  const size_t n = dtypes_.size(), all = size_t(width()), reals = all - n;
  Answer result{std::vector<double>(size_t(columns_) * reals), std::vector<int64_t>(size_t(columns_) * n)};
  for (size_t c = 0; c < whole_.size() / all; ++c) {
    const auto from = whole_.begin() + int64_t(c * all);
    std::copy(from, from + int64_t(reals), result.reals.begin() + int64_t(c * reals));
    std::copy(from + int64_t(reals), from + int64_t(all), result.counts.begin() + int64_t(c * n));
  }
  return result;
}

// ---- divergence ----------------------------------------------------------------------------------------------------

Divergence::Divergence(const Backend& backend, std::vector<DType> dtypes, int64_t numel, int64_t columns)
    : backend_(backend), dtypes_(std::move(dtypes)), columns_(columns), divergences_(size_t(numel / columns)) {}

int64_t Divergence::piece() const { return row_piece(columns_); }

int64_t Divergence::scratch_bytes() const { return 2 * (kRawBytes + kChunk * 8); }

void Divergence::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  const int64_t together = kChunk / columns_ * columns_;  // short rows are read together
  for (int64_t done = 0; done < count;) {
    double* const divergences = &divergences_[size_t((first + done) / columns_)];
    if (together == 0) {
      *divergences = long_row(inputs, first + done, scratch);
      done += columns_;
      continue;
    }
    const int64_t here = std::min(together, count - done);
    const void* x[2];
    for (size_t i = 0; i < 2; ++i) x[i] = inputs.get(i, first + done, here, scratch + kRawBytes * int64_t(i));
    DivergenceArgs args = arguments(scratch);
    args.numel = columns_;
    args.reuse_powers = true;
    for (int64_t row = 0; row < here / columns_; ++row) {
      for (size_t i = 0; i < 2; ++i) {
        args.x[i] = static_cast<const char*>(x[i]) + row * columns_ * size_of(dtypes_[i]);
        args.top[i] = -HUGE_VAL;
      }
      for (const auto pass : kPasses) {
        args.pass = pass;
        backend_.divergence(args);
        std::copy(args.sums, args.sums + 2, args.totals);
      }
      divergences[row] = args.sums[0];
    }
    done += here;
  }
}

DivergenceArgs Divergence::arguments(char* scratch) const {
  DivergenceArgs args{};
  args.in[0] = dtypes_[0];
  args.in[1] = dtypes_[1];
  args.scratch = reinterpret_cast<double*>(scratch + 2 * kRawBytes);
  args.top[0] = args.top[1] = -HUGE_VAL;
  return args;
}

// A row of more than one chunk.
double Divergence::long_row(const Inputs& inputs, int64_t first, char* scratch) const {
  DivergenceArgs args = arguments(scratch);
  std::vector<double> sums;
  for (const auto pass : kPasses) {
    args.pass = pass;
    sums.clear();
    for (int64_t done = 0; done < columns_; done += kChunk) {
      args.numel = std::min(kChunk, columns_ - done);
      for (size_t i = 0; i < 2; ++i)
        args.x[i] = inputs.get(i, first + done, args.numel, scratch + kRawBytes * int64_t(i));
      backend_.divergence(args);
      sums.insert(sums.end(), args.sums, args.sums + 2);
    }
    fold_chunks(2, &sums);
    std::copy(sums.begin(), sums.end(), args.totals);
  }
  return sums[0];
}

}  // namespace fi
