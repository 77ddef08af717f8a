#include "lanes.h"
#include "measure.h"
#include "values.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kGroup = 4;  // vectors that a block takes from one index on: ten products in registers
constexpr int kStageBytes = 32 << 10;

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
  const int64_t spans = (m.columns + kLanes - 1) / kLanes, row = part / spans * kBlockRows,
                column = part % spans * kLanes;
  const int rows = least(m.numel / m.length - row, kBlockRows), lanes = least(m.columns - column, kLanes);
  return {row * m.length + m.column + column,
          m.length,
          rows,
          lanes,
          rows * kLanes,
          m.sums + (part / spans * m.columns + column) * width};
}

// Lines that lie in shared memory at a time: so many that every thread has whole units of them.
template <class T, int kVectors>
FI_HD constexpr int lines_at_once() {
  int lines = kUnit;
  while (2 * lines * kVectors * kLanes * int(sizeof(T)) <= kStageBytes) lines *= 2;
  while (lines > 1 && lines * kVectors * kLanes * int(sizeof(T)) > kStageBytes) lines /= 2;
  return lines;
}

// Where a unit of lines `line` and on is: that of line line + item / (kLanes / kUnit).
struct UnitPlace {
  int64_t at;      // its first element
  int slot, here;  // its first number in the lines of a vector; elements of it that exist
};

FI_DEVICE UnitPlace place_of(const Slab& slab, int line, int item) {
  constexpr int kUnits = kLanes / kUnit;
  const int l = line + item / kUnits, lane = item % kUnits * kUnit;
  const int here = l < slab.lines ? least(least(slab.lanes - lane, slab.total - l * kLanes - lane), kUnit) : 0;
  return {slab.at + l * slab.stride + lane, item / kUnits * kLanes + lane, here < 0 ? 0 : here};
}

template <class T>
FI_DEVICE void put_unit(const T* x, T* slot) {
  for (int j = 0; j < kUnit; ++j) slot[j] = x[j];
}

// Whether all units of a slab exist whole, and lie where vectors are loaded.
FI_DEVICE bool is_whole(const MeasureTask& m, const Slab& slab) {
  return m.units && slab.lanes % kUnit == 0 && slab.total % kUnit == 0;
}

// Runs take(values) for every line, values those of the thread's lane of each vector: of all kVectors inputs, of dtype
// kSame, of a slab that is whole. Element i of line l of vector v is in staged[(v * kAtOnce + l) * kLanes + i]. While
// the lines that are there are summed, the next ones are loaded; all vectors of a unit together, so that the base is
// loaded once.
template <int kSame, int kVectors, class Take>
FI_DEVICE void each_line_of_all(const MeasureTask& m, const Slab& slab, float* staged, Take take) {
  constexpr int kAtOnce = lines_at_once<float, kVectors>(), kUnits = kAtOnce / kUnit;  // units of a thread
  constexpr DType kDType = DType(kSame);
  const int lane = int(thread_index());
  Raw<float, kSame> raw[kUnits][kVectors];
  const auto load = [&](int line) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const UnitPlace place = place_of(slab, line, lane + u * kLanes);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) load_unit(kDType, m.inputs.x[v], place.at, place.here != 0, &raw[u][v]);
    }
  };
  load(0);
  for (int line = 0; line < slab.lines; line += kAtOnce) {
    sync_threads();  // what was staged before has been used
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const UnitPlace place = place_of(slab, line, lane + u * kLanes);
      float p[kUnit], x[kUnit];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        widen_unit(kDType, raw[u][v], x);
        for (int j = 0; j < kUnit; ++j) {
          if (v == 0)
            p[j] = m.deltas ? x[j] : 0.0f;
          else
            x[j] -= p[j];
        }
        put_unit(x, staged + v * kAtOnce * kLanes + place.slot);
      }
    }
    sync_threads();
    load(line + kAtOnce);
    const int here = least(slab.lines - line, kAtOnce);
