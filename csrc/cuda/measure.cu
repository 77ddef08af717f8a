#include "lanes.h"
#include "measure.h"
#include "values.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kGroup = 4;  // vectors that a block takes from one index on: ten products in registers
constexpr int kStageBytes = 32 << 10;
constexpr int kAnyDType = -1;

FI_DEVICE int least(int64_t a, int b) { return a < b ? int(a) : b; }

// The elements that a block sums: lines of up to kLanes elements, element i of each line in lane i. The chunk of a row,
// line after line; or a block of rows, of kLanes columns.
struct Slab {
  int64_t at, stride;  // elements: the first one; from one line to the next
  int lines, lanes;    // of lines; of elements in each
  int total;           // elements, if the lines lie behind each other: the last one may be shorter
  double* sums;        // of lane 0 by column
};

FI_DEVICE Slab slab_of(const MeasureTask& m, int64_t part) {
  const int width = m.n * (m.n + 1) / 2 + 2 * m.n;
  if (!m.by_column) {
    const int64_t chunks = (m.length + kChunk - 1) / kChunk, first = part % chunks * kChunk;
    const int total = least(m.length - first, int(kChunk));
    return {
        part / chunks * m.length + first, kLanes, (total + kLanes - 1) / kLanes, kLanes, total, m.sums + part * width};
  }
  const int64_t spans = (m.length + kLanes - 1) / kLanes, row = part / spans * kBlockRows,
                column = part % spans * kLanes;
  const int rows = least(m.numel / m.length - row, kBlockRows), lanes = least(m.length - column, kLanes);
  return {row * m.length + column,
          m.length,
          rows,
          lanes,
          rows * kLanes,
          m.sums + (part / spans * m.length + column) * width};
}

// Lines that lie in shared memory at a time.
template <class T, int kVectors>
FI_HD constexpr int lines_at_once() {
  return kStageBytes / (kVectors * kLanes * int(sizeof(T)));
}

// kSame: the dtype of all inputs, or kAnyDType.
template <class T, int kSame>
FI_DEVICE void input_unit(const MeasureTask& m, int i, int64_t e, int n, T* to) {
  if constexpr (kSame != kAnyDType)
    unit<T, DType(kSame)>(m.inputs.x[i], e, n, to);
  else
    unit<T>(m.inputs.in[i], m.inputs.x[i], e, n, to);
}

// Lines `line` and on of vectors a, a + 1, and so on, from the kGroup-th on b, b + 1, and so on: element i of line l of
// vector v goes to to[(v * kAtOnce + l) * kLanes + i]. What does not exist is 0.
template <class T, int kSame, int kVectors>
FI_DEVICE void stage_lines(const MeasureTask& m, const Slab& slab, int a, int b, int line, T* to) {
  constexpr int kAtOnce = lines_at_once<T, kVectors>(), kUnits = kLanes / kUnit, kItems = kAtOnce * kUnits;
#pragma unroll(kSame == kAnyDType ? 1 : 4)
  for (int item = int(thread_index()); item < kVectors * kItems; item += kLanes) {
    const int v = item / kItems, l = line + item % kItems / kUnits, lane = item % kUnits * kUnit;
    const int i = (v < kGroup ? a : b) + v % kGroup;
    const int here = least(least(slab.lanes - lane, slab.total - l * kLanes - lane), kUnit);
    T x[kUnit];
    if (i < m.n && l < slab.lines && here > 0) {
      const int64_t e = slab.at + l * slab.stride + lane;
      input_unit<T, kSame>(m, i, e, here, x);
      if (m.deltas && i > 0) {
        T p[kUnit];
        input_unit<T, kSame>(m, 0, e, here, p);
        for (int j = 0; j < kUnit; ++j) x[j] -= p[j];
      }
    } else {
      for (int j = 0; j < kUnit; ++j) x[j] = 0;
    }
    T* const slot = to + (v * kAtOnce + (l - line)) * kLanes + lane;
    for (int j = 0; j < kUnit; ++j) slot[j] = x[j];
  }
}

