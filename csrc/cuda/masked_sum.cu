#include "masked_sum.h"
#include "sampled.h"
#include "scores.h"
#include "stores.h"
#include "values.h"

namespace fi {
namespace cuda {

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

Mode mode_of(const MaskedTask<float>& m) {
  return m.important ? kImportant : m.score.kind != Score::kNone ? kScored : kPlain;
}

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

// ---- an element at a time
// --------------------------------------------------------------------------------------------

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

// ---- a unit at a time
// ------------------------------------------------------------------------------------------------

// For at most kFew terms, in float32, of a piece that has units. Bit 8 * t + j of what is returned: whether element j
// of the thread's unit is drawn for term t.
FI_DEVICE uint32_t draw_unit(const MaskedTask<float>& m, int64_t group, uint64_t* shared) {
  if (!m.random) return 0xffffffffu;
  const uint32_t me = thread_index(), lane = me % kPhiloxLanes;
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(shared);
  sync_threads();  // nobody uses those of before
#pragma unroll 1
  for (int t = 0; t < m.n_terms; ++t) bytes[t * kThreads + int(me)] = uint8_t(drawn_by(m.terms[t].test, group, lane));
  sync_threads();
  // Element j of the unit is number `lane / 2` of the counter of lane 8 * (lane % 2) + j: a bit of each of 8 bytes.
  uint32_t bits = 0;
#pragma unroll
  for (int t = 0; t < kFew; ++t) {
    if (t >= m.n_terms) continue;
    const uint64_t each =
        shared[(t * kThreads + int(me / kPhiloxLanes * kPhiloxLanes + lane % 2 * 8)) / 8] >> (lane / 2) &
        0x0101010101010101u;
    bits |= uint32_t(each * 0x0102040810204080u >> 56) << (8 * t);
  }
  return bits;
}

// The elements of a unit that the piece has, if that is not all of it.
FI_RARE void some_of_unit(const MaskedTask<float>& m, int64_t from, uint32_t drawn, const uint32_t* words) {
#pragma unroll 1
  for (int j = 0; j < kUnit; ++j) {
    const int64_t at = from + j;
    if (at < 0 || at >= m.numel) continue;
    const auto is_drawn = [&](int t) { return (drawn >> (8 * t + j) & 1) != 0; };
    one_step(m, at, is_drawn, [&](float p, float step, bool nonfinite) {
      store_one(m, at, p, step, nonfinite, m.to.stochastic ? words[j] : 0u);
    });
  }
}

FI_RARE void count_unit(const MaskedTask<float>& m, int64_t from) {
#pragma unroll 1
  for (int j = 0; j < kUnit; ++j) count(m, from + j);
}

FI_DEVICE uint32_t bits_of(float x) { return bit_cast<uint32_t>(x) & 0x7fffffffu; }
FI_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// kSame: the dtype of all inputs and of the output, which is rounded to nearest; or kAnyDType.
template <int kSame, Mode kMode>
FI_KERNEL(kThreads, kMode == kImportant                                     ? 1
                    : kSame == int(DType::BF16) || kSame == int(DType::F16) ? 3
                                                                            : 2)
masked_unit_kernel(FI_ARGUMENT MaskedTask<float> m) {
  FI_SHARED uint64_t drawn_bytes[kFew * kThreads / 8];
  FI_SHARED uint32_t words[kSame == kAnyDType ? kSpan : 1];
  const int me = int(thread_index());
  uint32_t* const own_words = words + (kSame == kAnyDType ? me * kUnit : 0);
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t group = m.first / kMaskGroup + (int64_t(block_index()) * kPasses + pass) * kGroupsAtOnce;
    const int64_t from = group * kMaskGroup + me * kUnit - m.first;
    const bool whole = from >= 0 && from + kUnit <= m.numel;
    Raw<float, kSame> base, x[kFew], f[kMode == kImportant ? kFew : 1];
    load_unit(m.inputs.in[m.base], m.inputs.x[m.base], from, whole, &base);
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      const int i = m.terms[t].input, k = kMode == kImportant ? m.terms[t].importance : 0;
      load_unit(m.inputs.in[i], m.inputs.x[i], from, whole && t < m.n_terms, &x[t]);
      if constexpr (kMode == kImportant) load_unit(m.inputs.in[k], m.inputs.x[k], from, whole && t < m.n_terms, &f[t]);
    }
    const uint32_t drawn = kMode == kImportant ? 0 : draw_unit(m, group + me / kPhiloxLanes, drawn_bytes);
    if constexpr (kSame == kAnyDType)
      if (m.to.stochastic) draw_words(group * kMaskGroup, m.to.key, words);
    if (!whole) {
      if (from + kUnit > 0 && from < m.numel) some_of_unit(m, from, drawn, own_words);
      continue;
    }
    float p[kUnit], d[kFew][kUnit], factor[kFew][kUnit];
    uint32_t largest = 0;  // magnitude among the inputs
    widen_unit(m.inputs.in[m.base], base, p);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) largest = larger(largest, bits_of(p[j]));
#pragma unroll
    for (int t = 0; t < kFew; ++t) {
      if (t >= m.n_terms) continue;
      widen_unit(m.inputs.in[m.terms[t].input], x[t], d[t]);
      if constexpr (kMode == kImportant) widen_unit(m.inputs.in[m.terms[t].importance], f[t], factor[t]);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float v = m.terms[t].input == m.base ? 0.0f : d[t][j] - p[j];
        largest = larger(largest, bits_of(v));
        if constexpr (kMode == kImportant) largest = larger(largest, bits_of(factor[t][j]));
        d[t][j] = limited(m, v);
      }
    }
    float y[kUnit];
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      const auto delta = [&](int t) { return d[t][j]; };
      const auto factor_of = [&](int t) { return factor[t][j]; };
      const auto is_drawn = [&](int t) { return (drawn >> (8 * t + j) & 1) != 0; };
      if constexpr (kMode == kImportant)
        y[j] = p[j] + important_step<float, kFew>(m, delta, factor_of);
      else
        y[j] = p[j] + step_from<float, kFew>(m, kMode, from + j, delta, is_drawn);
    }
    bool nonfinite;
    if constexpr (kSame != kAnyDType) {
      nonfinite = store_unit_fast<DType(kSame)>(y, m.to.out, from);
    } else {
      nonfinite = store_unit(store_of(m.to, m.to.stochastic), y, own_words, m.to.out, from);
    }
    if (m.stats.counts && (nonfinite || largest >= 0x7f800000u)) count_unit(m, from);
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

