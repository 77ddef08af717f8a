#include "masked_sum.h"
#include "sampled.h"
#include "scores.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kThreads = kSampleThreads, kGroupsAtOnce = kThreads / kPhiloxLanes;  // groups of kMaskGroup elements
constexpr int kPasses = 2;                                                         // of a block
constexpr int kFew = 4;                                                            // deltas that stay in registers
constexpr int kAnyDType = -1;

// kSame: the dtype of all inputs and of the output, which is rounded to nearest; or kAnyDType.
template <class T, int kSame>
FI_DEVICE T value_of(const MaskedSumTask& m, int i, int64_t at) {
  if constexpr (kSame != kAnyDType)
    return widen_at<T, DType(kSame)>(m.inputs.x[i], at);
  else
    return widen_any<T>(m.inputs.in[i], m.inputs.x[i], at);
}

// The delta of a term from p; sets *nonfinite if it is NaN or infinite.
template <class T, int kSame>
FI_DEVICE T delta_of(const MaskedSumTask& m, int t, int64_t at, T p, bool* nonfinite) {
  if (m.terms[t].input == m.base) return 0;
  const T v = value_of<T, kSame>(m, m.terms[t].input, at) - p, most = T(m.limit), least = -most;
  *nonfinite = *nonfinite || !is_finite(v);
  if (!is_finite(most)) return v;
  const T w = v < least ? least : v;
  return w > most ? most : w;
}

// kMost here and below: terms, of which some may not exist; 0: any number.
template <class T, int kSame, int kMost, class Delta>
FI_DEVICE T important_step(const MaskedSumTask& m, int64_t at, Delta delta, bool* nonfinite) {
  T step = 0, share = 0;
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < (kMost ? kMost : m.n_terms); ++t) {
    if (t >= m.n_terms) continue;
    const MaskedSumTaskTerm& term = m.terms[t];
    const T factor = value_of<T, kSame>(m, term.importance, at);
    *nonfinite = *nonfinite || !is_finite(factor);
    const T g = fma_once(T(term.weight), factor, T(term.weight * 1e-6));
    step = fma_once(g, delta(t), step);
    share += g;
  }
  return share == 0 ? T(0) : step / share;
}

// The step of one element. passes(t, delta(t)): whether the element passes the mask test of term t, and the score's.
template <class T, int kMost, class Delta, class Passes>
FI_DEVICE T masked_step(const MaskedSumTask& m, Delta delta, Passes passes) {
  const int terms = kMost ? kMost : m.n_terms;
  T sign_sum = 0;
  if (m.elects_signs) {
#pragma unroll(kMost ? kMost : 1)
    for (int t = 0; t < terms; ++t) {
      if (t >= m.n_terms || m.terms[t].sign_weight == 0) continue;
      const T d = delta(t);
      if (passes(t, d)) sign_sum = fma_once(T(m.terms[t].sign_weight), d, sign_sum);
    }
  }
  T step = 0, share = 0, sole_step = 0;
  int count = 0;
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < terms; ++t) {
    if (t >= m.n_terms) continue;
    const MaskedSumTaskTerm& term = m.terms[t];
    const T d = delta(t);
    if (!passes(t, d)) continue;
    if (m.elects_signs) {
      const bool minus = ((bit_cast<typename Compute<T>::U>(d) & Compute<T>::kSign) != 0) != (term.sign_weight < 0);
      if (term.sign_weight == 0 || (d == d && (d == 0 || minus != (sign_sum < 0)))) continue;
    }
    step = fma_once(T(term.weight), d, step);
    if (m.divides) share += T(term.share);
    if (m.has_sole_weights) sole_step = fma_once(T(term.sole_weight), d, T(0));
    ++count;
  }
  if (m.divides) {
    const T size = share < 0 ? -share : share;
    step /= share == 0 || size < T(m.least_share) ? T(m.other_share) : share;
  }
  return m.has_sole_weights && count == 1 ? sole_step : step;
}

// The random masks of one thread's elements: of a few terms, 8 bits each, in `bits`; of many, in the thread's column of
// `shared`.
template <int kMost>
struct Drawn {
  uint32_t bits;
  const uint8_t* shared;
};

