#include "histogram.h"

#include <algorithm>
#include <stdexcept>

namespace fi {

namespace {

constexpr int64_t kMostElements = int64_t(1) << 31;  // that a tally counts between two begins: its bins have 32 bits

}  // namespace

// ---- counts --------------------------------------------------------------------------------------------------------

std::vector<uint64_t> Counts::bins() const {
  std::vector<uint64_t> all(size_t(size_), 0);
  for (const Bin& bin : bins_) all[bin.index] = bin.count;
  return all;
}

Counts::Bins Counts::filled(const uint32_t* bins, int64_t size) {
  constexpr int64_t kRun = 16;  // bins that are passed over together: almost all are empty
  Bins nonempty;
  for (int64_t at = 0; at < size; at += kRun) {
    const int64_t end = std::min(at + kRun, size);
    uint32_t any = 0;
    for (int64_t i = at; i < end; ++i) any |= bins[i];
    if (any == 0) continue;
    for (int64_t i = at; i < end; ++i)
      if (bins[i] != 0) nonempty.push_back({uint32_t(i), bins[i]});
  }
  return nonempty;
}

void Counts::add(Bins more) {
  if (bins_.empty()) {
    bins_ = std::move(more);
    return;
  }
  Bins sum;
  sum.reserve(bins_.size() + more.size());
  auto a = bins_.begin();
  for (const Bin& b : more) {
    for (; a != bins_.end() && a->index < b.index; ++a) sum.push_back(*a);
    sum.push_back(b);
    if (a != bins_.end() && a->index == b.index) sum.back().count += (a++)->count;
  }
  sum.insert(sum.end(), a, bins_.end());
  bins_ = std::move(sum);
}

void Counts::add(const Counts& other) {
  if (other.size_ != size_) throw std::invalid_argument("counts with different bins do not add");
  add(other.bins_);
  elements += other.elements;
  above += other.above;
  zero += other.zero;
}

std::pair<int64_t, int64_t> Counts::rank(int64_t k) const {
  if (k <= 0) return {size_ - 1, at_least(size_ - 1)};
  int64_t count = 0;
  for (auto bin = bins_.rbegin(); bin != bins_.rend(); ++bin) {
    count += int64_t(bin->count);
    if (count >= k) return {bin->index, count};
  }
  return {-1, count};
}

int64_t Counts::at_least(int64_t first) const {
  int64_t count = 0;
  for (auto bin = bins_.rbegin(); bin != bins_.rend() && int64_t(bin->index) >= first; ++bin)
    count += int64_t(bin->count);
  return count;
}

// ---- the survey ----------------------------------------------------------------------------------------------------

Histogram::Histogram(const Backend& backend, std::vector<DType> dtypes, std::vector<Ranked> ranked, int64_t every,
                     ScoreWithFactors score, int64_t columns)
    : backend_(backend),
      dtypes_(std::move(dtypes)),
      ranked_(std::move(ranked)),
      every_(every),
      columns_(columns),
      score_(std::move(score)) {
  score_.score.factors = score_.factors.data();
  for (size_t i = 0; i < dtypes_.size(); ++i) {
    bool read = score_.score.kind != Score::kNone || i == 0;
    for (const Ranked& r : ranked_) read = read || size_t(r.input) == i;
    if (!read) continue;
    read_.push_back(i);
    wide_ = wide_ || dtypes_[i] == DType::F64;
  }
  for (const Ranked& r : ranked_) counts_.push_back(std::make_shared<Counts>(r.bins()));
}

// The layout of a thread's scratch: inputs, then a tally: itself, its brackets, their bins.
int64_t Histogram::scratch_bytes() const {
  int64_t bytes = int64_t(dtypes_.size()) * kRawBytes + int64_t(sizeof(Tally));
  for (const Ranked& r : ranked_) bytes += int64_t(sizeof(Bracket)) + r.bins() * int64_t(sizeof(uint32_t));
  return bytes;
}

Histogram::Tally* Histogram::tally_in(char* scratch) const {
  return reinterpret_cast<Tally*>(scratch + int64_t(dtypes_.size()) * kRawBytes);
}

void Histogram::begin(char* scratch) const {
  Tally* const tally = tally_in(scratch);
  *tally = {0, reinterpret_cast<Bracket*>(tally + 1)};
  auto* bins = reinterpret_cast<uint32_t*>(tally->brackets + ranked_.size());
  for (size_t j = 0; j < ranked_.size(); ++j) {
    const Ranked& r = ranked_[j];
    tally->brackets[j] = {r.input, r.low, r.high, r.shift, 0, bins, 0, 0};
    std::fill(bins, bins + r.bins(), 0);
    bins += r.bins();
  }
}

void Histogram::finish(char* scratch) {
  const Tally& tally = *tally_in(scratch);
  for (size_t j = 0; j < ranked_.size(); ++j) {
    Counts::Bins bins = Counts::filled(tally.brackets[j].bins, ranked_[j].bins());
    const std::lock_guard<std::mutex> lock(mutex_);
    counts_[j]->add(std::move(bins));
    counts_[j]->elements += tally.elements;
    counts_[j]->above += tally.brackets[j].above;
    counts_[j]->zero += tally.brackets[j].zero;
  }
}

void Histogram::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  Tally* const tally = tally_in(scratch);
  if (tally->elements + count >= kMostElements) {
    finish(scratch);
    begin(scratch);
  }
  std::vector<const void*> x(dtypes_.size());
  HistogramArgs args{};
  args.x = x.data();
  args.in = dtypes_.data();
  args.n = int(dtypes_.size());
  args.n_brackets = int(ranked_.size());
  args.wide = wide_;
  args.score = score_.score.kind != Score::kNone ? &score_.score : nullptr;
  args.columns = columns_;
  args.brackets = tally->brackets;
  const int64_t span = every_ > 1 ? kStrip : read_span(dtypes_);
  for (int64_t done = 0; done < count; done += every_ * span) {  // a piece begins with a strip that is looked at
    args.first = first + done;
    args.numel = std::min(span, count - done);
    for (const size_t i : read_) x[i] = inputs.get(i, args.first, args.numel, scratch + kRawBytes * int64_t(i));
    backend_.histogram(args);
    tally->elements += args.numel;
  }
}

}  // namespace fi
