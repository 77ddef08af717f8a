#include "../masked_stats.h"

#include "masks.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

// Masks are not filled: masked sums on a device draw them again.
std::shared_ptr<Pending> run_one(Queue* queue, const ParsedPiece& piece) {
  if (piece.first % kChunk != 0) throw py::value_error("a piece of this kind begins with a chunk");
  MaskedStatsTask task{};
  task.inputs = table_of(piece);
  task.n = int(piece.x.size());
  task.wide = piece.wide;
  task.l1 = piece.step.l1;
  task.squares = piece.step.squares;
  task.numel = piece.numel;
  task.first = piece.first;
  for (size_t k = 1; k < piece.step.tests.size(); ++k) {
    task.tests[k] = range_of(piece.step.tests[k]);
    task.random = task.random || task.tests[k].limit < kWords;
  }
  Uploads uploads;
  task.score = score_of(queue, piece.step.score, rows_of(piece), &uploads);
  if (task.numel == 0 || task.n == 1) return no_sums(1, 3 * task.n, 2 * task.n);
  const FoldTask parts{1, (task.numel + kChunk - 1) / kChunk, masked_stats_width(task.n)};
  return folded(queue, parts, 1, 3 * task.n, 2 * task.n, "masked_stats", [&](double* sums) {
    task.sums = sums;
    masked_stats(task, queue->stream());
  });
}

}  // namespace

const Kind kMaskedStats = {StepKind::kMaskedStats, run_each<run_one>};

}  // namespace cuda
}  // namespace fi