#pragma unroll 2
    for (int l = 0; l < here; ++l) {
      float x[kVectors];
      for (int v = 0; v < kVectors; ++v) x[v] = staged[(v * kAtOnce + l) * kLanes + lane];
      take(x);
    }
  }
}

// The same for vectors a, a + 1, and so on, from the kGroup-th on b, b + 1, and so on, of any dtypes. What does not
// exist is 0.
template <class T, int kVectors, class Take>
FI_DEVICE void each_line(const MeasureTask& m, const Slab& slab, int a, int b, T* staged, Take take) {
  constexpr int kAtOnce = lines_at_once<T, kVectors>(), kItems = kAtOnce * kLanes / kUnit;
  const int lane = int(thread_index());
  for (int line = 0; line < slab.lines; line += kAtOnce) {
    sync_threads();  // what was staged before has been used
#pragma unroll 1
    for (int item = lane; item < kVectors * kItems; item += kLanes) {
      const int v = item / kItems;
      const UnitPlace place = place_of(slab, line, item % kItems);
      const int i = (v < kGroup ? a : b) + v % kGroup;
      T x[kUnit] = {}, p[kUnit] = {};
      if (i < m.n && place.here > 0) {
        unit<T>(m.inputs.in[i], m.inputs.x[i], place.at, place.here, x);
        if (m.deltas && i > 0) unit<T>(m.inputs.in[0], m.inputs.x[0], place.at, place.here, p);
      }
      for (int j = 0; j < kUnit; ++j) x[j] -= p[j];
      put_unit(x, staged + v * kAtOnce * kLanes + place.slot);
    }
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
  const auto take = [&](const T* x) {
    double wide[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      nonzero[i] += x[i] != 0;
      wide[i] = double(x[i]);
      sum[kPairs + i] += __builtin_fabs(wide[i]);
    }
    for (int i = 0, s = 0; i < kVectors; ++i)
      for (int j = i; j < kVectors; ++j, ++s) sum[s] = fma_once(wide[i], wide[j], sum[s]);
  };
  if constexpr (kSame != kAnyDType)
    each_line_of_all<kSame, kVectors>(m, slab, reinterpret_cast<T*>(shared), take);
  else
    each_line<T, kVectors>(m, slab, a, a, reinterpret_cast<T*>(shared), take);
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
  each_line<T, 2 * kGroup>(m, slab, a, b, reinterpret_cast<T*>(shared), [&](const T* x) {
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

// Blocks of kVectors inputs in a multiprocessor. Vectors of F32 take more registers; four of F16 do where compute
// capability 8.0 widens them.
template <int kSame, int kVectors>
constexpr int kResidentMeasures =
    (kVectors > 2 ? 3 : 4) - int(kSame == int(DType::F32) || (kSame == int(DType::F16) && kVectors == kGroup));

// kVectors inputs, all of one dtype, which float32 holds.
template <int kSame, int kVectors>
FI_KERNEL(kLanes, (kResidentMeasures<kSame, kVectors>))
measure_kernel(FI_ARGUMENT MeasureTask m) {
  FI_SHARED double shared[shared_size<float, kVectors>()];
  const Slab slab = slab_of(m, block_index());
  if (is_whole(m, slab))
    measure_group<float, kSame, kVectors>(m, slab, 0, shared);
  else
    measure_group<float, kAnyDType, kVectors>(m, slab, 0, shared);
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

// Whether all units of all rows lie where vectors are loaded.
bool lies_in_units(const MeasureTask& task) {
  bool all = task.length == task.numel || task.length % kUnit == 0;
  for (int i = 0; i < task.n; ++i) all = all && has_units(task.inputs.x[i], task.inputs.in[i], 0);
  return all;
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
  if (task.by_column) return {1, (rows + kBlockRows - 1) / kBlockRows, width * task.columns};
  return {rows, (task.length + kChunk - 1) / kChunk, width};
}

void measure(const MeasureTask& given, cudaStream_t stream) {
  MeasureTask task = given;
  task.units = lies_in_units(task);
  const FoldTask parts = measure_parts(task);
  const int64_t spans = task.by_column ? (task.columns + kLanes - 1) / kLanes : 1;
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
