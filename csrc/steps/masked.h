// Sums with masks, and statistics of masked deltas.
#pragma once

#include "step.h"

namespace fi {

// A score and the storage of its factors. score.factors is not set: see score_view and Histogram.
struct ScoreWithFactors {
  Score score;
  std::vector<float> factors;
};

// Precomputed masks of the deltas of one tensor, a bit per element: a survey fills them, masked sums read them.
class Masks {
 public:
  Masks(int count, int64_t numel) : count_(count), numel_(numel) {}
  // Before they are filled. Not cleared: what is read of them was written.
  void allocate() {
    if (!bits_) bits_.reset(new uint8_t[size_t(bytes())]);
  }
  bool allocated() const { return bits_ != nullptr; }
  int count() const { return count_; }
  int64_t numel() const { return numel_; }
  int64_t bytes() const { return count_ * mask_bytes(numel_); }
  uint8_t* mask(int i) const { return bits_.get() + i * mask_bytes(numel_); }

 private:
  const int count_;
  const int64_t numel_;
  std::unique_ptr<uint8_t[]> bits_;
};

// One output of a masked sum, with the storage that its row points to.
struct MaskedOutput {
  MaskedRow row;  // but for its pointers and its score, which are of what follows
  std::vector<MaskedTerm> terms;
  std::vector<std::shared_ptr<const Masks>> masks;  // that terms point to
  ScoreWithFactors score;
  std::vector<int> reads;
  bool wide;
};

class MaskedSum : public Sum {
 public:
  MaskedSum(const Backend& backend, const std::vector<DType>& dtypes, std::vector<MaskedOutput> outputs,
            int64_t columns);
  void run(const CombineArgs& args, char* scratch) const override;
  int64_t scratch_bytes(int64_t most) const override;
  int pivot(size_t output) const override { return rows_[output].base; }
  // Ranks need whole rows.
  int64_t grain() const override { return ranks_ ? columns_ : 1; }

 private:
  const Backend& backend_;
  std::vector<MaskedOutput> outputs_;
  std::vector<MaskedRow> rows_;
  const int64_t columns_;
  int terms_ = 0, ranks_ = 0;  // the most terms of an output; terms with ranks, of all outputs
};

// What a survey of masked deltas computes beside counts.
struct MaskedStatsRequest {
  std::vector<MaskTest> tests;
  ScoreWithFactors score;
  bool l1, squares;
  std::shared_ptr<const Masks> masks;  // to be filled; null if not wanted
  std::vector<int> mask_indices;       // of each input: its mask among these, or -1
};

// Answers with 3n reals and 2n counts: see MaskedStatsArgs.
class MaskedStatsSurvey : public Survey {
 public:
  MaskedStatsSurvey(const Backend& backend, std::vector<DType> dtypes, MaskedStatsRequest request, int64_t numel,
                    int64_t columns);
  int64_t piece() const override { return piece_; }
  int64_t scratch_bytes() const override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override;

 private:
  void run_part(const Inputs& inputs, int64_t first, int64_t count, int64_t* counts, char* scratch);

  const Backend& backend_;
  const std::vector<DType> dtypes_;
  const MaskedStatsRequest request_;
  const int64_t columns_;
  bool wide_ = false, ranks_ = false;
  int64_t piece_ = 16 * kChunk;
  int64_t part_ = kChunk;        // elements that are read at a time
  int64_t raw_bytes_ = 0;        // of them, of one input, with what else of their rows is needed
  std::vector<double> sums_;     // of each chunk
  std::vector<int64_t> counts_;  // of each piece
};

}  // namespace fi
