// Masked sums on a device: rule 14 of docs/NUMERICS.md.
#pragma once

#include <cuda_runtime.h>

#include "tasks.h"

namespace fi {
namespace cuda {

// Numbers are T: the host converts them, since a device takes dozens of cycles to make a float of a double.
template <class T>
struct MaskedTerm {
  int input, importance;  // -1: none
  T weight, least_weight, sign_weight, share, sole_weight;
  MaskRange test;
};

// One output of a piece.
template <class T>
struct MaskedTask {
  InputTable inputs;
  int base, n_terms;
  bool elects_signs, divides, has_sole_weights, important;
  bool random;  // some term draws
  T least_share, other_share, limit;
  ScoreTask score;
  uint64_t reads;  // bit i: input i is read
  OutputTask to;
  int64_t numel, first;
  OutputStats stats;
  MaskedTerm<T> terms[kMaxInputs];
};

struct MaskedSumTask : MaskedTask<double> {
  bool wide;  // compute in float64
};

// There is at least one element.
void masked_sum(const MaskedSumTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
