#include "histogram.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <stdexcept>

namespace fi {

namespace {

constexpr int64_t kRawBytes = kChunk * 8 + 4096;     // of one chunk of one input, as stored
constexpr int64_t kMostElements = int64_t(1) << 31;  // that a tally counts before it is emptied: its bins have 32 bits

}  // namespace

// ---- counts --------------------------------------------------------------------------------------------------------

Counts::Counts(int64_t bins) : size_(bins) {
  void* const memory =
      mmap(nullptr, size_t(bins) * sizeof *bins_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  bins_ = static_cast<uint64_t*>(memory);
}

Counts::~Counts() { munmap(bins_, size_t(size_) * sizeof *bins_); }

void Counts::add(const uint32_t* bins) {
  for (int64_t i = 0; i < size_; ++i)
    if (bins[i] != 0) bins_[i] += bins[i];
}

void Counts::add(const Counts& other) {
  if (other.size_ != size_) throw std::invalid_argument("counts with different bins do not add");
  for (int64_t i = 0; i < size_; ++i)
    if (other.bins_[i] != 0) bins_[i] += other.bins_[i];
  elements += other.elements;
  above += other.above;
  zero += other.zero;
}

std::pair<int64_t, int64_t> Counts::rank(int64_t k) const {
  int64_t count = 0;
  for (int64_t i = size_ - 1; i >= 0; --i) {
    count += int64_t(bins_[i]);
    if (count >= k) return {i, count};
  }
  return {-1, count};
}

int64_t Counts::at_least(int64_t first) const {
  int64_t count = 0;
  for (int64_t i = std::max<int64_t>(first, 0); i < size_; ++i) count += int64_t(bins_[i]);
  return count;
}

// ---- the survey ----------------------------------------------------------------------------------------------------

Histogram::Histogram(const Backend& backend, std::vector<DType> dtypes, int64_t numel, std::vector<Ranked> ranked,
                     int64_t every, OwnScore score, int64_t columns)
    : backend_(backend),
      dtypes_(std::move(dtypes)),
      ranked_(std::move(ranked)),
      every_(every),
      columns_(columns),
      score_(std::move(score)),
      pieces_left_((numel + piece() - 1) / piece()) {
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

// The tallies' bins are in it, though they are taken from the heap: it is what a thread needs.
int64_t Histogram::scratch_bytes() const {
  int64_t bins = 0;
  for (const Ranked& r : ranked_) bins += r.bins();
  return int64_t(dtypes_.size()) * kRawBytes + bins * int64_t(sizeof(uint32_t));
}

void Histogram::run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) {
  std::unique_ptr<Tally> tally = take();
  std::vector<const void*> x(dtypes_.size());
  HistogramArgs args{};
  args.x = x.data();
  args.in = dtypes_.data();
  args.n = int(dtypes_.size());
  args.n_brackets = int(ranked_.size());
  args.wide = wide_;
  args.score = score_.score.kind != Score::kNone ? &score_.score : nullptr;
  args.columns = columns_;
  args.brackets = tally->brackets.data();
  const int64_t span = every_ > 1 ? kStrip : kChunk;
  for (int64_t done = 0; done < count; done += every_ * span) {  // a piece begins with a strip that is looked at
    args.first = first + done;
    args.numel = std::min(span, count - done);
    for (const size_t i : read_) x[i] = inputs.get(i, args.first, args.numel, scratch + kRawBytes * int64_t(i));
    backend_.histogram(args);
    tally->elements += args.numel;
  }
  give_back(std::move(tally));
}

std::unique_ptr<Histogram::Tally> Histogram::take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      std::unique_ptr<Tally> tally = std::move(free_.back());
      free_.pop_back();
      return tally;
    }
  }
  auto tally = std::make_unique<Tally>();
  for (const Ranked& r : ranked_) {
    tally->bins.emplace_back(size_t(r.bins()));
    tally->brackets.push_back({r.input, r.low, r.high, r.shift, 0, tally->bins.back().data(), 0, 0});
  }
  return tally;
}

void Histogram::give_back(std::unique_ptr<Tally> tally) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (tally->elements >= kMostElements)
    fold(tally.get());
  else
    free_.push_back(std::move(tally));
  if (--pieces_left_ > 0) return;
  for (const std::unique_ptr<Tally>& t : free_) fold(t.get());
  free_.clear();
}

void Histogram::fold(Tally* tally) {
  for (size_t j = 0; j < ranked_.size(); ++j) {
    counts_[j]->add(tally->bins[j].data());
    counts_[j]->elements += tally->elements;
    counts_[j]->above += tally->brackets[j].above;
    counts_[j]->zero += tally->brackets[j].zero;
  }
}

}  // namespace fi
