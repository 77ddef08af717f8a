#include <type_traits>

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

// Bit k - 1 of drawn[i]: whether element i from e on is drawn by the test of input k. e is a multiple of kSpan. Bits
// has one for each delta: bytes of at most 8.
template <class Bits>
FI_DEVICE void draw_span(const MaskedStatsTask& task, int64_t e, Bits* drawn) {
  using Register = std::conditional_t<(sizeof(Bits) > 4), uint64_t, uint32_t>;
  const uint32_t lane = thread_index() % kPhiloxLanes, group = thread_index() / kPhiloxLanes;
  Register bits[kCounterElements] = {};
#pragma unroll 1
  for (int k = 1; k < task.n; ++k) {
    const uint32_t some = drawn_by(task.tests[k], e / kMaskGroup + group, lane);
#pragma unroll
    for (int j = 0; j < kCounterElements; ++j) bits[j] |= Register(some >> j & 1) << (k - 1);
  }
  for (int j = 0; j < kCounterElements; ++j)
    drawn[group * kMaskGroup + uint32_t(j) * kPhiloxLanes + lane] = Bits(bits[j]);
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

// The sums of a thread: of magnitudes, of those that pass and of their squares; and counts.
struct Sums {
  double sum[kKinds * kDeltas] = {};
  int passed[kDeltas] = {}, together[kDeltas] = {};

  // Adds an element with deltas d, that passes where `bits` says; bit `first` is that of d[0].
  template <class T>
  FI_HD void add(const T* d, uint64_t bits, int first) {
    const bool several = (bits & (bits - 1)) != 0;
    for (int t = 0; t < kDeltas; ++t) {
      const double wide = double(d[t]), size = __builtin_fabs(wide);
      sum[t] += size;
      if (bits >> (first + t) & 1) {
        sum[kDeltas + t] += size;
        sum[2 * kDeltas + t] = fma_once(wide, wide, sum[2 * kDeltas + t]);
        ++passed[t];
        together[t] += several;
      }
    }
  }
};

// Folds the sums of a block's threads and stores them: those of deltas `first_delta` and on of a chunk.
FI_DEVICE void store_sums(const MaskedStatsTask& task, int64_t chunk, int first_delta, Sums* own, double* shared) {
  const int lane = int(thread_index());
  for (int t = 0; t < kDeltas; ++t) {
    own->sum[3 * kDeltas + t] = own->passed[t];
    own->sum[4 * kDeltas + t] = own->together[t];
  }
  fold_lanes<kKinds * kDeltas>(own->sum, shared);
  double* const sums = task.sums + chunk * kKinds * task.n;
  const int kind = lane / kDeltas, k = first_delta + lane % kDeltas + 1;
  const bool wanted = kind < 2 ? task.l1 : kind > 2 || task.squares;
  if (kind < kKinds && k < task.n) sums[kind * task.n + k] = wanted ? shared[lane * kLanes] : 0.0;
  if (lane < kKinds && first_delta == 0) sums[lane * task.n] = 0.0;
}

// A block has one chunk and kDeltas deltas. kMany: there are more of them.
template <class T, bool kMany>
FI_DEVICE void each_element(const MaskedStatsTask& task, int64_t begin, int numel, int first_delta, double* shared,
                            Sums* own) {
  uint64_t* const drawn = reinterpret_cast<uint64_t*>(shared);
  const int lane = int(thread_index());
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
      own->add(d, bits, first_delta);
    }
  }
}

template <class T, bool kMany>
FI_KERNEL(kLanes, kMany ? 2 : 3)
masked_stats_kernel(FI_ARGUMENT MaskedStatsTask task) {
  FI_SHARED double shared[kShared];
  const int groups = kMany ? (task.n - 1 + kDeltas - 1) / kDeltas : 1,
            first_delta = kMany ? int(block_index()) % groups * kDeltas : 0;
  const int64_t chunk = int64_t(block_index()) / groups, begin = chunk * kChunk, left = task.numel - begin;
  Sums own;
  each_element<T, kMany>(task, begin, left < kChunk ? int(left) : int(kChunk), first_delta, shared, &own);
  store_sums(task, chunk, first_delta, &own, shared);
}

// ---- a unit at a time
// ------------------------------------------------------------------------------------------------

constexpr int kStaged = kDeltas * kSpan;  // numbers of a span
static_assert(kStaged * sizeof(float) + kSpan <= kShared * sizeof(double),
              "deltas and random bits fit beside each other");

