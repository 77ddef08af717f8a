#include "low_rank.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace fi {

namespace {

constexpr int64_t kMost = 4 * kChunk;     // elements that are made at a time
constexpr int64_t kPartColumns = 4096;    // of kBlockRows rows, whose columns are measured
constexpr int64_t kRawFactor = 64 << 10;  // elements of a factor that are read at a time

template <DType D>
void widen_all(const char* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) {
    typename Format<D>::Bits bits;
    memcpy(&bits, x + i * int64_t(sizeof bits), sizeof bits);
    to[i] = float(widen<std::conditional_t<D == DType::F64, double, float>, D>(bits));
  }
}

void widen_stored(DType dtype, const void* x, int64_t count, float* to) {
  const char* const bytes = static_cast<const char*>(x);
  switch (dtype) {
    case DType::F64:
      return widen_all<DType::F64>(bytes, count, to);
    case DType::F32:
      return widen_all<DType::F32>(bytes, count, to);
    case DType::F16:
      return widen_all<DType::F16>(bytes, count, to);
    case DType::BF16:
      return widen_all<DType::BF16>(bytes, count, to);
    case DType::F8_E4M3:
      return widen_all<DType::F8_E4M3>(bytes, count, to);
    case DType::F8_E5M2:
      return widen_all<DType::F8_E5M2>(bytes, count, to);
  }
}

// Elements [first, first + count) of a stored tensor.
std::vector<float> stored_floats(const std::vector<Source>& sources, const LowRank::Factor& f, int64_t first,
                                 int64_t count, std::atomic<int64_t>* bytes_read) {
  const int width = size_of(f.dtype);
  std::vector<float> floats(static_cast<size_t>(count));
  std::vector<char> raw(size_t(std::min(count, kRawFactor) * width));
  for (int64_t done = 0; done < count; done += kRawFactor) {
    const int64_t n = std::min(kRawFactor, count - done);
    const void* x = sources[size_t(f.source)].get(f.offset + (first + done) * width, n * width, raw.data());
    widen_stored(f.dtype, x, n, floats.data() + done);
    *bytes_read += n * width;
  }
  return floats;
}

// Calls put(index, rank, value) for every element of one matrix's factor.
template <class Put>
void for_factor(const std::vector<Source>& sources, const LowRank::Factor& f, int64_t matrix, int64_t length,
                int64_t rank, std::atomic<int64_t>* bytes_read, Put put) {
  if (f.source < 0) {
    for (int64_t i = 0; i < length; ++i)
      for (int64_t k = 0; k < rank; ++k) put(i, k, 1.0f);
    return;
  }
  const int64_t first = f.first + matrix * f.by_matrix;
  const int64_t count = (length - 1) * f.by_index + (rank - 1) * f.by_rank + 1;
  const std::vector<float> floats = stored_floats(sources, f, first, count, bytes_read);
  for (int64_t i = 0; i < length; ++i)
    for (int64_t k = 0; k < rank; ++k) put(i, k, floats[size_t(i * f.by_index + k * f.by_rank)]);
}

// Sums of blocks that fold in pairs, an odd one carried, without holding all blocks.
class Pairs {
 public:
  void add(std::vector<double> block) {
    int level = 0;
    for (; !held_.empty() && held_.back().level == level; ++level) {
      fold(held_.back().sums, &block);
      held_.pop_back();
    }
    held_.push_back({level, std::move(block)});
  }
  std::vector<double> total() {
    std::vector<double> sums = std::move(held_.back().sums);
    held_.pop_back();
    for (; !held_.empty(); held_.pop_back()) fold(held_.back().sums, &sums);
    return sums;
  }

 private:
  struct Level {
    int level;
    std::vector<double> sums;
  };
  static void fold(const std::vector<double>& left, std::vector<double>* right) {
    for (size_t i = 0; i < left.size(); ++i) (*right)[i] = left[i] + (*right)[i];
  }
  std::vector<Level> held_;
};

}  // namespace

struct LowRank::Held {
  struct Product {
    std::vector<float> left, right, factors;  // of all matrices
  };
  std::vector<Product> products;  // one per change
};

LowRank::LowRank(const Backend& backend, Base base, int64_t matrices, int64_t rows, int64_t columns,
                 std::vector<Change> changes)
    : backend_(backend),
      base_(std::move(base)),
      matrices_(matrices),
      rows_(rows),
      columns_(columns),
      changes_(std::move(changes)) {}