// Runs take(values) for every line, values those of the thread's lane of each vector.
template <class T, int kSame, int kVectors, class Take>
FI_DEVICE void each_line(const MeasureTask& m, const Slab& slab, int a, int b, T* staged, Take take) {
  constexpr int kAtOnce = lines_at_once<T, kVectors>();
  const int lane = int(thread_index());
  for (int line = 0; line < slab.lines; line += kAtOnce) {
    sync_threads();  // what was staged before has been used
    stage_lines<T, kSame, kVectors>(m, slab, a, b, line, staged);
    sync_threads();
    const int here = least(slab.lines - line, kAtOnce);
#pragma unroll 2
    for (int l = 0; l < here; ++l) {
      T x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = staged[(v * kAtOnce + l) * kLanes + lane];
      take(x);
    }
  }
}

// Index of <v_i, v_j>, i <= j, among the sums of n vectors.
FI_DEVICE int gram_index(int n, int i, int j) { return i * n - i * (i - 1) / 2 + j - i; }

// Folds and stores the sums of a slab: sum s at index(s), and not at all if that is negative.
template <int kSums, class Index>
FI_DEVICE void store_sums(const MeasureTask& m, const Slab& slab, const double* sum, double* lanes, Index index) {
  const int t = int(thread_index());
  if (!m.by_column) {
    fold_lanes<kSums>(sum, lanes);
    if (t < kSums && index(t) >= 0) slab.sums[index(t)] = lanes[t * kLanes];
    return;
  }
  const int64_t width = m.n * (m.n + 1) / 2 + 2 * m.n;
  for (int s = 0; s < kSums; ++s)
    if (t < slab.lanes && index(s) >= 0) slab.sums[t * width + index(s)] = sum[s];
}

// All sums of vectors a, a + 1, and so on among themselves. Some of them may not exist.
template <class T, int kSame, int kVectors>
FI_DEVICE void measure_group(const MeasureTask& m, const Slab& slab, int a, double* shared) {
  constexpr int kPairs = kVectors * (kVectors + 1) / 2, kSums = kPairs + 2 * kVectors;
  double sum[kSums] = {};
  int nonzero[kVectors] = {};
  each_line<T, kSame, kVectors>(m, slab, a, a, reinterpret_cast<T*>(shared), [&](const T* x) {
    double wide[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      nonzero[i] += x[i] != 0;
      wide[i] = double(x[i]);
      sum[kPairs + i] += __builtin_fabs(wide[i]);
    }
    for (int i = 0, s = 0; i < kVectors; ++i)
      for (int j = i; j < kVectors; ++j, ++s) sum[s] = fma_once(wide[i], wide[j], sum[s]);
  });
  for (int i = 0; i < kVectors; ++i) sum[kPairs + kVectors + i] = nonzero[i];
  const int n = m.n;
  store_sums<kSums>(m, slab, sum, shared, [=](int s) {
    if (s >= kPairs) {
      const int i = (s - kPairs) % kVectors;
      return a + i >= n ? -1 : n * (n + 1) / 2 + (s - kPairs) / kVectors * n + a + i;
    }
    int i = 0, j = s;
    for (; j >= kVectors - i; ++i) j -= kVectors - i;
    return a + i + j >= n ? -1 : gram_index(n, a + i, a + i + j);
  });
}

// The products of vectors a and on, kGroup of them, with b and on, behind them, as many as there are.
template <class T>
FI_DEVICE void measure_products(const MeasureTask& m, const Slab& slab, int a, int b, double* shared) {
  double sum[kGroup * kGroup] = {};
  each_line<T, kAnyDType, 2 * kGroup>(m, slab, a, b, reinterpret_cast<T*>(shared), [&](const T* x) {
    for (int i = 0; i < kGroup; ++i)
      for (int j = 0; j < kGroup; ++j)
        sum[i * kGroup + j] = fma_once(double(x[i]), double(x[kGroup + j]), sum[i * kGroup + j]);
  });
  const int n = m.n;
  store_sums<kGroup * kGroup>(m, slab, sum, shared, [=](int s) {
    const int i = a + s / kGroup, j = b + s % kGroup;
    return j >= n ? -1 : gram_index(n, i, j);
  });
}

