// The argument structs of the operations, and the table that a backend fills. Plain data: no STL, so that the files
// compiled for one instruction set share no inline code with the rest.
#pragma once

#include "dtypes.h"

namespace fi {

constexpr int kMaxInputs = 64, kMaxOutputs = 256;  // the same numbers stand in fastinterp/ops/combine.py
// Elements and lanes of a measured chunk: sums run in lanes, lanes and chunks fold in pairs. Part of NUMERICS, not
// tuning knobs. 256 lanes are one CUDA block; on AVX-512 they are eight passes of four registers.
constexpr int64_t kChunk = 16384;
constexpr int kLanes = 256;

// One summand of a row: weight * (x[input] - x[pivot]).
struct Term {
  int input;
  double weight;
};

// One output: total * x[pivot] + sum of the terms, in their order. No terms and a total of 1 is a copy.
struct Row {
  int pivot;
  int n_terms;
  double total;
  const Term* terms;
};

FI_INLINE bool is_copy(const Row& row) { return row.n_terms == 0 && row.total == 1.0; }

// Statistics of one row in one pass. The counts cover every element, the sums and `changed` the sampled chunks.
struct RowStats {
  int64_t nan_in, inf_in, nan_out, inf_out;
  int64_t sampled, changed;
  double sum_pp, sum_dd, sum_od;  // <p,p>, <D,D>, <out - p, D>, with D the intended change
};

FI_INLINE void add(const RowStats& from, RowStats* to) {
  to->nan_in += from.nan_in;
  to->inf_in += from.inf_in;
  to->nan_out += from.nan_out;
  to->inf_out += from.inf_out;
  to->sampled += from.sampled;
  to->changed += from.changed;
  to->sum_pp += from.sum_pp;
  to->sum_dd += from.sum_dd;
  to->sum_od += from.sum_od;
}

struct CombineArgs {
  const void* const* x;  // n inputs, `numel` elements each, any alignment
  const DType* in;       // n dtypes
  const Row* rows;       // k rows
  void* const* out;      // k outputs, any alignment, overlapping no input
  const uint64_t* keys;  // k Philox keys, when stochastic
  int n, k;
  DType out_dtype;
  bool stochastic, fp8_saturate;
  bool streamed;    // store the outputs around the caches, where the kernel can
  int stats_every;  // chunk c of the tensor is sampled iff c % stats_every == 0; 0 samples none
  int64_t numel;    // elements in this call
  int64_t first;    // index, in the tensor, of this call's first element
  RowStats* stats;  // k, added to
};

// Whether the outputs of a call that reads and writes so many bytes in memory are best stored around the caches:
// docs/performance.md has measurements. Not the size that the system tells of a cache: in virtual machines it is that
// of the whole processor.
FI_INLINE bool worth_streaming(int64_t bytes) { return bytes >= 32 << 20; }

// The number of sums of a measure of n vectors: the upper triangle of the Gram matrix row by row, then the L1 norms.
FI_INLINE int measure_sums(int n) { return n * (n + 1) / 2 + n; }

struct MeasureArgs {
  const void* const* x;  // n inputs, `numel` elements each, any alignment
  const DType* in;
  int n;
  bool deltas;       // the vectors are x[0] and x[i] - x[0]; else the inputs themselves
  bool wide;         // compute in float64; needed when any input is F64
  int64_t numel;     // at most kChunk: one whole chunk of a tensor, or its last one
  void* scratch;     // n * kChunk elements of the compute type
  double* sums;      // measure_sums(n)
  int64_t* nonzero;  // n, added to: elements of each vector that are not 0 (NaN counts)
};

// One output of a combine whose weights differ by group: totals[g] * x[pivot] + sum of the terms, g the element's
// group.
struct GroupRow {
  int pivot;
  int n_terms;
  const int* inputs;      // of the terms
  const double* totals;   // one per group; null if all are 1
  const double* weights;  // of the first term, one per group; then those of the second
};

// A group is a row (index / columns) or a column (index % columns) of the tensor. A term whose weight is 0 in the
// compute type is skipped, not multiplied.
struct GroupArgs {
  CombineArgs combine;  // but for its rows
  const GroupRow* rows;
  int64_t columns, groups;
  bool per_row;
};

constexpr int kBlockRows = 64;  // that a column sums before blocks fold: kLanes columns of them are a chunk

// Sums by column over a block of rows, and of up to kLanes columns.
struct ColumnArgs {
  const void* const* x;  // n inputs: the first element of each
  const DType* in;
  int n;
  bool deltas, wide;  // as in MeasureArgs
  int rows, columns;  // at most kBlockRows, kLanes
  int64_t stride;     // elements from one row to the next
  void* scratch;      // n * kChunk elements of the compute type
  double* sums;       // measure_sums(n) and n counts for each column
};

// The divergence of one row of two tensors, a chunk at a time in three passes.
struct DivergenceArgs {
  enum Pass {
    kTop,     // top[i] grows to the largest element
    kPowers,  // sums[i] becomes the sum of exp(x[i] - top[i])
    kTerms,   // sums[0] becomes the sum of p * log(p / q), from totals
  };
  const void* x[2];  // of q and p, `numel` elements each, any alignment
  DType in[2];
  Pass pass;
  bool reuse_powers;  // of kTerms: scratch still holds the powers of this chunk
  int64_t numel;      // at most kChunk
  double* scratch;    // 2 * kChunk
  double top[2], totals[2], sums[2];
};

constexpr uint32_t kMostMagnitude = 0x7fffffffu;  // as float32 bits: that of every NaN

// A mask test: an element of a delta passes if its magnitude, as float32 bits, is in min_bits..max_bits and its random
// word is below a limit. The limit runs from `low_limit` for the smallest magnitude of a row to `high_limit`,
// 0..kWords; kWords draws no word.
constexpr uint64_t kWords = 1ull << 32;
struct MaskTest {
  uint32_t min_bits, max_bits;
  uint64_t low_limit, high_limit;
  uint64_t key;  // of the words
};

FI_INLINE bool is_random(const MaskTest& test) { return test.low_limit < kWords; }
FI_INLINE bool is_ranked(const MaskTest& test) { return test.low_limit != test.high_limit; }

// One delta d = x[input] - x[base] of a masked row; 0 where the input is the base itself.
struct MaskedTerm {
  int input, importance;  // importance: an input whose elements are a further factor of the weight, or -1
  double weight, sign_weight, share, sole_weight;
  MaskTest test;
  const uint8_t* precomputed;  // the mask of the tensor, if a survey has filled it: kMaskSlack bytes longer
};

// A mask of elements is a bit for each, the first the lowest: 1 where the element passes. It is read by eight bytes.
constexpr int kMaskSlack = 8;
FI_INLINE int64_t mask_bytes(int64_t numel) { return (numel + 7) / 8 + kMaskSlack; }

// A score: a number for every element. Elements whose score is below `min_bits` (as float32) are masked out of every
// delta.
struct Score {
  enum Kind { kNone, kVariance, kDivergence };  // from all terms; from the first, times a factor per row
  Kind kind;
  uint32_t min_bits;
  const float* factors;
};

// One output: x[base] + step. See MaskedCombine in fastinterp/ops/requests.py.
struct MaskedRow {
  int base, n_terms, n_reads;
  const MaskedTerm* terms;
  const int* reads;                              // every input that is read, once
  bool elects_signs, divides, has_sole_weights;  // which of the terms' numbers count
  bool important;  // the terms have importances, and none of these three, nor tests of magnitude, nor a score
  double least_share, other_share, limit;
  Score score;
};

struct MaskedSumArgs {
  CombineArgs of;         // all but its rows
  const MaskedRow* rows;  // k rows
  int64_t columns;        // length of a row of the tensor
  // One per term, row after row: the mask that `ranked` computed, `numel` elements; null where there are no ranks.
  const uint8_t* const* ranked;
  void* scratch;  // masked_sum_scratch(most terms of a row)
};

constexpr int kMaskedTile = 1024;  // elements
FI_INLINE int64_t masked_sum_scratch(int terms) { return int64_t(terms) * kMaskedTile * 16; }

// Bins in which the magnitudes of a row are counted, a quarter of them in each of four tables, and limits of each bin.
constexpr int kRankBins = 4096;
constexpr int64_t kRankCountBytes = kRankBins * 16;  // of the counts, which come first
constexpr int64_t kRankBinsBytes = kRankCountBytes + kRankBins * 4;

// The mask of one row of one delta, by a test whose limit depends on the rank in the row.
struct RankArgs {
  const void *x0, *x;  // `numel` elements each
  DType in0, in;
  bool wide;  // compute in float64
  double limit;
  MaskTest test;
  int64_t numel, first;
  uint64_t* scratch;  // 2 * numel
  uint64_t* bins;     // kRankBinsBytes; the counts are 0, and 0 again in the end
  uint8_t* mask;      // numel: 1 where the element passes, else 0
};

struct MaskedStatsArgs {
  const void* const* x;  // n inputs, `numel` elements each
  const DType* in;
  const MaskTest* tests;         // n; that of the base, x[0], is ignored
  const uint8_t* const* ranked;  // n; as in MaskedSumArgs
  int n;
  bool wide;
  Score score;
  int64_t numel, first;  // at most kChunk elements: one whole chunk of a tensor, or its last one
  int64_t columns;       // length of a row of the tensor
  bool l1, squares;      // which of the sums are wanted; the others stay as they are
  void* scratch;         // masked_stats_scratch(n)
  double* sums;          // 3 * n: L1 norms of the deltas, of the masked deltas, then their squares; 0 for the base
  int64_t* counts;       // 2 * n, added to: elements that pass, then those of them that pass in another delta too
  uint8_t** masks;       // n: of this chunk; null where not wanted
};

FI_INLINE int64_t masked_stats_scratch(int n) { return n * (8 * kChunk + kChunk / 8); }

// One histogram of magnitudes, as float32 bits: in bin (magnitude - low) >> shift, if it is in low..high.
struct Bracket {
  int input;  // whose delta from x[0] is ranked; ignored where a score is
  uint32_t low, high;
  int shift;
  uint32_t hot;         // the kernel's guess at the bin that is hit most; 0 at first
  uint32_t* bins;       // added to
  int64_t above, zero;  // added to: magnitudes above high, and those that are 0, wherever the bracket lies
};

struct HistogramArgs {
  const void* const* x;  // n inputs, `numel` elements each, any alignment
  const DType* in;
  int n, n_brackets;
  bool wide;           // compute in float64; needed when any input is F64
  const Score* score;  // what is ranked, or null: deltas
  int64_t columns;     // length of a row of the tensor
  Bracket* brackets;   // those of one input next to each other
  int64_t numel;       // elements in this call, less than 2^32 until the bins are emptied
  int64_t first;       // index, in the tensor, of this call's first element
};

// Codes of numbers that were divided by a scale: E4M3 and E5M2 saturate, int8 rounds to nearest even. Q8_0, a block of
// 34 bytes for 32 numbers, is multiplied by the reciprocal of the scale, and rounds halves away from zero.
enum class Codes { kE4M3, kE5M2, kI8, kQ8_0 };

// A part of one row, whose columns have a scale for each `block` of them, the last block perhaps for fewer.
struct EncodeArgs {
  const float* x;  // numel
  int64_t column;  // of the first
  int64_t numel, block;
  Codes codes;
  const float* scales;  // of the blocks from column 0 on; of Q8_0 their reciprocals
  const char* stored;   // of Q8_0: the scales as they are stored, F16
  void* out;            // of any alignment
  float* decoded;       // numel: the numbers that the codes stand for; null where they are not wanted
};

struct Decoder;
struct Xxh3;

// Columns of a right factor that lie together: of panel p, rank values of kLowRankPanel columns each.
constexpr int kLowRankPanel = 32;

// One product that is added to a matrix, packed. left: rank values a row. right: panels, the last one filled with 0.
struct LowRankTerm {
  const float *left, *right;
  int64_t rank;
  float scale;
  const float* factors;  // null, or what each row or column is multiplied by then
  bool factor_per_row;
};

struct LowRankArgs {
  const void* x;  // elements [first, first + count) of one matrix; of any alignment
  DType in;
  int64_t first, count, columns;
  const LowRankTerm* terms;
  int n_terms;
  float* to;  // may be x
};

struct Backend {
  const char* name;
  bool (*usable)();
  void (*combine)(const CombineArgs&);
  void (*combine_groups)(const GroupArgs&);
  void (*measure)(const MeasureArgs&);
  void (*measure_columns)(const ColumnArgs&);
  void (*divergence)(DivergenceArgs&);
  void (*masked_sum)(const MaskedSumArgs&);
  void (*ranked)(const RankArgs&);
  void (*masked_stats)(const MaskedStatsArgs&);
  void (*histogram)(const HistogramArgs&);
  // bits[b] grows to the largest magnitude of block b, as float32 bits; codes that can store NaN and Inf leave these
  // out.
  void (*magnitudes)(const EncodeArgs&, uint32_t* bits);
  void (*encode)(const EncodeArgs&);
  const Decoder* const* decoders;  // decoder.h; null ends them
  void (*low_rank)(const LowRankArgs&);
  const Xxh3* xxh3;  // xxh3.h
};

}  // namespace fi
