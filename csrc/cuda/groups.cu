#include "groups.h"
#include "sampled.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kThreads = kSampleThreads, kGroupsAtOnce = kThreads / kPhiloxLanes;  // groups of kPhiloxGroup elements
constexpr int kEach = kPhiloxGroup / kPhiloxLanes;  // elements of a thread, of one counter
constexpr int kPasses = 4;

template <class T>
FI_DEVICE T number(const void* numbers, int64_t i) {
  return static_cast<const T*>(numbers)[i];
}

template <class T>
FI_DEVICE T value_of(const GroupTask& g, int i, int64_t at) {
  return widen_any<T>(g.inputs.in[i], g.inputs.x[i], at);
}

// Runs take(at, group, p, acc, y, w) for those of the thread's elements that the piece has; they are 16 * w further on
// than the first.
template <class T, class Take>
FI_DEVICE void each_sum(const GroupTask& g, int64_t philox_group, Take take) {
  const int64_t e = philox_group * kPhiloxGroup + thread_index() % kPhiloxLanes;
  int64_t row = e / g.columns, column = e % g.columns;
#pragma unroll 1
  for (int w = 0; w < kEach; ++w) {
    const int64_t at = e + w * kPhiloxLanes - g.first;
    if (at >= 0 && at < g.numel) {
      const int64_t group = g.per_row ? row - g.first_group : column;
      const T p = value_of<T>(g, g.pivot, at);
      T acc = 0;
#pragma unroll 2
      for (int t = 0; t < g.n_terms; ++t) {
        const T weight = number<T>(g.weights, t * g.groups + group);
        const T added = add_term(weight, value_of<T>(g, g.terms[t], at), p, acc);
        acc = weight != 0 ? added : acc;
      }
      take(at, group, p, acc, g.totals ? add_pivot(number<T>(g.totals, group), p, acc) : p + acc, w);
    }
    column += kPhiloxLanes;
    while (column >= g.columns) column -= g.columns, ++row;
  }
}

// An input that takes part reaches the output, so that only outputs that are NaN or infinite are looked into.
template <class T>
FI_RARE void count(const GroupTask& g, int64_t at, int64_t group) {
  int64_t* const counts = g.stats.counts;
  count_one(double(value_of<T>(g, g.pivot, at)), counts, counts + 1);
  for (int t = 0; t < g.n_terms; ++t)
    if (number<T>(g.weights, t * g.groups + group) != 0)
      count_one(double(value_of<T>(g, g.terms[t], at)), counts, counts + 1);
  count_one(widen_any<double>(g.to.dtype, g.to.out, at), counts + 2, counts + 3);
}

template <class T>
FI_KERNEL(kThreads, 3)
group_kernel(FI_ARGUMENT GroupTask g) {
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t group = g.first / kPhiloxGroup + (int64_t(block_index()) * kPasses + pass) * kGroupsAtOnce +
                          thread_index() / kPhiloxLanes;
    PhiloxWords<uint64_t> words{};
    if (g.to.stochastic) words = words_of(group, thread_index() % kPhiloxLanes, g.to.key);
    each_sum<T>(g, group, [&](int64_t at, int64_t of, T, T, T y, int w) {
      store_any(g.to.dtype, g.to.out, at, code_of(store_of(g.to, g.to.stochastic), y, uint32_t(words.w[w])));
      if (g.stats.counts && !is_finite(widen_any<double>(g.to.dtype, g.to.out, at))) count<T>(g, at, of);
    });
  }
}

// A block has one sampled chunk, whose output is there.
template <class T>
FI_KERNEL(kThreads, 3)
group_sample_kernel(FI_ARGUMENT GroupTask g) {
  const int64_t chunk = g.stats.first_chunk + block_index() * g.stats.every;
  const Store nearest = store_of(g.to, false);
  Sampling sampling;
#pragma unroll 1
  for (int pass = 0; pass < kChunk / kPhiloxGroup / kGroupsAtOnce; ++pass) {
    const int64_t group = chunk * (kChunk / kPhiloxGroup) + pass * kGroupsAtOnce + thread_index() / kPhiloxLanes;
    each_sum<T>(g, group, [&](int64_t at, int64_t, T p, T acc, T y, int) {
      const bool differs = load_any(g.to.dtype, g.to.out, at) != code_of(nearest, p, 0u);
      sampling.take(p, g.totals ? T(y - p) : acc, T(widen_any<double>(g.to.dtype, g.to.out, at)), differs);
    });
  }
  store_sample(g.stats, sampling);
}

}  // namespace

void group_sum(const GroupTask& task, cudaStream_t stream) {
  constexpr int64_t kTile = int64_t(kPasses) * kGroupsAtOnce * kPhiloxGroup;
  const uint32_t blocks = uint32_t((task.first % kPhiloxGroup + task.numel + kTile - 1) / kTile);
  const uint32_t chunks = uint32_t(task.stats.chunks);
  if (task.wide) {
    FI_LAUNCH(group_kernel<double>, blocks, kThreads, stream, task);
    if (chunks > 0) FI_LAUNCH(group_sample_kernel<double>, chunks, kThreads, stream, task);
  } else {
    FI_LAUNCH(group_kernel<float>, blocks, kThreads, stream, task);
    if (chunks > 0) FI_LAUNCH(group_sample_kernel<float>, chunks, kThreads, stream, task);
  }
}

}  // namespace cuda
}  // namespace fi