template <int kMost>
FI_DEVICE Drawn<kMost> draw(const MaskedSumTask& m, int64_t group, uint32_t lane, uint8_t* shared) {
  Drawn<kMost> drawn{0, shared + thread_index()};
  if (m.important) return drawn;
  if constexpr (kMost) {
#pragma unroll 1
    for (int t = 0; t < m.n_terms; ++t) drawn.bits |= drawn_by(m.terms[t].test, group, lane) << (8 * t);
  } else {
#pragma unroll 1
    for (int t = 0; t < m.n_terms; ++t)
      shared[t * kThreads + int(thread_index())] = uint8_t(drawn_by(m.terms[t].test, group, lane));
  }
  return drawn;
}

// The step of element `at` of the piece from its deltas; `bit` is its bit in `drawn`.
template <class T, int kSame, int kMost, class Delta>
FI_DEVICE T step_from(const MaskedSumTask& m, int64_t at, int bit, const Drawn<kMost>& drawn, Delta delta,
                      bool* nonfinite) {
  if (m.important) return important_step<T, kSame, kMost>(m, at, delta, nonfinite);
  bool high = true;
  if (m.score.kind != Score::kNone)
    high = magnitude(score_of<T, kMost>(m.score, m.n_terms, m.first + at, delta)) >= m.score.min_bits;
  const auto passes = [&](int t, T d) {
    const uint32_t bits = kMost ? drawn.bits >> (8 * t) : uint32_t(drawn.shared[t * kThreads]);
    return high && (bits >> bit & 1) != 0 && in_range(m.terms[t].test, magnitude(d));
  };
  return masked_step<T, kMost>(m, delta, passes);
}

// Runs take(at, p, step, h, w, nonfinite) for those of the thread's elements that the piece has.
template <class T, int kSame, int kMost, class Take>
FI_DEVICE void each_step(const MaskedSumTask& m, int64_t group, uint8_t* shared, Take take) {
  const uint32_t lane = thread_index() % kPhiloxLanes;
  const Drawn<kMost> drawn = draw<kMost>(m, group, lane, shared);
#pragma unroll 1
  for (int h = 0; h < 2; ++h) {
    const int64_t from = group * kMaskGroup + h * kPhiloxGroup + lane - m.first;
    if constexpr (kMost) {
      // All loads first: they are in flight together.
      T p[4], d[4][kMost];
      bool nonfinite[4] = {};
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t at = from + w * kPhiloxLanes;
        const bool here = at >= 0 && at < m.numel;
        p[w] = here ? value_of<T, kSame>(m, m.base, at) : T(0);
#pragma unroll
        for (int t = 0; t < kMost; ++t)
          d[w][t] = here && t < m.n_terms ? delta_of<T, kSame>(m, t, at, p[w], &nonfinite[w]) : T(0);
      }
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t at = from + w * kPhiloxLanes;
        if (at < 0 || at >= m.numel) continue;
        const auto delta = [&](int t) { return d[w][t]; };
        const T step = step_from<T, kSame>(m, at, 4 * h + w, drawn, delta, &nonfinite[w]);
        take(at, p[w], step, h, w, nonfinite[w]);
      }
    } else {
#pragma unroll 1
      for (int w = 0; w < 4; ++w) {
        const int64_t at = from + w * kPhiloxLanes;
        if (at < 0 || at >= m.numel) continue;
        bool nonfinite = false;
        const T p = value_of<T, kSame>(m, m.base, at);
        const auto delta = [&](int t) { return delta_of<T, kSame>(m, t, at, p, &nonfinite); };
        const T step = step_from<T, kSame>(m, at, 4 * h + w, drawn, delta, &nonfinite);
        take(at, p, step, h, w, nonfinite);
      }
    }
  }
}

// Counts NaN and infinities of the inputs themselves, because one that is masked out does not reach the output.
FI_RARE void count(const MaskedSumTask& m, int64_t at) {
  for (int i = 0; i < kMaxInputs; ++i)
    if (m.reads >> i & 1)
      count_one(widen_any<double>(m.inputs.in[i], m.inputs.x[i], at), m.stats.counts, m.stats.counts + 1);
  count_one(widen_any<double>(m.to.dtype, m.to.out, at), m.stats.counts + 2, m.stats.counts + 3);
}

