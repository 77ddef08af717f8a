// Masked sums on a device: rule 14 of docs/NUMERICS.md.
#pragma once

#include <cuda_runtime.h>

#include "tasks.h"

namespace fi {
namespace cuda {

struct MaskedSumTaskTerm {
  int input, importance;  // -1: none
  double weight, sign_weight, share, sole_weight;
  MaskRange test;
};

// One output of a piece.
struct MaskedSumTask {
  InputTable inputs;
  int base, n_terms;
  bool wide, elects_signs, divides, has_sole_weights, important;
  double least_share, other_share, limit;
  ScoreTask score;
  uint64_t reads;  // bit i: input i is read
  OutputTask to;
  int64_t numel, first;
  OutputStats stats;
  MaskedSumTaskTerm terms[kMaxInputs];
};

// There is at least one element.
void masked_sum(const MaskedSumTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
