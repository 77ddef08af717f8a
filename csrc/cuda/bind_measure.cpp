#include "bind_folds.h"
#include "measure.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

std::shared_ptr<Pending> run_one(Queue* queue, const py::dict& piece, bool deltas) {
  const Operands operands = operands_of(piece);
  const std::string per = get<std::string>(piece, "per", "tensor");
  MeasureTask task{table_of(operands), int(operands.x.size()), deltas,         operands.wide,
                   per == "column",    operands.numel,         operands.numel, nullptr};
  if (per != "tensor") task.length = columns_of(piece, operands.numel);
  const int64_t groups = per == "tensor" ? 1 : per == "row" ? task.numel / task.length : task.length;
  const int64_t reals = measure_sums(task.n);
  if (task.numel == 0) return no_sums(groups, reals, task.n);
  const FoldTask parts = measure_parts(task);
  return folded(queue, parts, groups, reals, task.n, "measure", [&](double* sums) {
    task.sums = sums;
    measure(task, queue->stream());
  });
}

template <bool kDeltas>
Pendings run(Queue* queue, const Pieces& pieces) {
  Pendings all;
  for (const py::dict& piece : pieces) all.push_back(run_one(queue, piece, kDeltas));
  return all;
}

}  // namespace

const Kind kMeasure = {"measure", run<false>}, kMeasureRows = {"measure by row", run<false>},
           kMeasureColumns = {"measure by column", run<false>};
const Kind kMeasureDeltas = {"measure_deltas", run<true>}, kMeasureDeltasRows = {"measure_deltas by row", run<true>},
           kMeasureDeltasColumns = {"measure_deltas by column", run<true>};

}  // namespace cuda
}  // namespace fi
