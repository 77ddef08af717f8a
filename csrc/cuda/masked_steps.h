// What the kernels of masked sums share: the step of one element, and its counts.
#pragma once

#include "masked_sum.h"
#include "sampled.h"
#include "scores.h"
#include "stores.h"
#include "values.h"

namespace fi {
namespace cuda {

// Sums of at most kFew deltas, in float32, of a piece whose operands lie in units, in so many blocks.
void masked_units(const MaskedTask<float>& task, uint32_t blocks, cudaStream_t stream);

namespace {

constexpr int kThreads = kSampleThreads, kGroupsAtOnce = kThreads / kPhiloxLanes;  // groups of kMaskGroup elements
constexpr int kPasses = 2;                                                         // of a block
constexpr int kFew = 4;                                                            // deltas that stay in registers
static_assert(kThreads == kUnitThreads && kGroupsAtOnce * kMaskGroup == kSpan, "a thread has a unit of each pass");

template <class T>
FI_DEVICE T value_of(const MaskedTask<T>& m, int i, int64_t at) {
  return widen_any<T>(m.inputs.in[i], m.inputs.x[i], at);
}

// What is left of a difference v beyond the limit.
template <class T>
FI_DEVICE T limited(const MaskedTask<T>& m, T v) {
  const T most = m.limit, least = -most;
  if (!is_finite(most)) return v;
  const T w = v < least ? least : v;
  return w > most ? most : w;
}

// kMost here and below: terms, of which some may not exist; 0: any number. factor(t): the importance of term t.
template <class T, int kMost, class Delta, class Factor>
FI_DEVICE T important_step(const MaskedTask<T>& m, Delta delta, Factor factor) {
  T step = 0, share = 0;
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < (kMost ? kMost : m.n_terms); ++t) {
    if (t >= m.n_terms) continue;
    const MaskedTerm<T>& term = m.terms[t];
    const T g = fma_once(term.weight, factor(t), term.least_weight);
    step = fma_once(g, delta(t), step);
    share += g;
  }
  return share == 0 ? T(0) : step / share;
}

// The step of one element. passes(t, delta(t)): whether the element passes the mask test of term t, and the score's.
template <class T, int kMost, class Delta, class Passes>
FI_DEVICE T masked_step(const MaskedTask<T>& m, Delta delta, Passes passes) {
  const int terms = kMost ? kMost : m.n_terms;
  T sign_sum = 0;
  if (m.elects_signs) {
#pragma unroll(kMost ? kMost : 1)
    for (int t = 0; t < terms; ++t) {
      if (t >= m.n_terms || m.terms[t].sign_weight == 0) continue;
      const T d = delta(t);
      if (passes(t, d)) sign_sum = fma_once(m.terms[t].sign_weight, d, sign_sum);
    }
  }
  T step = 0, share = 0, sole_step = 0;
  int count = 0;
#pragma unroll(kMost ? kMost : 1)
  for (int t = 0; t < terms; ++t) {
    if (t >= m.n_terms) continue;
    const MaskedTerm<T>& term = m.terms[t];
    const T d = delta(t);
    bool counts = passes(t, d);
    if (m.elects_signs) {
      const bool minus = ((bit_cast<typename Compute<T>::U>(d) & Compute<T>::kSign) != 0) != (term.sign_weight < 0);
      counts = counts && term.sign_weight != 0 && (d != d || (d != 0 && minus == (sign_sum < 0)));
    }
    if (!counts) continue;
    step = fma_once(term.weight, d, step);
    if (m.divides) share += term.share;
    if (m.has_sole_weights) sole_step = fma_once(term.sole_weight, d, T(0));
    ++count;
  }
  if (m.divides) {
    const T size = share < 0 ? -share : share;
    step /= share == 0 || size < m.least_share ? m.other_share : share;
  }
  return m.has_sole_weights && count == 1 ? sole_step : step;
}

// What a step depends on beside deltas: nothing but masks, a score or importances.
enum Mode { kPlain, kScored, kImportant };

// The step of element `at` of the piece from its deltas. is_drawn(t): whether the mask test of term t draws it.
template <class T, int kMost, class Delta, class IsDrawn>
FI_DEVICE T step_from(const MaskedTask<T>& m, Mode mode, int64_t at, Delta delta, IsDrawn is_drawn) {
  bool high = true;
  if (mode == kScored)
    high = magnitude(score_of<T, kMost>(m.score, m.n_terms, m.first + at, delta)) >= m.score.min_bits;
  return masked_step<T, kMost>(
      m, delta, [&](int t, T d) { return high && is_drawn(t) && in_range(m.terms[t].test, magnitude(d)); });
}

// Counts NaN and infinities of the inputs themselves, because one that is masked out does not reach the output.
template <class T>
FI_RARE void count(const MaskedTask<T>& m, int64_t at) {
  for (int i = 0; i < kMaxInputs; ++i)
    if (m.reads >> i & 1)
      count_one(widen_any<double>(m.inputs.in[i], m.inputs.x[i], at), m.stats.counts, m.stats.counts + 1);
  count_one(widen_any<double>(m.to.dtype, m.to.out, at), m.stats.counts + 2, m.stats.counts + 3);
}

// One element. take(p, step, nonfinite): its base and its step, and whether an input is NaN or infinite.
template <class T, class IsDrawn, class Take>
FI_DEVICE void one_step(const MaskedTask<T>& m, int64_t at, IsDrawn is_drawn, Take take) {
  bool nonfinite = false;
  const T p = value_of<T>(m, m.base, at);
  const auto delta = [&](int t) {
    if (m.terms[t].input == m.base) return T(0);
    const T v = value_of<T>(m, m.terms[t].input, at) - p;
    nonfinite = nonfinite || !is_finite(v);
    return limited(m, v);
  };
  const auto factor = [&](int t) {
    const T f = value_of<T>(m, m.terms[t].importance, at);
    nonfinite = nonfinite || !is_finite(f);
    return f;
  };
  const T step = m.important ? important_step<T, 0>(m, delta, factor)
                             : step_from<T, 0>(m, m.score.kind != Score::kNone ? kScored : kPlain, at, delta, is_drawn);
  take(p, step, nonfinite || !is_finite(p));
}

template <class T>
FI_DEVICE void store_one(const MaskedTask<T>& m, int64_t at, T p, T step, bool nonfinite, uint32_t word) {
  store_any(m.to.dtype, m.to.out, at, code_of(store_of(m.to, m.to.stochastic), p + step, word));
  if (m.stats.counts && (nonfinite || !is_finite(widen_any<double>(m.to.dtype, m.to.out, at)))) count(m, at);
}

}  // namespace
}  // namespace cuda
}  // namespace fi
