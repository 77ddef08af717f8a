// Steps parsed from Python objects (fastinterp/ops/steps.py) into plain data, for both extensions. Sources, addresses
// and masks are resolved by each extension.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "numbers.h"

namespace fi {

enum class StepKind {
  kCopyEqual,
  kCombine,
  kGroupCombine,
  kMaskedSum,
  kMeasure,
  kMaskedStats,
  kHistogram,
  kDivergence
};
enum class Per { kTensor, kRow, kColumn };

// The decoder of a stored operand, which turns its bytes into float32: see ../decoder.h.
struct ParsedDecoder {
  struct Companion {
    int source;
    int64_t offset, bytes;
  };
  std::string name;  // empty: the bytes are elements of the operand's dtype
  int64_t columns = 1;
  std::vector<Companion> companions;
  std::vector<double> parameters;
};

// How a sum is encoded: see ../encoder.h.
struct ParsedEncoder {
  std::string name;  // empty: the outputs are elements of a dtype
  int64_t columns = 1;
  std::vector<int64_t> parameters;
  std::vector<std::pair<int, int64_t>> scales;  // sink and offset, of each output; none, if they are among the codes
  std::vector<float> magnitudes;                // of each matrix of each output, if they are known
};

// What is added to a stored operand: see ../low_rank.h.
struct ParsedLowRank {
  struct Factor {
    int source;
    int64_t offset;
    DType dtype;
    int64_t first, by_matrix, by_index, by_rank;
  };
  struct Product {
    Factor left, right, magnitude;
    int64_t rank;
    double scale;
    bool has_magnitude, per_row;
  };
  struct Rows {
    int source;
    int64_t offset;
    DType dtype;
    std::vector<int64_t> rows;  // one per stored row
  };
  struct Change {
    bool replaces;  // rows; else a product is added
    Product product;
    Rows rows;
  };
  DType stored = DType::F32;  // of the elements, where there is no decoder
  int64_t matrices = 0, rows = 0, columns = 0;
  std::vector<Change> changes;  // none: nothing is added
};

struct ParsedOperand {
  DType dtype;
  bool gathered = false;
  int source = -1;  // of a stored one
  int64_t offset = 0;
  ParsedDecoder decoder;
  ParsedLowRank low_rank;
  std::vector<std::tuple<int, int64_t, int64_t>> parts;  // of a gathered one: source, byte offset, rows
  std::vector<ParsedDecoder> decoders;                   // of each part; without a name: none. Empty: of no part
  pybind11::object rows;                                 // i64, a buffer
};

struct ParsedRow {
  int pivot;
  double total;
  std::vector<Term> terms;
};

struct ParsedGroupRow {
  int pivot;
  std::vector<int> inputs;          // of the terms
  Numbers<double> totals, weights;  // one per group; weights of the first group's terms, then of the second's
};

struct ParsedScore {
  Score::Kind kind = Score::kNone;
  uint32_t min_bits = 0;
  std::string factors;  // float32
};

struct ParsedTerm {
  int input, importance;  // -1: none
  double weight, sign_weight, share, sole_weight;
  MaskTest test;
  pybind11::object precomputed;  // None, or masks and the index of one of them
};

struct ParsedMaskedOutput {
  int base;
  std::vector<ParsedTerm> terms;
  bool elects_signs, divides, has_sole_weights, important;
  double least_share, other_share, limit;
  ParsedScore score;
};

struct ParsedBracket {
  int input;
  uint32_t low, high;
  int shift;
  int64_t bins() const { return int64_t((high - low) >> shift) + 1; }
};

struct ParsedStep {
  StepKind kind;
  int64_t numel = 0, columns = 0;  // columns 0: none of its rows or columns is looked at
  std::vector<ParsedOperand> inputs;

  // Only kinds that write have these.
  bool writes = false;
  std::vector<int> sinks;
  std::vector<int64_t> offsets;
  DType out_dtype = DType::F32;
  std::vector<uint64_t> keys;  // none: rounding to nearest
  ParsedEncoder encoder;
  bool measures = false;  // the largest magnitudes of its sums are measured, and nothing is written

  Per per = Per::kTensor;                   // of measure and group_combine
  std::vector<ParsedRow> rows;              // of combine
  std::vector<ParsedGroupRow> group_rows;   // of group_combine
  std::vector<ParsedMaskedOutput> outputs;  // of masked_sum
  std::vector<MaskTest> tests;              // of masked_stats
  bool l1 = false, squares = false;         // of masked_stats
  pybind11::object fills =
      pybind11::none();  // of masked_stats: None, or masks to be filled, and the index of one of them by input
  ParsedScore score;     // of masked_stats and histogram
  std::vector<ParsedBracket> brackets;  // of histogram
  int64_t every = 1;                    // of histogram
  bool deltas = false;                  // of measure
};

// All throw pybind11::value_error, or the exception of a failed conversion.

// Checks all that does not depend on where operands are.
ParsedStep parse_step(const pybind11::handle& step);
ParsedRow parse_row(const pybind11::handle& row, size_t inputs);
// Whole rows of `numel` elements.
int64_t columns_of(const ParsedStep& step, int64_t numel);
DType dtype_of(int code);
void check_count(size_t count, int most, const char* what);
const char* name_of(StepKind kind);

}  // namespace fi
