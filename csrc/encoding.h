// Encodes the outputs of a step: which elements share a scale, and where codes and scales go.
#pragma once

#include <utility>
#include <vector>

#include "encoder.h"

namespace fi {

// How the elements of a tensor are divided into blocks with a scale each: matrices of `rows` rows follow each other,
// and each has blocks of block_rows x block_columns, at its edges smaller ones.
struct Blocks {
  int64_t rows, columns, block_rows, block_columns;
};

// Scales of blocks that follow each other.
struct ScaleRun {
  int64_t first;              // index of the first of them in the tensor
  std::vector<float> values;  // as codes are divided by them; of Q8_0 the reciprocals
  std::vector<char> stored;
};

// An encoder, with what it needs to know of one tensor; the same for all outputs of a step.
//
// A band is the least run of elements that has whole blocks: one block of a row, a row, or some rows. Bands follow each
// other in the tensor, and so do their scales.
class Encoding {
 public:
  // Where the scales of one output go; nowhere, if they are stored among the codes.
  struct Place {
    int sink;
    int64_t offset;
  };
  struct Format {
    ScaleKind kind;
    bool power_of_two;
  };

  // grain   of the sum: bands are multiples of it, too
  // places  one per output, or none
  // known   the largest magnitude of each matrix, which is one block, of every output; none: they are measured
  Encoding(const Backend& backend, const Encoder& encoder, Format format, int64_t numel, Blocks blocks, int64_t grain,
           std::vector<Place> places, std::vector<float> known);

  const std::vector<Place>& places() const { return places_; }
  bool known() const { return !known_.empty(); }
  int64_t stored_block() const { return encoder_.block_elements; }
  int scale_bytes() const { return fi::scale_bytes(format_.kind); }

  // (offset, bytes) of the codes of elements [first, first + count), whole blocks as they are stored.
  std::pair<int64_t, int64_t> codes(int64_t first, int64_t count) const;
  // (index, count) of the scales of the blocks that begin in [first, first + count): all of them, if these are bands.
  std::pair<int64_t, int64_t> blocks(int64_t first, int64_t count) const;

  // The end of the last band that ends within `most` elements from `first`, where one begins; of the first, if it is
  // longer. If magnitudes are known, there are no bands: any grain.
  int64_t end_of_bands(int64_t first, int64_t most) const;

  // Adds the elements to the magnitudes of their blocks; `magnitudes` begins with that of the block of index `from`.
  void measure(const float* x, int64_t first, int64_t count, int64_t from, uint32_t* magnitudes) const;
  // The scales of blocks from `from` on that have these magnitudes.
  ScaleRun scales_of(int64_t from, const std::vector<uint32_t>& magnitudes) const;
  // The scales of [first, first + count) of an output, if magnitudes are known.
  ScaleRun known_scales(size_t output, int64_t first, int64_t count) const;
  // The codes of the elements, and what they stand for, unless `decoded` is null.
  void encode(const float* x, int64_t first, int64_t count, const ScaleRun& scales, void* to, float* decoded) const;

  // What became of the sums x of `count` elements, at most kChunk, when they were encoded: see RowStats.
  void add_stats(const void* pivot, DType dtype, const float* x, const float* decoded, int64_t count, char* scratch,
                 RowStats* stats) const;
  static constexpr int64_t kStatsBytes = 3 * kChunk * int64_t(sizeof(double));  // of scratch

 private:
  // Calls take(args, index, done) for parts of rows: args has x, column, numel, block and codes. index: of the scale of
  // column 0, from `from` on. done: elements before the part.
  template <class Take>
  void for_rows(const float* x, int64_t first, int64_t count, int64_t from, Take take) const;
  int64_t row_blocks() const { return (blocks_.columns + blocks_.block_columns - 1) / blocks_.block_columns; }
  int64_t matrix_bands() const { return (blocks_.rows + blocks_.block_rows - 1) / blocks_.block_rows; }
  int64_t band_end(int64_t first) const;

  const Backend& backend_;
  const Encoder encoder_;
  const Format format_;
  const int64_t numel_, grain_;
  const Blocks blocks_;
  const bool in_rows_;  // a block lies in one row, and rows have whole blocks
  const std::vector<Place> places_;
  const std::vector<float> known_;
};

}  // namespace fi
