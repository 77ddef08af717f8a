#include "groups.h"
#include "sampled.h"
#include "stores.h"
#include "values.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kThreads = kSampleThreads, kGroupsAtOnce = kThreads / kPhiloxLanes;  // groups of kPhiloxGroup elements
constexpr int kEach = kPhiloxGroup / kPhiloxLanes;  // elements of a thread, of one counter
constexpr int kPasses = 4, kUnitPasses = 2;

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

// ---- a unit at a time
// ------------------------------------------------------------------------------------------------

constexpr int kTogether = 4;  // terms whose units are loaded together

FI_RARE void count_unit(const GroupTask& g, int64_t from, int64_t group) {
#pragma unroll 1
  for (int j = 0; j < kUnit; ++j) count<float>(g, from + j, g.per_row ? group : group + j);
}

// Numbers of the groups of a unit's elements: of one row, or of columns that lie behind each other.
FI_DEVICE void unit_numbers(const GroupTask& g, const void* numbers, int64_t i, float* to) {
  const float* const at = static_cast<const float*>(numbers) + i;
  if (g.per_row) {
    const float all = *at;
    for (int j = 0; j < kUnit; ++j) to[j] = all;
  } else {
    for (int v = 0; v < 2; ++v) {
      const Vector16 some = load_often(at + 4 * v);
      for (int j = 0; j < 4; ++j) to[4 * v + j] = bit_cast<float>(some.w[j]);
    }
  }
}

// In float32, of a piece that has whole units alone, each in one row. kSame: the dtype of all inputs and of the output,
// which is rounded to nearest; or kAnyDType.
template <int kSame>
FI_KERNEL(kThreads, kSame == int(DType::BF16) || kSame == int(DType::F16) ? 3 : 2)
group_unit_kernel(FI_ARGUMENT GroupTask g) {
  FI_SHARED uint32_t words[kSame == kAnyDType ? kSpan : 1];
  const int me = int(thread_index());
  uint32_t* const own_words = words + (kSame == kAnyDType ? me * kUnit : 0);
#pragma unroll 1
  for (int pass = 0; pass < kUnitPasses; ++pass) {
    const int64_t span = g.first / kPhiloxGroup * kPhiloxGroup + (int64_t(block_index()) * kUnitPasses + pass) * kSpan;
    const int64_t e = span + me * kUnit, from = e - g.first;
    const bool whole = from >= 0 && from < g.numel;
    Raw<float, kSame> pivot, x[kTogether];
    load_unit(g.inputs.in[g.pivot], g.inputs.x[g.pivot], from, whole, &pivot);
    const auto load = [&](int first) {
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const int i = g.terms[first + t < g.n_terms ? first + t : 0];
        load_unit(g.inputs.in[i], g.inputs.x[i], from, whole && first + t < g.n_terms, &x[t]);
      }
    };
    load(0);
    if constexpr (kSame == kAnyDType)
      if (g.to.stochastic) draw_words(span, g.to.key, words);
    if (!whole) continue;
    const int64_t row = quotient(e, g.columns), group = g.per_row ? row - g.first_group : e - row * g.columns;
    float p[kUnit], acc[kUnit] = {}, y[kUnit], weights[kUnit], v[kUnit];
    widen_unit(g.inputs.in[g.pivot], pivot, p);
#pragma unroll 1
    for (int first = 0; first < g.n_terms; first += kTogether) {
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        if (first + t >= g.n_terms) continue;
        unit_numbers(g, g.weights, (first + t) * g.groups + group, weights);
        widen_unit(g.inputs.in[g.terms[first + t]], x[t], v);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const float added = add_term(weights[j], v[j], p[j], acc[j]);
          acc[j] = weights[j] != 0 ? added : acc[j];
        }
      }
      load(first + kTogether);
    }
    if (g.totals) unit_numbers(g, g.totals, group, weights);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) y[j] = g.totals ? add_pivot(weights[j], p[j], acc[j]) : p[j] + acc[j];
    bool nonfinite;
    if constexpr (kSame != kAnyDType)
      nonfinite = store_unit_fast<DType(kSame)>(y, g.to.out, from);
    else
      nonfinite = store_unit(store_of(g.to, g.to.stochastic), y, own_words, g.to.out, from);
    if (g.stats.counts && nonfinite) count_unit(g, from, group);
  }
}

// ---- samples
// ---------------------------------------------------------------------------------------------------------

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

bool lies_in_units(const GroupTask& g) {
  bool all =
      g.columns % kUnit == 0 && g.numel % kUnit == 0 && g.first % kUnit == 0 && has_units(g.to.out, g.to.dtype, 0);
  all = all && (g.per_row || (g.groups % 4 == 0 && uintptr_t(g.weights) % 16 == 0 && uintptr_t(g.totals) % 16 == 0));
  all = all && has_units(g.inputs.x[g.pivot], g.inputs.in[g.pivot], 0);
  for (int t = 0; t < g.n_terms; ++t) all = all && has_units(g.inputs.x[g.terms[t]], g.inputs.in[g.terms[t]], 0);
  return all;
}

void launch_units(const GroupTask& g, cudaStream_t stream) {
  constexpr int64_t kTile = kUnitPasses * kSpan;
  const uint32_t blocks = uint32_t((g.first % kPhiloxGroup + g.numel + kTile - 1) / kTile);
  bool same = !g.to.stochastic && g.inputs.in[g.pivot] == g.to.dtype;
  for (int t = 0; t < g.n_terms; ++t) same = same && g.inputs.in[g.terms[t]] == g.to.dtype;
  if (same && g.to.dtype == DType::BF16)
    FI_LAUNCH(group_unit_kernel<int(DType::BF16)>, blocks, kThreads, stream, g);
  else if (same && g.to.dtype == DType::F16)
    FI_LAUNCH(group_unit_kernel<int(DType::F16)>, blocks, kThreads, stream, g);
  else if (same && g.to.dtype == DType::F32)
    FI_LAUNCH(group_unit_kernel<int(DType::F32)>, blocks, kThreads, stream, g);
  else
    FI_LAUNCH(group_unit_kernel<kAnyDType>, blocks, kThreads, stream, g);
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
    if (lies_in_units(task))
      launch_units(task, stream);
    else
      FI_LAUNCH(group_kernel<float>, blocks, kThreads, stream, task);
    if (chunks > 0) FI_LAUNCH(group_sample_kernel<float>, chunks, kThreads, stream, task);
  }
}

}  // namespace cuda
}  // namespace fi
