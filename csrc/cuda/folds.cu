#include "folds.h"
#include "grid.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kTogether = 16;  // parts that a thread folds: a power of two
constexpr int kThreads = 256;

int64_t groups(int64_t count) { return (count + kTogether - 1) / kTogether; }

FI_KERNEL(kThreads, 4) fold_kernel(FI_ARGUMENT FoldTask task, const double* parts, double* to) {
  const int64_t of_row = (task.count + kTogether - 1) / kTogether;
  const int64_t i = int64_t(block_index()) * kThreads + thread_index(), w = i % task.width, group = i / task.width;
  const int64_t row = group / of_row, first = group % of_row * kTogether;
  if (row >= task.rows) return;
  const int64_t left = task.count - first;
  const double* const from = parts + (row * task.count + first) * task.width + w;
  double sum[kTogether];
  for (int j = 0; j < kTogether; ++j) sum[j] = j < left ? from[j * task.width] : 0.0;
  for (int step = 1; step < kTogether; step *= 2)
    for (int j = 0; j + step < kTogether; j += 2 * step)
      if (j + step < left) sum[j] += sum[j + step];
  to[group * task.width + w] = sum[0];
}

}  // namespace

int64_t fold_scratch(const FoldTask& task) { return task.count > 1 ? task.rows * groups(task.count) * task.width : 0; }

const void* fold_function() { return reinterpret_cast<const void*>(&fold_kernel); }

double* fold_parts(const FoldTask& task, double* parts, double* scratch, cudaStream_t stream) {
  double *from = parts, *to = scratch;
  for (FoldTask now = task; now.count > 1; now.count = groups(now.count)) {
    const int64_t all = now.rows * groups(now.count) * now.width;
    FI_LAUNCH(fold_kernel, uint32_t((all + kThreads - 1) / kThreads), kThreads, stream, now, from, to);
    double* const made = to;
    to = from;
    from = made;
  }
  return from;
}

}  // namespace cuda
}  // namespace fi