// Of at most kDeltas deltas, in float32, of whole units; the inputs have dtype kSame, if that is not kAnyDType. The
// units of the next span are loaded while the deltas of this one are summed, each by the thread whose lane it is.
template <int kSame>
FI_KERNEL(kLanes, 2)
masked_stats_unit_kernel(FI_ARGUMENT MaskedStatsTask task) {
  FI_SHARED double shared[kShared];
  float* const staged = reinterpret_cast<float*>(shared);
  uint8_t* const drawn = reinterpret_cast<uint8_t*>(staged + kStaged);
  const int64_t chunk = block_index(), begin = chunk * kChunk, left = task.numel - begin;
  const int numel = left < kChunk ? int(left) : int(kChunk), me = int(thread_index());
  Sums own;
  Raw<float, kSame> base, x[kDeltas];
  const auto load = [&](int span) {
    const int64_t at = begin + span + me * kUnit;
    const bool there = span + me * kUnit < numel;
    load_unit(task.inputs.in[0], task.inputs.x[0], at, there, &base);
#pragma unroll
    for (int t = 0; t < kDeltas; ++t)
      load_unit(task.inputs.in[t + 1], task.inputs.x[t + 1], at, there && t + 1 < task.n, &x[t]);
  };
  load(0);
#pragma unroll 1
  for (int span = 0; span < numel; span += kSpan) {
    sync_threads();  // what was staged before has been used
    if (task.random) draw_span(task, task.first + begin + span, drawn);
    float p[kUnit], d[kUnit];
    widen_unit(task.inputs.in[0], base, p);
#pragma unroll
    for (int t = 0; t < kDeltas; ++t) {
      widen_unit(task.inputs.in[t + 1], x[t], d);
      for (int j = 0; j < kUnit; ++j) staged[t * kSpan + me * kUnit + j] = t + 1 < task.n ? d[j] - p[j] : 0.0f;
    }
    sync_threads();
    load(span + kSpan);
#pragma unroll 1
    for (int i = me; i < kSpan && span + i < numel; i += kLanes) {
      float each[kDeltas];
      for (int t = 0; t < kDeltas; ++t) each[t] = staged[t * kSpan + i];
      const uint64_t of_random = task.random ? drawn[i] : ~uint64_t(0);
      own.add(each, mask_bits<float, kDeltas>(task, begin + span + i, of_random, [&](int t) { return each[t]; }), 0);
    }
  }
  store_sums(task, chunk, 0, &own, shared);
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

bool lies_in_units(const MaskedStatsTask& task) {
  bool all = true;
  for (int i = 0; i < task.n; ++i) all = all && has_units(task.inputs.x[i], task.inputs.in[i], 0);
  return all;
}

// The elements of a task from `first` on, a multiple of kChunk.
MaskedStatsTask from(MaskedStatsTask task, int64_t first) {
  for (int i = 0; i < task.n; ++i)
    task.inputs.x[i] = static_cast<const char*>(task.inputs.x[i]) + first * size_of(task.inputs.in[i]);
  task.first += first;
  task.numel -= first;
  task.sums += first / kChunk * kKinds * task.n;
  return task;
}

// Whole units; the last chunk, if it has others.
void launch_units(const MaskedStatsTask& given, cudaStream_t stream) {
  MaskedStatsTask task = given;
  if (given.numel % kUnit != 0) {
    task.numel = given.numel / kChunk * kChunk;
    launch<float>(from(given, task.numel), stream);
    if (task.numel == 0) return;
  }
  const uint32_t chunks = uint32_t((task.numel + kChunk - 1) / kChunk);
  bool same = true;
  for (int i = 1; i < task.n; ++i) same = same && task.inputs.in[i] == task.inputs.in[0];
  if (same && task.inputs.in[0] == DType::BF16)
    FI_LAUNCH(masked_stats_unit_kernel<int(DType::BF16)>, chunks, kLanes, stream, task);
  else if (same && task.inputs.in[0] == DType::F16)
    FI_LAUNCH(masked_stats_unit_kernel<int(DType::F16)>, chunks, kLanes, stream, task);
  else if (same && task.inputs.in[0] == DType::F32)
    FI_LAUNCH(masked_stats_unit_kernel<int(DType::F32)>, chunks, kLanes, stream, task);
  else
    FI_LAUNCH(masked_stats_unit_kernel<kAnyDType>, chunks, kLanes, stream, task);
}

}  // namespace

void masked_stats(const MaskedStatsTask& task, cudaStream_t stream) {
  if (task.wide)
    launch<double>(task, stream);
  else if (task.n - 1 <= kDeltas && lies_in_units(task))
    launch_units(task, stream);
  else
    launch<float>(task, stream);
}

}  // namespace cuda
}  // namespace fi
