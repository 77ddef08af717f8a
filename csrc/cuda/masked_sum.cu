#include "masked_steps.h"

namespace fi {
namespace cuda {

namespace {

// Runs take(at, p, step, w, h, nonfinite) for those of the thread's elements that the piece has: those of one counter.
template <class T, class Take>
FI_DEVICE void each_step(const MaskedTask<T>& m, int64_t group, uint8_t* shared, Take take) {
  const uint32_t lane = thread_index() % kPhiloxLanes;
  if (!m.important)
#pragma unroll 1
    for (int t = 0; t < m.n_terms; ++t)
      shared[t * kThreads + int(thread_index())] = uint8_t(drawn_by(m.terms[t].test, group, lane));
#pragma unroll 1
  for (int i = 0; i < kCounterElements; ++i) {
    const int64_t at = group * kMaskGroup + i * kPhiloxLanes + lane - m.first;
    if (at < 0 || at >= m.numel) continue;
    const auto is_drawn = [&](int t) { return (shared[t * kThreads + int(thread_index())] >> i & 1) != 0; };
    one_step(m, at, is_drawn, [&](T p, T step, bool nonfinite) { take(at, p, step, i, nonfinite); });
  }
}

// Any number of terms, any dtypes, any addresses.
template <class T>
FI_KERNEL(kThreads, 3)
masked_any_kernel(FI_ARGUMENT MaskedTask<T> m) {
  FI_SHARED uint8_t shared[kMaxInputs * kThreads];
  const uint32_t lane = thread_index() % kPhiloxLanes;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t group = m.first / kMaskGroup + (int64_t(block_index()) * kPasses + pass) * kGroupsAtOnce +
                          thread_index() / kPhiloxLanes;
    PhiloxWords<uint64_t> words{};
    int drawn_for = -1;
    each_step(m, group, shared, [&](int64_t at, T p, T step, int i, bool nonfinite) {
      if (m.to.stochastic && drawn_for != i / 4) words = words_of(2 * group + i / 4, lane, m.to.key);
      drawn_for = i / 4;
      const uint64_t word = i % 4 == 0 ? words.w[0] : i % 4 == 1 ? words.w[1] : i % 4 == 2 ? words.w[2] : words.w[3];
      store_one(m, at, p, step, nonfinite, uint32_t(word));
    });
  }
}

// A block has one sampled chunk, whose output is there.
template <class T>
FI_KERNEL(kThreads, 2)
sample_kernel(FI_ARGUMENT MaskedTask<T> m) {
  FI_SHARED uint8_t shared[kMaxInputs * kThreads];
  const int64_t chunk = m.stats.first_chunk + block_index() * m.stats.every;
  const Store nearest = store_of(m.to, false);
  Sampling sampling;
#pragma unroll 1
  for (int pass = 0; pass < kChunk / kMaskGroup / kGroupsAtOnce; ++pass) {
    const int64_t group = chunk * (kChunk / kMaskGroup) + pass * kGroupsAtOnce + thread_index() / kPhiloxLanes;
    each_step(m, group, shared, [&](int64_t at, T p, T step, int, bool) {
      const bool differs = load_any(m.to.dtype, m.to.out, at) != code_of(nearest, p, 0u);
      sampling.take(p, step, T(widen_any<double>(m.to.dtype, m.to.out, at)), differs);
    });
  }
  store_sample(m.stats, sampling);
}

MaskedTask<float> in_float(const MaskedTask<double>& m) {
  MaskedTask<float> to{m.inputs,
                       m.base,
                       m.n_terms,
                       m.elects_signs,
                       m.divides,
                       m.has_sole_weights,
                       m.important,
                       m.random,
                       float(m.least_share),
                       float(m.other_share),
                       float(m.limit),
                       m.score,
                       m.reads,
                       m.to,
                       m.numel,
                       m.first,
                       m.stats,
                       {}};
  for (int t = 0; t < m.n_terms; ++t) {
    const MaskedTerm<double>& from = m.terms[t];
    to.terms[t] = {from.input,
                   from.importance,
                   float(from.weight),
                   float(from.least_weight),
                   float(from.sign_weight),
                   float(from.share),
                   float(from.sole_weight),
                   from.test};
  }
  return to;
}

bool lies_in_units(const MaskedTask<float>& task) {
  bool all = has_units(task.to.out, task.to.dtype, task.first);
  for (int i = 0; i < kMaxInputs; ++i)
    if (task.reads >> i & 1) all = all && has_units(task.inputs.x[i], task.inputs.in[i], task.first);
  return all;
}

template <class T>
void launch_samples(const MaskedTask<T>& task, cudaStream_t stream) {
  const uint32_t chunks = uint32_t(task.stats.chunks);
  if (chunks > 0) FI_LAUNCH(sample_kernel<T>, chunks, kThreads, stream, task);
}

}  // namespace

void masked_sum(const MaskedSumTask& given, cudaStream_t stream) {
  constexpr int64_t kTile = int64_t(kPasses) * kGroupsAtOnce * kMaskGroup;
  const uint32_t blocks = uint32_t((given.first % kMaskGroup + given.numel + kTile - 1) / kTile);
  if (given.wide) {
    const MaskedTask<double>& task = given;
    FI_LAUNCH(masked_any_kernel<double>, blocks, kThreads, stream, task);
    return launch_samples(task, stream);
  }
  const MaskedTask<float> task = in_float(given);
  if (task.n_terms > kFew || !lies_in_units(task)) {
    FI_LAUNCH(masked_any_kernel<float>, blocks, kThreads, stream, task);
  } else {
    masked_units(task, blocks, stream);
  }
  launch_samples(task, stream);
}

}  // namespace cuda
}  // namespace fi
