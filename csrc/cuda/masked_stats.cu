#include "lanes.h"
#include "masked_stats.h"
#include "scores.h"
#include "values.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kDeltas = 4, kKinds = 5;  // deltas whose sums a block computes; of each, so many
constexpr int kSpan = kLanes * kUnit;   // elements whose random numbers are drawn at a time
constexpr int kShared = kDeltas * kKinds * kLanes;
static_assert(kSpan <= kShared && kUnit == kCounterElements, "a thread draws what as many as it has elements need");

// Bit k - 1 of drawn[i]: whether element i from e on is drawn by the test of input k. e is a multiple of kSpan.
FI_DEVICE void draw_span(const MaskedStatsTask& task, int64_t e, uint64_t* drawn) {
  const uint32_t lane = thread_index() % kPhiloxLanes, group = thread_index() / kPhiloxLanes;
  uint64_t bits[kCounterElements] = {};
#pragma unroll 1
  for (int k = 1; k < task.n; ++k) {
    const uint32_t some = drawn_by(task.tests[k], e / kMaskGroup + group, lane);
#pragma unroll
    for (int j = 0; j < kCounterElements; ++j) bits[j] |= uint64_t(some >> j & 1) << (k - 1);
  }
  for (int j = 0; j < kCounterElements; ++j) drawn[group * kMaskGroup + uint32_t(j) * kPhiloxLanes + lane] = bits[j];
}

template <class T>
FI_DEVICE T delta_of(const MaskedStatsTask& task, int k, int64_t at, T p) {
  return widen_any<T>(task.inputs.in[k], task.inputs.x[k], at) - p;
}

// Bit k - 1: whether the element passes in the delta of input k, which is delta(k - 1). kMost: as of score_of.
template <class T, int kMost, class Delta>
FI_DEVICE uint64_t mask_bits(const MaskedStatsTask& task, int64_t at, uint64_t drawn, Delta delta) {
  const int terms = task.n - 1;
  if (task.score.kind != Score::kNone) {
    const T score = score_of<T, kMost>(task.score, terms, task.first + at, delta);
    if (magnitude(score) < task.score.min_bits) return 0;
  }
  uint64_t bits = 0;
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < (kMost ? kMost : terms); ++t)
    if (t < terms && in_range(task.tests[t + 1], magnitude(delta(t)))) bits |= uint64_t(1) << t;
  return bits & drawn;
}

// A block has one chunk and kDeltas deltas. kMany: there are more of them.
template <class T, bool kMany>
FI_KERNEL(kLanes, kMany ? 2 : 3)
masked_stats_kernel(FI_ARGUMENT MaskedStatsTask task) {
  FI_SHARED double shared[kShared];
  uint64_t* const drawn = reinterpret_cast<uint64_t*>(shared);
  const int groups = kMany ? (task.n - 1 + kDeltas - 1) / kDeltas : 1,
            first_delta = kMany ? int(block_index()) % groups * kDeltas : 0;
  const int64_t chunk = int64_t(block_index()) / groups, begin = chunk * kChunk, left = task.numel - begin;
  const int numel = left < kChunk ? int(left) : int(kChunk), lane = int(thread_index());
  double sum[kKinds * kDeltas] = {};
  int passed[kDeltas] = {}, together[kDeltas] = {};
#pragma unroll 1
  for (int span = 0; span < numel; span += kSpan) {
    if (task.random) {
      sync_threads();
      draw_span(task, task.first + begin + span, drawn);
      sync_threads();
    }
#pragma unroll 1
    for (int i = lane; i < kSpan && span + i < numel; i += kLanes) {
      const int64_t at = begin + span + i;
      const T p = widen_any<T>(task.inputs.in[0], task.inputs.x[0], at);
      T d[kDeltas];
#pragma unroll
      for (int t = 0; t < kDeltas; ++t)
        d[t] = first_delta + t + 1 < task.n ? delta_of(task, first_delta + t + 1, at, p) : T(0);
      const uint64_t drawn_bits = task.random ? drawn[i] : ~uint64_t(0);
      uint64_t bits;
      if constexpr (kMany)
        bits = mask_bits<T, 0>(task, at, drawn_bits, [&](int t) { return delta_of(task, t + 1, at, p); });
      else
        bits = mask_bits<T, kDeltas>(task, at, drawn_bits, [&](int t) { return d[t]; });
      const bool several = (bits & (bits - 1)) != 0;
#pragma unroll
      for (int t = 0; t < kDeltas; ++t) {
        const double wide = double(d[t]), size = __builtin_fabs(wide);
        sum[t] += size;
        if (bits >> (first_delta + t) & 1) {
          sum[kDeltas + t] += size;
          sum[2 * kDeltas + t] = fma_once(wide, wide, sum[2 * kDeltas + t]);
          ++passed[t];
          together[t] += several;
        }
      }
    }
  }
  for (int t = 0; t < kDeltas; ++t) {
    sum[3 * kDeltas + t] = passed[t];
    sum[4 * kDeltas + t] = together[t];
  }
  fold_lanes<kKinds * kDeltas>(sum, shared);
  double* const sums = task.sums + chunk * kKinds * task.n;
  const int kind = lane / kDeltas, k = first_delta + lane % kDeltas + 1;
  const bool wanted = kind < 2 ? task.l1 : kind > 2 || task.squares;
  if (kind < kKinds && k < task.n) sums[kind * task.n + k] = wanted ? shared[lane * kLanes] : 0.0;
  if (lane < kKinds && first_delta == 0) sums[lane * task.n] = 0.0;
}

template <class T>
void launch(const MaskedStatsTask& task, cudaStream_t stream) {
  const uint32_t chunks = uint32_t((task.numel + kChunk - 1) / kChunk),
                 groups = uint32_t(task.n - 1 + kDeltas - 1) / kDeltas;
  if (groups > 1)
    FI_LAUNCH((masked_stats_kernel<T, true>), chunks * groups, kLanes, stream, task);
  else
    FI_LAUNCH((masked_stats_kernel<T, false>), chunks, kLanes, stream, task);
}

}  // namespace

void masked_stats(const MaskedStatsTask& task, cudaStream_t stream) {
  task.wide ? launch<double>(task, stream) : launch<float>(task, stream);
}

}  // namespace cuda
}  // namespace fi
