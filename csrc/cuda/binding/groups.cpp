#include "../groups.h"

#include "folds.h"
#include "masks.h"
#include "sampled.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

// The numbers of one output for the groups of the piece, in the kernel's layout: totals, unless all are 1, then the
// weights of each term.
template <class T>
std::vector<T> table_of(const ParsedGroupRow& row, int64_t first, int64_t groups, int64_t terms, bool ones) {
  std::vector<T> table;
  table.reserve(size_t(groups * (terms + 1)));
  for (int64_t g = first; g < first + groups && !ones; ++g) table.push_back(T(row.totals[g]));
  for (int64_t t = 0; t < terms; ++t)
    for (int64_t g = first; g < first + groups; ++g) table.push_back(T(row.weights[g * terms + t]));
  return table;
}

template <class T>
void send(Queue* queue, const std::vector<T>& table, bool ones, GroupTask* task, Uploads* uploads) {
  const void* const at =
      upload(queue, table.data(), int64_t(table.size() * sizeof(T)), "weights by row or column", uploads);
  task->totals = ones ? nullptr : at;
  task->weights = static_cast<const T*>(at) + (ones ? 0 : task->groups);
}

// The terms of an output's row, and whether it computes in float64.
void add_row(Queue* queue, const ParsedGroupRow& row, const ParsedPiece& piece, GroupTask* task, Uploads* uploads) {
  task->pivot = row.pivot;
  task->n_terms = int(row.inputs.size());
  task->wide = piece.in[size_t(row.pivot)] == DType::F64;
  for (size_t t = 0; t < row.inputs.size(); ++t) {
    task->terms[t] = row.inputs[t];
    task->wide = task->wide || piece.in[size_t(row.inputs[t])] == DType::F64;
  }
  const int64_t terms = task->n_terms;
  if (row.totals.size() < task->first_group + task->groups)
    throw py::value_error("a row needs a total and a weight of each term for each row or column of the tensor");
  bool ones = true;
  for (int64_t g = 0; g < row.totals.size() && ones; ++g) ones = row.totals[g] == 1.0;
  if (task->wide)
    send(queue, table_of<double>(row, task->first_group, task->groups, terms, ones), ones, task, uploads);
  else
    send(queue, table_of<float>(row, task->first_group, task->groups, terms, ones), ones, task, uploads);
}

std::shared_ptr<Pending> run_one(Queue* queue, const ParsedPiece& piece) {
  const Rows rows = rows_of(piece);
  const bool per_row = piece.step.per == Per::kRow;
  auto pending = std::make_shared<SampledOutputs>(piece);
  if (piece.numel == 0) return pending;
  Uploads uploads;
  pending->prepare(queue);
  for (size_t k = 0; k < piece.out.size(); ++k) {
    GroupTask task{};
    task.inputs = table_of(piece);
    task.per_row = per_row;
    task.columns = rows.columns;
    task.first_group = per_row ? rows.first : 0;
    task.groups = per_row ? rows.count : rows.columns;
    task.numel = piece.numel;
    task.first = piece.first;
    task.to = output_of(piece, k);
    task.stats = pending->of(k);
    add_row(queue, piece.step.group_rows[k], piece, &task, &uploads);
    group_sum(task, queue->stream());
    check_launch("combine by group", queue->device());
  }
  pending->fetch(queue);
  return pending;
}

}  // namespace

const Kind kGroupCombine = {StepKind::kGroupCombine, run_each<run_one>};

}  // namespace cuda
}  // namespace fi