template <class T, int kSame, int kMost>
FI_KERNEL(kThreads, 2)
masked_sum_kernel(FI_ARGUMENT MaskedSumTask m) {
  FI_SHARED uint8_t shared[kMost ? 1 : kMaxInputs * kThreads];
  const uint32_t lane = thread_index() % kPhiloxLanes;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t group = m.first / kMaskGroup + (int64_t(block_index()) * kPasses + pass) * kGroupsAtOnce +
                          thread_index() / kPhiloxLanes;
    PhiloxWords<uint64_t> words{};
    int drawn_for = -1;
    each_step<T, kSame, kMost>(m, group, shared, [&](int64_t at, T p, T step, int h, int w, bool nonfinite) {
      const T y = p + step;
      if constexpr (kSame != kAnyDType) {
        constexpr DType kDType = DType(kSame);
        using Bits = typename Format<kDType>::Bits;
        store_bits(static_cast<Bits*>(m.to.out) + at, narrow<kDType, Fp8Saturate, false>(y, 0u));
        nonfinite = nonfinite || !is_finite(widen_at<T, kDType>(m.to.out, at));
      } else {
        if (m.to.stochastic && drawn_for != h) words = words_of(2 * group + h, lane, m.to.key);
        drawn_for = h;
        store_any(m.to.dtype, m.to.out, at, code_of(store_of(m.to, m.to.stochastic), y, uint32_t(words.w[w])));
        nonfinite = nonfinite || !is_finite(widen_any<double>(m.to.dtype, m.to.out, at));
      }
      if (m.stats.counts && (nonfinite || !is_finite(p))) count(m, at);
    });
  }
}

// A block has one sampled chunk, whose output is there.
template <class T>
FI_KERNEL(kThreads, 2)
sample_kernel(FI_ARGUMENT MaskedSumTask m) {
  FI_SHARED uint8_t shared[kMaxInputs * kThreads];
  const int64_t chunk = m.stats.first_chunk + block_index() * m.stats.every;
  const Store nearest = store_of(m.to, false);
  Sampling sampling;
#pragma unroll 1
  for (int pass = 0; pass < kChunk / kMaskGroup / kGroupsAtOnce; ++pass) {
    const int64_t group = chunk * (kChunk / kMaskGroup) + pass * kGroupsAtOnce + thread_index() / kPhiloxLanes;
    each_step<T, kAnyDType, 0>(m, group, shared, [&](int64_t at, T p, T step, int, int, bool) {
      const bool differs = load_any(m.to.dtype, m.to.out, at) != code_of(nearest, p, 0u);
      sampling.take(p, step, T(widen_any<double>(m.to.dtype, m.to.out, at)), differs);
    });
  }
  store_sample(m.stats, sampling);
}

template <class T, int kSame>
void launch(const MaskedSumTask& task, uint32_t blocks, cudaStream_t stream) {
  if (task.n_terms <= kFew)
    FI_LAUNCH((masked_sum_kernel<T, kSame, kFew>), blocks, kThreads, stream, task);
  else
    FI_LAUNCH((masked_sum_kernel<T, kAnyDType, 0>), blocks, kThreads, stream, task);
}

// Whether all that is read and written has one dtype, and is rounded to nearest.
bool has_one_dtype(const MaskedSumTask& task) {
  bool one = !task.to.stochastic;
  for (int i = 0; i < kMaxInputs; ++i)
    if (task.reads >> i & 1) one = one && task.inputs.in[i] == task.to.dtype;
  return one;
}

}  // namespace

void masked_sum(const MaskedSumTask& task, cudaStream_t stream) {
  constexpr int64_t kTile = int64_t(kPasses) * kGroupsAtOnce * kMaskGroup;
  const uint32_t blocks = uint32_t((task.first % kMaskGroup + task.numel + kTile - 1) / kTile);
  const DType same = has_one_dtype(task) ? task.to.dtype : DType::F64;
  if (task.wide)
    launch<double, kAnyDType>(task, blocks, stream);
  else if (same == DType::BF16)
    launch<float, int(DType::BF16)>(task, blocks, stream);
  else if (same == DType::F16)
    launch<float, int(DType::F16)>(task, blocks, stream);
  else if (same == DType::F32)
    launch<float, int(DType::F32)>(task, blocks, stream);
  else
    launch<float, kAnyDType>(task, blocks, stream);
  const uint32_t chunks = uint32_t(task.stats.chunks);
  if (chunks > 0 && task.wide)
    FI_LAUNCH(sample_kernel<double>, chunks, kThreads, stream, task);
  else if (chunks > 0)
    FI_LAUNCH(sample_kernel<float>, chunks, kThreads, stream, task);
}

}  // namespace cuda
}  // namespace fi
