#include "bind_keeps.h"
#include "kept.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

// Masks are not filled: what needs them draws again.
std::shared_ptr<Pending> run_one(Queue* queue, const py::dict& piece) {
  const Operands operands = operands_of(piece);
  const auto keeps = get<std::vector<py::dict>>(piece, "keeps");
  if (keeps.size() != operands.x.size()) throw py::value_error("as many keeps as inputs are needed");
  if (operands.first % kChunk != 0) throw py::value_error("a piece of this kind begins with a chunk");
  KeptTask task{};
  task.inputs = table_of(operands);
  task.n = int(operands.x.size());
  task.wide = operands.wide;
  task.l1 = get<bool>(piece, "l1");
  task.squares = get<bool>(piece, "squares");
  task.numel = operands.numel;
  task.first = operands.first;
  for (size_t k = 1; k < keeps.size(); ++k) {
    task.keeps[k] = keep_of(keeps[k]);
    task.random = task.random || task.keeps[k].limit < kWords;
  }
  Uploads uploads;
  task.score = score_of(queue, get<py::object>(piece, "score"), rows_of(piece, operands), &uploads);
  if (task.numel == 0 || task.n == 1) return no_sums(1, 3 * task.n, 2 * task.n);
  const FoldTask parts{1, (task.numel + kChunk - 1) / kChunk, kept_width(task.n)};
  return folded(queue, parts, 1, 3 * task.n, 2 * task.n, "kept", [&](double* sums) {
    task.sums = sums;
    kept(task, queue->stream());
  });
}

Pendings run(Queue* queue, const Pieces& pieces) {
  Pendings all;
  for (const py::dict& piece : pieces) all.push_back(run_one(queue, piece));
  return all;
}

}  // namespace

const Kind kKept = {"kept", run};

}  // namespace cuda
}  // namespace fi