// Floats that cannot be made where they are wanted, the stored bytes, what a decoder needs.
int64_t LowRank::scratch_bytes() const {
  const int64_t stored = base_.decoding ? base_.decoding->scratch_bytes() : kMost * size_of(base_.dtype);
  return kMost * int64_t(sizeof(float)) + stored;
}

std::shared_ptr<const LowRank::Held> LowRank::held(const std::vector<Source>& sources, char* scratch,
                                                   Bytes bytes_read) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (held_) return held_;
  auto loaded = std::make_shared<Held>();
  loaded->products.resize(changes_.size());
  const int64_t panels = (columns_ + kLowRankPanel - 1) / kLowRankPanel;
  for (size_t c = 0; c < changes_.size(); ++c) {
    if (!changes_[c].rows.places.empty()) continue;
    const Product& p = changes_[c].product;
    Held::Product& packed = loaded->products[c];
    packed.left.resize(size_t(matrices_ * rows_ * p.rank));
    packed.right.resize(size_t(matrices_ * panels * kLowRankPanel * p.rank));
    for (int64_t m = 0; m < matrices_; ++m) {
      float* const left = packed.left.data() + m * rows_ * p.rank;
      for_factor(sources, p.left, m, rows_, p.rank, bytes_read,
                 [&](int64_t row, int64_t k, float value) { left[row * p.rank + k] = value; });
      float* const right = packed.right.data() + m * panels * kLowRankPanel * p.rank;
      for_factor(sources, p.right, m, columns_, p.rank, bytes_read, [&](int64_t column, int64_t k, float value) {
        right[(column / kLowRankPanel * p.rank + k) * kLowRankPanel + column % kLowRankPanel] = value;
      });
    }
    if (p.has_magnitude) add_factors(sources, c, loaded.get(), scratch, bytes_read);
  }
  held_ = loaded;
  return loaded;
}

// What each row or column is multiplied by, so that it has its length: the magnitude over the length that it has.
void LowRank::add_factors(const std::vector<Source>& sources, size_t change, Held* held, char* scratch,
                          Bytes bytes_read) const {
  const Product& p = changes_[change].product;
  const int64_t groups = p.per_row ? rows_ : columns_;
  std::vector<double> squares(static_cast<size_t>(groups));
  std::vector<float> made(size_t(kBlockRows * kPartColumns)), work(kChunk);
  const void* x[1];
  const DType in[1] = {DType::F32};
  int64_t nonzero[1] = {0};
  if (p.per_row) {
    for (int64_t row = 0; row < rows_; ++row) {
      Pairs chunks;
      for (int64_t at = 0; at < columns_; at += kChunk) {
        const int64_t n = std::min(kChunk, columns_ - at);
        make(sources, *held, row * columns_ + at, n, change + 1, made.data(), scratch, bytes_read);
        std::vector<double> sums(2);
        x[0] = made.data();
        backend_.measure({x, in, 1, false, false, n, work.data(), sums.data(), nonzero});
        chunks.add({sums[0]});
      }
      squares[size_t(row)] = chunks.total()[0];
    }
  } else {
    for (int64_t from = 0; from < columns_; from += kPartColumns) {
      const int64_t width = std::min(kPartColumns, columns_ - from);
      Pairs blocks;
      for (int64_t row = 0; row < rows_; row += kBlockRows) {
        const int64_t count = std::min<int64_t>(kBlockRows, rows_ - row);
        for (int64_t r = 0; r < count; ++r)
          make(sources, *held, (row + r) * columns_ + from, width, change + 1, made.data() + r * width, scratch,
               bytes_read);
        std::vector<double> sums(static_cast<size_t>(width));
        for (int64_t at = 0; at < width; at += kLanes) {
          const int n = int(std::min<int64_t>(kLanes, width - at));
          double columns[3 * kLanes];
          x[0] = made.data() + at;
          backend_.measure_columns({x, in, 1, false, false, int(count), n, width, work.data(), columns});
          for (int c = 0; c < n; ++c) sums[size_t(at + c)] = columns[3 * c];
        }
        blocks.add(std::move(sums));
      }
      const std::vector<double> total = blocks.total();
      std::copy(total.begin(), total.end(), squares.begin() + from);
    }
  }
  const std::vector<float> magnitude = stored_floats(sources, p.magnitude, p.magnitude.first, groups, bytes_read);
  std::vector<float>& factors = held->products[change].factors;
  std::vector<float> made_factors(static_cast<size_t>(groups));
  for (size_t g = 0; g < size_t(groups); ++g) made_factors[g] = magnitude[g] / float(std::sqrt(squares[g]));
  factors = std::move(made_factors);
}

