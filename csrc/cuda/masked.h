// Masked sums on a device: rule 14 of docs/NUMERICS.md.
#pragma once

#include <cuda_runtime.h>

#include "tasks.h"

namespace fi {
namespace cuda {

struct MaskedTaskTerm {
  int input, importance;  // -1: none
  double weight, vote, share, alone;
  KeepRange keep;
};

// One output of a piece.
struct MaskedTask {
  InputTable inputs;
  int base, n_terms;
  bool wide, votes, divides, alone, important;
  double least_share, other_share, limit;
  ScoreTask score;
  uint64_t reads;  // bit i: input i is read
  OutputTask to;
  int64_t numel, first;
  OutputStats stats;
  MaskedTaskTerm terms[kMaxInputs];
};

// There is at least one element.
void masked(const MaskedTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
