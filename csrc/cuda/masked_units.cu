// Masked sums of few deltas: a unit of eight elements at a time.

#include "masked_steps.h"

namespace fi {
namespace cuda {

namespace {

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
FI_KERNEL(kThreads, kMode == kImportant ? 1 : 2)
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

// The step of an element whose inputs are finite, of bf16 alone and N terms: no test of a term is left that is the same
// for all elements, and no branch for each. drawn: bit 8 * t is that of term t. See is_few.
template <int N, bool kElects>
FI_DEVICE float few_step(const MaskedTask<float>& m, const float (&d)[N], uint32_t drawn) {
  bool passes[N];
#pragma unroll
  for (int t = 0; t < N; ++t) passes[t] = ((drawn & (1u << (8 * t))) != 0) & in_range(m.terms[t].test, bits_of(d[t]));
  if constexpr (kElects) {
    float sign_sum = 0;
#pragma unroll
    for (int t = 0; t < N; ++t)
      if (passes[t]) sign_sum = fma_once(m.terms[t].sign_weight, d[t], sign_sum);
    const uint32_t elected = sign_sum < 0 ? 0x80000000u : 0u;
#pragma unroll
    for (int t = 0; t < N; ++t) {
      // The sign of the product where it is the elected one, else a negative number; a difference of 0 has none.
      const uint32_t signs = bit_cast<uint32_t>(m.terms[t].sign_weight) & 0x80000000u;
      passes[t] = passes[t] & (int32_t(bit_cast<uint32_t>(d[t]) ^ signs ^ elected) > 0);
    }
  }
  float step = 0, share = 0;
#pragma unroll
  for (int t = 0; t < N; ++t) {
    if (!passes[t]) continue;
    step = fma_once(m.terms[t].weight, d[t], step);
    share += m.terms[t].share;
  }
  if (!m.divides) return step;
  const float size = share < 0 ? -share : share;
  return step / (share == 0 || size < m.least_share ? m.other_share : share);
}

template <int N, bool kElects>
FI_KERNEL(kThreads, N <= 2 ? 4 : 3)
masked_few_kernel(FI_ARGUMENT MaskedTask<float> m) {
  constexpr int kSame = int(DType::BF16);
  FI_SHARED uint64_t drawn_bytes[kFew * kThreads / 8];
  const int me = int(thread_index());
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t group = m.first / kMaskGroup + (int64_t(block_index()) * kPasses + pass) * kGroupsAtOnce;
    const int64_t from = group * kMaskGroup + me * kUnit - m.first;
    const bool whole = from >= 0 && from + kUnit <= m.numel;
    Raw<float, kSame> base, x[N];
    load_unit(DType::BF16, m.inputs.x[m.base], from, whole, &base);
#pragma unroll
    for (int t = 0; t < N; ++t) load_unit(DType::BF16, m.inputs.x[m.terms[t].input], from, whole, &x[t]);
    const uint32_t drawn = draw_unit(m, group + me / kPhiloxLanes, drawn_bytes);
    if (!whole) {
      if (from + kUnit > 0 && from < m.numel) some_of_unit(m, from, drawn, nullptr);
      continue;
    }
    float p[kUnit], d[N][kUnit], y[kUnit];
    uint32_t largest = 0;  // magnitude among the inputs
    widen_unit(DType::BF16, base, p);
#pragma unroll
    for (int j = 0; j < kUnit; ++j) largest = larger(largest, bits_of(p[j]));
#pragma unroll
    for (int t = 0; t < N; ++t) {
      widen_unit(DType::BF16, x[t], d[t]);
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        const float v = d[t][j] - p[j];
        largest = larger(largest, bits_of(v));
        d[t][j] = limited(m, v);
      }
    }
    if (largest >= 0x7f800000u) {  // NaN or an infinity
      some_of_unit(m, from, drawn, nullptr);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) {
      float own[N];
#pragma unroll
      for (int t = 0; t < N; ++t) own[t] = d[t][j];
      y[j] = p[j] + few_step<N, kElects>(m, own, drawn >> j);
    }
    if (store_unit_fast<DType::BF16>(y, m.to.out, from) && m.stats.counts) count_unit(m, from);
  }
}

// Whether all that is read and written has one dtype, and is rounded to nearest.
bool has_one_dtype(const MaskedTask<float>& task) {
  bool one = !task.to.stochastic;
  for (int i = 0; i < kMaxInputs; ++i)
    if (task.reads >> i & 1) one = one && task.inputs.in[i] == task.to.dtype;
  return one;
}

Mode mode_of(const MaskedTask<float>& m) {
  return m.important ? kImportant : m.score.kind != Score::kNone ? kScored : kPlain;
}

// Whether masked_few_kernel does a sum of bf16: what it leaves out is rare.
bool is_few(const MaskedTask<float>& task) {
  bool few = task.n_terms > 0 && !task.has_sole_weights;
  for (int t = 0; t < task.n_terms; ++t)
    few = few && task.terms[t].input != task.base && (!task.elects_signs || task.terms[t].sign_weight != 0);
  return few;
}

template <int N>
void launch_few(const MaskedTask<float>& task, uint32_t blocks, cudaStream_t stream) {
  if (task.elects_signs)
    FI_LAUNCH((masked_few_kernel<N, true>), blocks, kThreads, stream, task);
  else
    FI_LAUNCH((masked_few_kernel<N, false>), blocks, kThreads, stream, task);
}

}  // namespace

void masked_units(const MaskedTask<float>& task, uint32_t blocks, cudaStream_t stream) {
  const Mode mode = mode_of(task);
  const DType same = mode == kPlain && has_one_dtype(task) ? task.to.dtype : DType::F64;
  if (mode == kImportant)
    FI_LAUNCH((masked_unit_kernel<kAnyDType, kImportant>), blocks, kThreads, stream, task);
  else if (mode == kScored)
    FI_LAUNCH((masked_unit_kernel<kAnyDType, kScored>), blocks, kThreads, stream, task);
  else if (same == DType::BF16 && is_few(task)) {
    constexpr void (*kLaunches[kFew])(const MaskedTask<float>&, uint32_t, cudaStream_t) = {
        launch_few<1>, launch_few<2>, launch_few<3>, launch_few<4>};
    kLaunches[task.n_terms - 1](task, blocks, stream);
  } else if (same == DType::F16)
    FI_LAUNCH((masked_unit_kernel<int(DType::F16), kPlain>), blocks, kThreads, stream, task);
  else if (same == DType::F32)
    FI_LAUNCH((masked_unit_kernel<int(DType::F32), kPlain>), blocks, kThreads, stream, task);
  else
    FI_LAUNCH((masked_unit_kernel<kAnyDType, kPlain>), blocks, kThreads, stream, task);
}

}  // namespace cuda
}  // namespace fi
