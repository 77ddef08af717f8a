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
  // Two branches: of an address that may be in either memory the device makes a loop. In shared memory those of a warp
  // that add 1 to one address are one addition.
  if (owner == bin)
    atomic_add(&slots->count[slot], 1);
  else
    atomic_add(&bins[bin], 1);
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

// Counts the magnitudes of a unit in bracket b.
FI_DEVICE void count_unit(const HistogramTask& h, int b, int here, const uint32_t* mags, Slots* slots,
                          uint32_t* counts) {
  const BracketTask& bracket = h.brackets[b];
  uint32_t above = 0, zero = 0;
#pragma unroll
  for (int j = 0; j < kUnit; ++j) {
    if (j >= here) continue;
    const uint32_t m = mags[j];
    above += m > bracket.low + bracket.width;
    zero += m == 0;
    if (m != 0 && m - bracket.low <= bracket.width)
      count_bin(slots, h.bins, bracket.first_bin + ((m - bracket.low) >> bracket.shift));
  }
  if (above != 0) atomic_add(&counts[2 * b], above);
  if (zero != 0) atomic_add(&counts[2 * b + 1], zero);
}

// What a block counts in: all of it in shared memory.
struct Tables {
  Slots slots;
  uint32_t counts[2 * kMostBrackets];
};

FI_DEVICE void clear(Tables* tables) {
  const int me = int(thread_index());
  for (int i = me; i < kSlots; i += kThreads) tables->slots.bin[i] = kNoBin, tables->slots.count[i] = 0;
  for (int i = me; i < 2 * kMostBrackets; i += kThreads) tables->counts[i] = 0;
  sync_threads();
}

FI_DEVICE void add_to(const HistogramTask& h, const Tables& tables) {
  const int me = int(thread_index());
  sync_threads();
  for (int i = me; i < kSlots; i += kThreads)
    if (tables.slots.count[i] != 0) atomic_add(&h.bins[tables.slots.bin[i]], tables.slots.count[i]);
  for (int i = me; i < 2 * h.n_brackets; i += kThreads)
    if (tables.counts[i] != 0) atomic_add(&h.counts[i], int64_t(tables.counts[i]));
}

// Anything.
template <class T>
FI_KERNEL(kThreads, 2)
histogram_kernel(FI_ARGUMENT HistogramTask h) {
  FI_SHARED Tables tables;
  const int me = int(thread_index());
  clear(&tables);
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
      count_unit(h, b, n, mags, &tables.slots, tables.counts);
    }
  }
  add_to(h, tables);
}

// Deltas in float32, of strips that exist whole and have units; the inputs have dtype kSame, if that is not kAnyDType.
// While a unit is counted, those that the thread counts next are loaded: of the base, and of the first input.
template <int kSame>
FI_KERNEL(kThreads, kSame == kAnyDType ? 2 : 3)
histogram_unit_kernel(FI_ARGUMENT HistogramTask h) {
  constexpr int kAhead = kSame == int(DType::BF16) || kSame == int(DType::F16) ? 2 : 1;
  FI_SHARED Tables tables;
  clear(&tables);
  const int64_t stride = int64_t(block_count()) * kThreads, units = h.strips * kStripUnits;
  const int first = h.brackets[0].input;
  const auto place_of = [&](int64_t i) {
    return (h.first_strip + i / kStripUnits * h.every) * (kStripUnits * kUnit) + i % kStripUnits * kUnit - h.first;
  };
  Raw<float, kSame> base[kAhead], x[kAhead];
  const auto load = [&](int64_t i, int u) {
    load_unit(h.inputs.in[0], h.inputs.x[0], place_of(i), i < units, &base[u]);
    load_unit(h.inputs.in[first], h.inputs.x[first], place_of(i), i < units, &x[u]);
  };
  int64_t i = int64_t(block_index()) * kThreads + thread_index();
#pragma unroll
  for (int u = 0; u < kAhead; ++u) load(i + u * stride, u);
#pragma unroll 1
  for (; i < units; i += stride) {
    float p[kUnit], d[kUnit];
    uint32_t mags[kUnit];
    widen_unit(h.inputs.in[0], base[0], p);
    widen_unit(h.inputs.in[first], x[0], d);
#pragma unroll
    for (int u = 1; u < kAhead; ++u) base[u - 1] = base[u], x[u - 1] = x[u];
    load(i + kAhead * stride, kAhead - 1);
    int counted = first;  // the input whose deltas are there
#pragma unroll 1
    for (int b = 0; b < h.n_brackets; ++b) {
      const int k = h.brackets[b].input;
      if (k != counted) {
        Raw<float, kSame> other;
        load_unit(h.inputs.in[k], h.inputs.x[k], place_of(i), true, &other);
        widen_unit(h.inputs.in[k], other, d);
      }
      if (b == 0 || k != counted)
#pragma unroll
        for (int j = 0; j < kUnit; ++j) mags[j] = magnitude(d[j] - p[j]);
      counted = k;
      count_unit(h, b, kUnit, mags, &tables.slots, tables.counts);
    }
  }
  add_to(h, tables);
}

