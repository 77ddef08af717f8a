#include "../measure.h"

#include <algorithm>

#include "folds.h"

namespace fi {
namespace cuda {

namespace {

constexpr int64_t kMostScratch = 64 << 20;  // bytes, of the sums of blocks of rows

int64_t scratch_bytes(const MeasureTask& task) {
  const FoldTask parts = measure_parts(task);
  return (parts.rows * parts.count * parts.width + fold_scratch(parts)) * int64_t(sizeof(double));
}

int64_t whole_spans(int64_t columns) { return std::max<int64_t>(1, columns / kLanes) * kLanes; }

// Memory for the sums of blocks of some columns, whose number becomes task->columns: as many as kMostScratch holds, and
// fewer where the device has not that much.
std::unique_ptr<Scratch> scratch_of_columns(Queue* queue, MeasureTask* task) {
  task->columns = task->length;
  const int64_t all = scratch_bytes(*task);
  if (all > kMostScratch) task->columns = std::min(task->length, whole_spans(task->length * kMostScratch / all));
  for (;; task->columns = whole_spans(task->columns / 2)) {
    try {
      return std::make_unique<Scratch>(queue, scratch_bytes(*task), "sums");
    } catch (const Error& error) {
      if (!error.memory || task->columns <= kLanes) throw;
    }
  }
}

// Columns are measured some at a time: every 64 rows have sums of their own, of up to half as many bytes as the inputs.
std::shared_ptr<Pending> by_columns(Queue* queue, MeasureTask task) {
  const int64_t width = measure_width(task.n), bytes = width * int64_t(sizeof(double));  // of a column
  const Scratch totals(queue, task.length * bytes, "sums");
  const std::unique_ptr<Scratch> scratch = scratch_of_columns(queue, &task);
  const int64_t most = task.columns;
  task.sums = static_cast<double*>(scratch->at());
  for (task.column = 0; task.column < task.length; task.column += most) {
    task.columns = std::min(most, task.length - task.column);
    const FoldTask parts = measure_parts(task);
    measure(task, queue->stream());
    check_launch("measure", queue->device());
    double* const behind = task.sums + parts.count * parts.width;
    const double* const folded = fold_parts(parts, task.sums, behind, queue->stream());
    check_launch("fold", queue->device());
    queue->copy(static_cast<double*>(totals.at()) + task.column * width, folded, task.columns * bytes);
  }
  return fetched_sums(queue, static_cast<const double*>(totals.at()), task.length, measure_sums(task.n), task.n);
}

std::shared_ptr<Pending> run_one(Queue* queue, const ParsedPiece& piece) {
  const Per per = piece.step.per;
  MeasureTask task{table_of(piece),
                   int(piece.x.size()),
                   piece.step.deltas,
                   piece.wide,
                   per == Per::kColumn,
                   piece.numel,
                   piece.numel,
                   nullptr,
                   0,
                   0,
                   false};
  if (per != Per::kTensor) task.length = columns_of(piece);
  const int64_t groups = per == Per::kTensor ? 1 : per == Per::kRow ? task.numel / task.length : task.length;
  const int64_t reals = measure_sums(task.n);
  if (task.numel == 0) return no_sums(groups, reals, task.n);
  if (task.by_column) return by_columns(queue, task);
  const FoldTask parts = measure_parts(task);
  return folded(queue, parts, groups, reals, task.n, "measure", [&](double* sums) {
    task.sums = sums;
    measure(task, queue->stream());
  });
}

}  // namespace

const Kind kMeasure = {StepKind::kMeasure, run_each<run_one>};

}  // namespace cuda
}  // namespace fi
