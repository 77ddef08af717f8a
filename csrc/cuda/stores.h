// Units of elements of a kernel's output: rounded, and stored as vectors.
#pragma once

#include "sums.h"
#include "tasks.h"

namespace fi {
namespace cuda {

// Puts code `c`, of element j of a unit, into the unit's words.
template <class Bits>
FI_DEVICE void put_code(uint32_t* w, int j, Bits c) {
  if constexpr (sizeof(Bits) == 8)
    w[2 * j] = uint32_t(c), w[2 * j + 1] = uint32_t(uint64_t(c) >> 32);
  else
    w[j * int(sizeof(Bits)) / 4] |= uint32_t(c) << (8 * int(sizeof(Bits)) * j) % 32;
}

template <int kBytes>
FI_DEVICE void store_words(const uint32_t* w, void* out, int64_t i) {
  char* const at = static_cast<char*>(out) + i * kBytes;
  if constexpr (kBytes == 1)
    store_once(at, w[0], w[1]);
  else
    for (int v = 0; v < kBytes / 2; ++v)
      store_once(at + 16 * v, Vector16{{w[4 * v], w[4 * v + 1], w[4 * v + 2], w[4 * v + 3]}});
}

// Rounds and stores a unit. Returns whether a NaN or an infinity is among what is stored. words: random ones.
template <DType D, class Policy, bool kStochastic, class T>
FI_DEVICE bool store_unit_as(const T* y, const uint32_t* words, void* out, int64_t i) {
  using Bits = typename Format<D>::Bits;
  uint32_t w[2 * sizeof(Bits)] = {};
  bool nonfinite = false;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const Bits c = narrow<D, Policy, kStochastic>(y[j], kStochastic ? words[j] : 0u);
    put_code(w, j, c);
    if constexpr (D == DType::F64)
      nonfinite = nonfinite || !is_finite(y[j]);
    else
      nonfinite = nonfinite || (c & Format<D>::kInf) == Format<D>::kInf;
  }
  store_words<int(sizeof(Bits))>(w, out, i);
  return nonfinite;
}

// The same to nearest, by the device's own conversion where there is one.
template <DType D>
FI_DEVICE bool store_unit_fast(const float* y, void* out, int64_t i) {
  using Bits = typename Format<D>::Bits;
  uint32_t w[2 * sizeof(Bits)] = {}, largest = 0;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const Bits c = narrow_fast<D>(y[j]);
    put_code(w, j, c);
    const uint32_t special = c & Format<D>::kInf;
    largest = largest > special ? largest : special;
  }
  store_words<int(sizeof(Bits))>(w, out, i);
  return largest == Format<D>::kInf;
}

template <DType D, class Policy, class T>
FI_DEVICE bool store_unit_by(bool stochastic, const T* y, const uint32_t* words, void* out, int64_t i) {
  return stochastic ? store_unit_as<D, Policy, true>(y, words, out, i)
                    : store_unit_as<D, Policy, false>(y, words, out, i);
}

template <class T>
FI_DEVICE bool store_unit(const Store& store, const T* y, const uint32_t* words, void* out, int64_t i) {
  switch (store.dtype) {
    case DType::F64:
      return store_unit_as<DType::F64, Fp8Saturate, false>(y, words, out, i);
    case DType::F32:
      return store_unit_by<DType::F32, Fp8Saturate>(store.stochastic, y, words, out, i);
    case DType::F16:
      return store_unit_by<DType::F16, Fp8Saturate>(store.stochastic, y, words, out, i);
    case DType::BF16:
      return store_unit_by<DType::BF16, Fp8Saturate>(store.stochastic, y, words, out, i);
    case DType::F8_E4M3:
      return store.fp8_saturate ? store_unit_by<DType::F8_E4M3, Fp8Saturate>(store.stochastic, y, words, out, i)
                                : store_unit_by<DType::F8_E4M3, Fp8Nonfinite>(store.stochastic, y, words, out, i);
    default:
      return store.fp8_saturate ? store_unit_by<DType::F8_E5M2, Fp8Saturate>(store.stochastic, y, words, out, i)
                                : store_unit_by<DType::F8_E5M2, Fp8Nonfinite>(store.stochastic, y, words, out, i);
  }
}

// Random words of kSpan elements from e on, a multiple of kPhiloxGroup, for a block of kUnitThreads: each thread draws
// those of its counters, and uses those of its unit. Called by all threads of a block.
constexpr int kUnitThreads = 256, kSpan = kUnitThreads * kUnit;

FI_DEVICE void draw_words(int64_t e, uint64_t key, uint32_t* words) {
  const uint32_t lane = thread_index() % kPhiloxLanes, group = thread_index() / kPhiloxLanes;
  sync_threads();  // nobody uses those of before
#pragma unroll 1
  for (uint32_t g = group; g < kSpan / kPhiloxGroup; g += kUnitThreads / kPhiloxLanes) {
    const PhiloxWords<uint64_t> drawn = words_of(e / kPhiloxGroup + g, lane, key);
    for (int w = 0; w < 4; ++w) words[g * kPhiloxGroup + uint32_t(w) * kPhiloxLanes + lane] = uint32_t(drawn.w[w]);
  }
  sync_threads();
}

}  // namespace cuda
}  // namespace fi
