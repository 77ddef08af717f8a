// Gram matrices, L1 norms and counts of tensors, of their rows or of their columns; and the divergence of rows.
#pragma once

#include <map>
#include <mutex>

#include "step.h"

namespace fi {

// Adds the sums of chunks, `width` of each chunk, one chunk after the other, in pairs, as a tree: an unpaired chunk
// goes on to the next level. Leaves `width` sums.
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

// The sums of MeasureSurvey, of every row: measure_sums(n) reals for each, one row after the other, and n counts for
// each.
class MeasureRows : public Survey {
 public:
  MeasureRows(const Backend& backend, std::vector<DType> dtypes, int64_t numel, bool deltas, int64_t columns);
  int64_t piece() const override;
  int64_t scratch_bytes() const override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override { return {sums_, nonzero_}; }

 private:
  void long_row(const Inputs& inputs, int64_t row, MeasureArgs* args, char* scratch);

  const Backend& backend_;
  const std::vector<DType> dtypes_;
  const bool deltas_;
  const int64_t columns_;
  bool wide_ = false;
  std::vector<double> sums_;
  std::vector<int64_t> nonzero_;
};

// The sums of MeasureSurvey, of every column.
class MeasureColumns : public Survey {
 public:
  MeasureColumns(const Backend& backend, std::vector<DType> dtypes, int64_t numel, bool deltas, int64_t columns);
  int64_t piece() const override;
  int64_t scratch_bytes() const override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override;

 private:
  using Sums = std::vector<double>;  // measure_sums(n) and n counts for each column
  int width() const { return measure_sums(int(dtypes_.size())) + int(dtypes_.size()); }
  void block(const Inputs& inputs, int64_t first_row, int64_t rows, char* scratch, Sums* sums) const;
  void fold(int64_t index, Sums sums);

  const Backend& backend_;
  const std::vector<DType> dtypes_;
  const bool deltas_;
  const int64_t columns_, rows_;
  int64_t read_columns_;  // of a block that are read at a time
  bool wide_ = false;
  std::mutex mutex_;
  // Blocks fold in pairs as soon as both are there, so that few are held: (level, index on it) -> sums.
  std::map<std::pair<int, int64_t>, Sums> waiting_;
  Sums whole_;
};

// sum p log(p / q) of every row, p the softmax of the second input and q of the first: one real for each row. Rows
// longer than a chunk are read three times.
class Divergence : public Survey {
 public:
  Divergence(const Backend& backend, std::vector<DType> dtypes, int64_t numel, int64_t columns);
  int64_t piece() const override;
  int64_t scratch_bytes() const override;
  void run(const Inputs& inputs, int64_t first, int64_t count, char* scratch) override;
  Answer answer() const override { return {divergences_, {}}; }

 private:
  DivergenceArgs arguments(char* scratch) const;
  double long_row(const Inputs& inputs, int64_t first, char* scratch) const;

  const Backend& backend_;
  const std::vector<DType> dtypes_;
  const int64_t columns_;
  std::vector<double> divergences_;
};

}  // namespace fi