void LowRank::release() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  held_.reset();
  if (base_.decoding) base_.decoding->release();
}

void LowRank::read(const std::vector<Source>& sources, int64_t first, int64_t count, void* to, char* scratch,
                   Bytes bytes_read) const {
  const std::shared_ptr<const Held> held = this->held(sources, scratch, bytes_read);
  const int64_t matrix_size = rows_ * columns_;
  char* next = static_cast<char*>(to);
  const bool aligned = reinterpret_cast<uintptr_t>(next) % alignof(float) == 0;
  for (int64_t done = 0; done < count;) {
    const int64_t at = first + done, rest = matrix_size - at % matrix_size;
    const int64_t n = std::min({count - done, rest, kMost});
    float* const made = reinterpret_cast<float*>(aligned ? next : scratch);
    make(sources, *held, at, n, changes_.size(), made, scratch, bytes_read);
    if (!aligned) memcpy(next, made, size_t(n) * sizeof(float));
    next += n * int64_t(sizeof(float));
    done += n;
  }
}

void LowRank::make(const std::vector<Source>& sources, const Held& held, int64_t first, int64_t count, size_t changes,
                   float* to, char* scratch, Bytes bytes_read) const {
  char* const raw = scratch + kMost * int64_t(sizeof(float));
  LowRankArgs args{};
  if (base_.decoding) {
    base_.decoding->read(sources, base_.source, base_.offset, first, count, to, raw, bytes_read);
    args.x = to;
    args.in = DType::F32;
  } else {
    const int width = size_of(base_.dtype);
    args.x = sources[size_t(base_.source)].get(base_.offset + first * width, count * width, raw);
    args.in = base_.dtype;
    *bytes_read += count * width;
  }
  const int64_t matrix = first / (rows_ * columns_), panels = (columns_ + kLowRankPanel - 1) / kLowRankPanel;
  args.first = first % (rows_ * columns_);
  args.count = count;
  args.columns = columns_;
  args.to = to;
  std::vector<LowRankTerm> terms;
  const auto add = [&] {
    args.terms = terms.data();
    args.n_terms = int(terms.size());
    backend_.low_rank(args);
    terms.clear();
    args.x = to;
    args.in = DType::F32;
  };
  for (size_t c = 0; c < changes; ++c) {
    if (!changes_[c].rows.places.empty()) {
      add();
      replace_rows(sources, changes_[c].rows, first, count, to, bytes_read);
      continue;
    }
    const Product& p = changes_[c].product;
    const Held::Product& packed = held.products[c];
    terms.push_back({packed.left.data() + matrix * rows_ * p.rank,
                     packed.right.data() + matrix * panels * kLowRankPanel * p.rank, p.rank, p.scale,
                     packed.factors.empty() ? nullptr : packed.factors.data(), p.per_row});
  }
  add();
}

void LowRank::replace_rows(const std::vector<Source>& sources, const Rows& rows, int64_t first, int64_t count,
                           float* to, Bytes bytes_read) const {
  const int width = size_of(rows.dtype);
  const auto place = [](const std::pair<int64_t, int64_t>& p, int64_t row) { return p.first < row; };
  auto at = std::lower_bound(rows.places.begin(), rows.places.end(), first / columns_, place);
  std::vector<char> raw;
  for (; at != rows.places.end() && at->first * columns_ < first + count; ++at) {
    const int64_t begin = std::max(first, at->first * columns_),
                  end = std::min(first + count, (at->first + 1) * columns_);
    const int64_t n = end - begin, stored = at->second * columns_ + begin % columns_;
    raw.resize(size_t(n * width));
    widen_stored(rows.dtype, sources[size_t(rows.source)].get(rows.offset + stored * width, n * width, raw.data()), n,
                 to + (begin - first));
    *bytes_read += n * width;
  }
}

void LowRank::prefetch(const std::vector<Source>& sources, int64_t first, int64_t count) const {
  if (base_.decoding) {
    const auto [offset, bytes] = base_.decoding->stored(first, count);
    return sources[size_t(base_.source)].prefetch(base_.offset + offset, bytes);
  }
  const int width = size_of(base_.dtype);
  sources[size_t(base_.source)].prefetch(base_.offset + first * width, count * width);
}

}  // namespace fi