// The blocks of a kernel that run at a time: more would only wait, fewer would leave the device idle.
template <class Function>
uint32_t blocks_at_once(Function function) {
  int device = 0, processors = 0, resident = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, reinterpret_cast<const void*>(function), kThreads, 0) !=
          cudaSuccess)
    return 1;  // the launch will tell the same error
  return uint32_t(processors * resident);
}

uint32_t grid_of(const HistogramTask& task, uint32_t blocks) {
  const int64_t needed = (task.strips * kStripUnits + kThreads - 1) / kThreads;
  return needed < blocks ? uint32_t(needed) : blocks;
}

#define FI_HISTOGRAM(kernel, task)                                \
  do {                                                            \
    const uint32_t grid = grid_of(task, blocks_at_once(&kernel)); \
    FI_LAUNCH(kernel, grid, kThreads, stream, task);              \
  } while (false)

bool lies_in_units(const HistogramTask& task) {
  bool all = !task.wide && task.score.kind == Score::kNone && task.first % kUnit == 0;
  for (int i = 0; i < task.n; ++i) all = all && has_units(task.inputs.x[i], task.inputs.in[i], 0);
  return all;
}

void launch_any(const HistogramTask& task, cudaStream_t stream) {
  if (task.strips == 0) return;
  if (task.wide)
    FI_HISTOGRAM(histogram_kernel<double>, task);
  else
    FI_HISTOGRAM(histogram_kernel<float>, task);
}

void launch_units(const HistogramTask& task, cudaStream_t stream) {
  if (task.strips == 0) return;
  bool same = true;
  for (int i = 1; i < task.n; ++i) same = same && task.inputs.in[i] == task.inputs.in[0];
  if (same && task.inputs.in[0] == DType::BF16)
    FI_HISTOGRAM(histogram_unit_kernel<int(DType::BF16)>, task);
  else if (same && task.inputs.in[0] == DType::F16)
    FI_HISTOGRAM(histogram_unit_kernel<int(DType::F16)>, task);
  else if (same && task.inputs.in[0] == DType::F32)
    FI_HISTOGRAM(histogram_unit_kernel<int(DType::F32)>, task);
  else
    FI_HISTOGRAM(histogram_unit_kernel<kAnyDType>, task);
}

#undef FI_HISTOGRAM

}  // namespace

void histogram(const HistogramTask& given, cudaStream_t stream) {
  HistogramTask units = given, rest = given;
  // The last strip may exist in part: it is the other kernel's.
  const int64_t last = given.first_strip + (given.strips - 1) * given.every;
  const bool partly = (last + 1) * kStripUnits * kUnit > given.first + given.numel;
  units.strips = lies_in_units(given) ? given.strips - int(partly) : 0;
  rest.first_strip += units.strips * given.every;
  rest.strips -= units.strips;
  launch_units(units, stream);
  launch_any(rest, stream);
}

}  // namespace cuda
}  // namespace fi
