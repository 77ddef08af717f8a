// The argument structs of the operations, and the table that a backend fills. Plain data: no STL, so that the files
// compiled for one instruction set share no inline code with the rest.
#pragma once

#include "dtypes.h"

namespace fi {

constexpr int kMaxInputs = 64, kMaxOutputs = 16;  // the same numbers stand in fastinterp/compute/ops.py
constexpr int64_t kChunk = 16384;                 // elements; statistics sample whole chunks. Part of NUMERICS.

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

// What one pass tells of one row. The counts cover every element, the sums and `changed` the sampled chunks.
struct RowStats {
  int64_t nan_in, inf_in, nan_out, inf_out;
  int64_t sampled, changed;
  double sum_pp, sum_dd, sum_od;  // <p,p>, <D,D>, <out - p, D>, with D the intended change
};

struct CombineArgs {
  const void* const* x;  // n inputs, `numel` elements each, any alignment
  const DType* in;       // n dtypes
  const Row* rows;       // k rows
  void* const* out;      // k outputs, any alignment, overlapping no input
  const uint64_t* keys;  // k Philox keys, when stochastic
  int n, k;
  DType out_dtype;
  bool stochastic, fp8_saturate;
  int stats_every;   // chunk c of the tensor is sampled iff c % stats_every == 0; 0 samples none
  int64_t numel;     // elements in this call
  int64_t first;     // index, in the tensor, of this call's first element
  RowStats* stats;   // k, added to
};

struct Backend {
  const char* name;
  bool (*usable)();
  void (*combine)(const CombineArgs&);
};

}  // namespace fi