FI_HD constexpr int group_sums(int vectors) { return vectors * (vectors + 1) / 2 + 2 * vectors; }

// Shared memory for float64 numbers: for the lines of so many vectors, and later for lanes that fold.
template <class T, int kVectors>
FI_HD constexpr int shared_size() {
  constexpr int kStage = kVectors * lines_at_once<T, kVectors>() * kLanes * int(sizeof(T)) / 8;
  constexpr int kFold = group_sums(kVectors < kGroup ? kVectors : kGroup) * kLanes;
  return kStage > kFold ? kStage : kFold;
}

// kVectors inputs, all of one dtype, which float32 holds.
template <int kSame, int kVectors>
FI_KERNEL(kLanes, kVectors > 2 ? 3 : 4)
measure_kernel(FI_ARGUMENT MeasureTask m) {
  FI_SHARED double shared[shared_size<float, kVectors>()];
  measure_group<float, kSame, kVectors>(m, slab_of(m, block_index()), 0, shared);
}

// Any inputs.
template <class T>
FI_KERNEL(kLanes, 2)
measure_any_kernel(FI_ARGUMENT MeasureTask m) {
  FI_SHARED double shared[shared_size<T, 2 * kGroup>()];
  // Blocks that read the same elements stand next to each other.
  const int groups = (m.n + kGroup - 1) / kGroup, pairs = groups * (groups + 1) / 2;
  int i = 0, j = int(block_index()) % pairs;
  for (; j >= groups - i; ++i) j -= groups - i;
  const Slab slab = slab_of(m, block_index() / uint32_t(pairs));
  if (j == 0)
    measure_group<T, kAnyDType, kGroup>(m, slab, i * kGroup, shared);
  else
    measure_products<T>(m, slab, i * kGroup, (i + j) * kGroup, shared);
}

template <int kSame>
void launch_same(const MeasureTask& task, uint32_t blocks, cudaStream_t stream) {
  if (task.n == 1)
    FI_LAUNCH((measure_kernel<kSame, 1>), blocks, kLanes, stream, task);
  else if (task.n == 2)
    FI_LAUNCH((measure_kernel<kSame, 2>), blocks, kLanes, stream, task);
  else if (task.n == 3)
    FI_LAUNCH((measure_kernel<kSame, 3>), blocks, kLanes, stream, task);
  else
    FI_LAUNCH((measure_kernel<kSame, 4>), blocks, kLanes, stream, task);
}

void launch_any(const MeasureTask& task, uint32_t parts, cudaStream_t stream) {
  const uint32_t groups = uint32_t(task.n + kGroup - 1) / kGroup, blocks = parts * groups * (groups + 1) / 2;
  if (task.wide)
    FI_LAUNCH(measure_any_kernel<double>, blocks, kLanes, stream, task);
  else
    FI_LAUNCH(measure_any_kernel<float>, blocks, kLanes, stream, task);
}

}  // namespace

FoldTask measure_parts(const MeasureTask& task) {
  const int64_t width = measure_width(task.n), rows = task.numel / task.length;
  if (task.by_column) return {1, (rows + kBlockRows - 1) / kBlockRows, width * task.length};
  return {rows, (task.length + kChunk - 1) / kChunk, width};
}

void measure(const MeasureTask& task, cudaStream_t stream) {
  const FoldTask parts = measure_parts(task);
  const int64_t spans = task.by_column ? (task.length + kLanes - 1) / kLanes : 1;
  const uint32_t blocks = uint32_t(parts.rows * parts.count * spans);
  bool same = task.n <= kGroup;
  for (int i = 1; i < task.n; ++i) same = same && task.inputs.in[i] == task.inputs.in[0];
  if (same && task.inputs.in[0] == DType::BF16)
    launch_same<int(DType::BF16)>(task, blocks, stream);
  else if (same && task.inputs.in[0] == DType::F16)
    launch_same<int(DType::F16)>(task, blocks, stream);
  else if (same && task.inputs.in[0] == DType::F32)
    launch_same<int(DType::F32)>(task, blocks, stream);
  else
    launch_any(task, blocks, stream);
}

}  // namespace cuda
}  // namespace fi
