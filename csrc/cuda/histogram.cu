#include "histogram.h"
#include "scores.h"
#include "values.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kThreads = 256;
// Bins that a block counts in shared memory, those that it meets first: real deltas of 16-bit models are heavily tied,
// and additions to one address wait for each other.
constexpr int kSlotBits = 12, kSlots = 1 << kSlotBits;
constexpr uint32_t kNoBin = 0xffffffffu;

struct Slots {
  uint32_t bin[kSlots], count[kSlots];
};

// Whose bin the slot is afterwards.
FI_DEVICE uint32_t claim(uint32_t* slot, uint32_t bin) {
#ifdef __CUDACC__
  const uint32_t before = atomicCAS(slot, kNoBin, bin);
  return before == kNoBin ? bin : before;
#else
  uint32_t before = kNoBin;
  return __atomic_compare_exchange_n(slot, &before, bin, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED) ? bin : before;
#endif
}

FI_DEVICE void count_bin(Slots* slots, uint32_t* bins, uint32_t bin) {
  const uint32_t slot = bin * 2654435761u >> (32 - kSlotBits);
  uint32_t owner = slots->bin[slot];
  if (owner == kNoBin) owner = claim(&slots->bin[slot], bin);
  atomic_add(owner == bin ? &slots->count[slot] : &bins[bin], 1);
}

// The magnitudes of n elements of a unit, of what bracket b ranks; where the one before ranks the same, they are there.
template <class T>
FI_DEVICE void magnitudes(const HistogramTask& h, int b, int64_t at, int n, uint32_t* mags) {
  T p[kUnit], x[kUnit];
  unit<T>(h.inputs.in[0], h.inputs.x[0], at, n, p);
  if (h.score.kind == Score::kVariance) {
    T mean[kUnit] = {}, sum[kUnit] = {};
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
      for (int k = 1; k < h.n; ++k) {
        unit<T>(h.inputs.in[k], h.inputs.x[k], at, n, x);
#pragma unroll
        for (int j = 0; j < kUnit; ++j) {
          const T d = x[j] - p[j], away = d - mean[j];
          if (pass == 0)
            mean[j] += d;
          else
            sum[j] = fma_once(away, away, sum[j]);
        }
      }
#pragma unroll
      for (int j = 0; j < kUnit; ++j)
        if (pass == 0) mean[j] /= T(h.n - 1);
    }
#pragma unroll
    for (int j = 0; j < kUnit; ++j) mags[j] = magnitude(sum[j]);
    return;
  }
  const bool scores = h.score.kind == Score::kDivergence;
  const int k = scores ? 1 : h.brackets[b].input;
  unit<T>(h.inputs.in[k], h.inputs.x[k], at, n, x);
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    const T d = x[j] - p[j];
    mags[j] = magnitude(!scores || j >= n ? d : score_of<T, 1>(h.score, 1, h.first + at + j, [&](int) { return d; }));
  }
}

template <class T>
FI_KERNEL(kThreads, sizeof(T) == 8 ? 2 : 3)
histogram_kernel(FI_ARGUMENT HistogramTask h) {
  FI_SHARED Slots slots;
  FI_SHARED uint32_t counts[2 * kMostBrackets];
  const int me = int(thread_index());
  for (int i = me; i < kSlots; i += kThreads) slots.bin[i] = kNoBin, slots.count[i] = 0;
  for (int i = me; i < 2 * kMostBrackets; i += kThreads) counts[i] = 0;
  sync_threads();
#pragma unroll 1
  for (int64_t i = int64_t(block_index()) * kThreads + me; i < h.strips * kStripUnits;
       i += int64_t(block_count()) * kThreads) {
    const int64_t strip = h.first_strip + i / kStripUnits * h.every;
    const int64_t at = (strip * kStripUnits + i % kStripUnits) * kUnit - h.first, left = h.numel - at;
    const int n = left < kUnit ? int(left) : kUnit;
    uint32_t mags[kUnit];
#pragma unroll 1
    for (int b = 0; b < h.n_brackets && n > 0; ++b) {
      const BracketTask& bracket = h.brackets[b];
      if (b == 0 || (h.score.kind == Score::kNone && bracket.input != h.brackets[b - 1].input))
        magnitudes<T>(h, b, at, n, mags);
      uint32_t above = 0, zero = 0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) {
        if (j >= n) continue;
        const uint32_t m = mags[j];
        above += m > bracket.low + bracket.width;
        zero += m == 0;
        if (m != 0 && m - bracket.low <= bracket.width)
          count_bin(&slots, h.bins, bracket.first_bin + ((m - bracket.low) >> bracket.shift));
      }
      if (above != 0) atomic_add(&counts[2 * b], above);
      if (zero != 0) atomic_add(&counts[2 * b + 1], zero);
    }
  }
  sync_threads();
  for (int i = me; i < kSlots; i += kThreads)
    if (slots.count[i] != 0) atomic_add(&h.bins[slots.bin[i]], slots.count[i]);
  for (int i = me; i < 2 * h.n_brackets; i += kThreads)
    if (counts[i] != 0) atomic_add(&h.counts[i], int64_t(counts[i]));
}

}  // namespace

void histogram(const HistogramTask& task, uint32_t blocks, cudaStream_t stream) {
  const int64_t needed = (task.strips * kStripUnits + kThreads - 1) / kThreads;
  const uint32_t grid = needed < blocks ? uint32_t(needed) : blocks;
  if (task.wide)
    FI_LAUNCH(histogram_kernel<double>, grid, kThreads, stream, task);
  else
    FI_LAUNCH(histogram_kernel<float>, grid, kThreads, stream, task);
}

}  // namespace cuda
}  // namespace fi
