// Histograms of magnitudes or scores, as surveys of the pump, and the counts that they answer with.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "masked.h"

namespace fi {

// The magnitudes of one vector in bins, low to high; sums over threads, or over tensors.
class Counts {
 public:
  explicit Counts(int64_t bins) : size_(bins) {}
  // `counted`: how many are in each bin.
  Counts(int64_t elements_seen, int64_t above_bins, int64_t zeros, const uint32_t* counted, int64_t bins)
      : elements(elements_seen), above(above_bins), zero(zeros), size_(bins), bins_(filled(counted, bins)) {}

  int64_t elements = 0, above = 0, zero = 0;  // looked at; above the last bin; equal to 0, in a bin or not
  std::vector<uint64_t> bins() const;
  // Throws std::invalid_argument, if `other` has another number of bins.
  void add(const Counts& other);
  // The bin of the k-th largest of what is in bins, and how many are in it or above; {-1, all} if those are fewer.
  std::pair<int64_t, int64_t> rank(int64_t k) const;
  int64_t at_least(int64_t first) const;  // in bin `first` or above

 private:
  friend class Histogram;
  struct Bin {
    uint32_t index;
    uint64_t count;
  };
  using Bins = std::vector<Bin>;
  // Those of `bins` that are not empty.
  static Bins filled(const uint32_t* bins, int64_t size);
  void add(Bins more);

  const int64_t size_;
  Bins bins_;  // those that are not empty, ascending: the deltas of 16-bit models fill few of many
};

// Elements that are sampled or skipped together: fewer than most rows have, because the elements of a row are alike.
constexpr int64_t kStrip = 512;

// Counts the magnitudes of deltas, or scores, in bins.
class Histogram : public Survey {
 public:
  struct Ranked {
    int input;  // whose delta; ignored where a score is ranked
    uint32_t low, high;
    int shift;
    int64_t bins() const { return int64_t((high - low) >> shift) + 1; }
  };
  // Strip s of the tensor, kStrip elements, is looked at iff s % every == 0. `score`: what is ranked, unless its kind
  // is kNone.
  Histogram(const Backend& backend, std::vector<DType> dtypes, std::vector<Ranked> ranked, int64_t every,
            ScoreWithFactors score, int64_t columns);
  int64_t piece() const override { return every_ > 1 ? 128 * every_ * kStrip : 16 * kChunk; }
  int64_t scratch_bytes() const override;
  bool reads_all() const override { return every_ == 1; }
  void begin(char* scratch) const override;
  void finish(char* scratch) override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override { return {{}, {}, counts_}; }

 private:
  // The counts of one thread, in its scratch, until they are added to the rest: when the thread has no more pieces, or
  // bins may overflow.
  struct Tally {
    int64_t elements;
    Bracket* brackets;
  };
  Tally* tally_in(char* scratch) const;

  const Backend& backend_;
  const std::vector<DType> dtypes_;
  const std::vector<Ranked> ranked_;
  const int64_t every_, columns_;
  ScoreWithFactors score_;
  std::vector<size_t> read_;  // the inputs that are ranked, and the first
  bool wide_ = false;
  std::mutex mutex_;
  std::vector<std::shared_ptr<Counts>> counts_;
};

}  // namespace fi
