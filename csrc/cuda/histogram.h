// Counts of magnitudes or scores in bins, on a device.
#pragma once

#include <cuda_runtime.h>

#include "tasks.h"

namespace fi {
namespace cuda {

constexpr int kMostBrackets = 64;    // of a launch
constexpr int64_t kStripUnits = 64;  // of kUnit elements: a strip of csrc/steps/histogram.h

// Magnitudes low..low + width are counted in bin first_bin + (magnitude - low) >> shift.
struct BracketTask {
  int input, shift;
  uint32_t low, width, first_bin;
};

struct HistogramTask {
  InputTable inputs;  // the first is the base
  int n, n_brackets;
  bool wide;
  ScoreTask score;  // what is ranked; of kind kNone: deltas
  int64_t numel, first;
  int64_t first_strip, every, strips;  // of the tensor, that are looked at: the first, every so many, how many
  uint32_t* bins;                      // added to; but not what is 0
  int64_t* counts;                     // above and zero of each bracket, added to
  BracketTask brackets[kMostBrackets];
};

// There is at least one strip. The device that the stream is of is the thread's current one.
void histogram(const HistogramTask& task, cudaStream_t stream);

}  // namespace cuda
}  // namespace fi
