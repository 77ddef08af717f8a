#include "../measure.h"

#include "folds.h"

namespace fi {
namespace cuda {

namespace {

std::shared_ptr<Pending> run_one(Queue* queue, const ParsedPiece& piece) {
  const Per per = piece.step.per;
  MeasureTask task{table_of(piece), int(piece.x.size()), piece.step.deltas, piece.wide, per == Per::kColumn,
                   piece.numel,     piece.numel,         nullptr,           false};
  if (per != Per::kTensor) task.length = columns_of(piece);
  const int64_t groups = per == Per::kTensor ? 1 : per == Per::kRow ? task.numel / task.length : task.length;
  const int64_t reals = measure_sums(task.n);
  if (task.numel == 0) return no_sums(groups, reals, task.n);
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