// Whether all that is read and written has one dtype, and is rounded to nearest.
bool has_one_dtype(const MaskedTask<float>& task) {
  bool one = !task.to.stochastic;
  for (int i = 0; i < kMaxInputs; ++i)
    if (task.reads >> i & 1) one = one && task.inputs.in[i] == task.to.dtype;
  return one;
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
    const Mode mode = mode_of(task);
    const DType same = mode == kPlain && has_one_dtype(task) ? task.to.dtype : DType::F64;
    if (mode == kImportant)
      FI_LAUNCH((masked_unit_kernel<kAnyDType, kImportant>), blocks, kThreads, stream, task);
    else if (mode == kScored)
      FI_LAUNCH((masked_unit_kernel<kAnyDType, kScored>), blocks, kThreads, stream, task);
    else if (same == DType::BF16)
      FI_LAUNCH((masked_unit_kernel<int(DType::BF16), kPlain>), blocks, kThreads, stream, task);
    else if (same == DType::F16)
      FI_LAUNCH((masked_unit_kernel<int(DType::F16), kPlain>), blocks, kThreads, stream, task);
    else if (same == DType::F32)
      FI_LAUNCH((masked_unit_kernel<int(DType::F32), kPlain>), blocks, kThreads, stream, task);
    else
      FI_LAUNCH((masked_unit_kernel<kAnyDType, kPlain>), blocks, kThreads, stream, task);
  }
  launch_samples(task, stream);
}

}  // namespace cuda
}  // namespace fi
