#include "bind_folds.h"
#include "bind_keeps.h"
#include "bind_sampled.h"
#include "groups.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

// A buffer of float64 of Python's.
struct Numbers {
  const double* from;
  int64_t size;
};

Numbers numbers_of(const py::buffer& given) {
  const py::buffer_info info = given.request();
  const bool fits = info.itemsize == 1 || info.item_type_is_equivalent_to<double>();
  if (!fits || info.ndim != 1 || info.strides[0] != info.itemsize)
    throw py::value_error("expected a contiguous buffer of float64");
  return {static_cast<const double*>(info.ptr), info.size * info.itemsize / int64_t(sizeof(double))};
}

// Of one output, as the kernel needs them: totals, unless all are 1, then the weights of each term, of the groups of
// the piece.
template <class T>
std::vector<T> table_of(const Numbers& totals, const Numbers& weights, int64_t first, int64_t groups, int64_t terms,
                        bool ones) {
  std::vector<T> table;
  table.reserve(size_t(groups * (terms + 1)));
  for (int64_t g = first; g < first + groups && !ones; ++g) table.push_back(T(totals.from[g]));
  for (int64_t t = 0; t < terms; ++t)
    for (int64_t g = first; g < first + groups; ++g) table.push_back(T(weights.from[g * terms + t]));
  return table;
}

template <class T>
void send(Queue* queue, const std::vector<T>& table, bool ones, GroupTask* task, Uploads* uploads) {
  const void* const at =
      upload(queue, table.data(), int64_t(table.size() * sizeof(T)), "weights by row or column", uploads);
  task->totals = ones ? nullptr : at;
  task->weights = static_cast<const T*>(at) + (ones ? 0 : task->groups);
}

using GroupRow = std::tuple<int, py::buffer, std::vector<int>, py::buffer>;

// What an output's row adds to a task.
void add_row(Queue* queue, const GroupRow& row, const Operands& operands, GroupTask* task, Uploads* uploads) {
  const auto& [pivot, py_totals, inputs, py_weights] = row;
  const auto bad = [&](int i) { return i < 0 || size_t(i) >= operands.x.size(); };
  if (bad(pivot) || inputs.size() > size_t(kMaxInputs)) throw py::value_error("a row's pivot is none of the inputs");
  task->pivot = pivot;
  task->n_terms = int(inputs.size());
  task->wide = operands.in[size_t(pivot)] == DType::F64;
  for (size_t t = 0; t < inputs.size(); ++t) {
    if (bad(inputs[t])) throw py::value_error("a row's term is none of the inputs");
    task->terms[t] = inputs[t];
    task->wide = task->wide || operands.in[size_t(inputs[t])] == DType::F64;
  }
  const Numbers totals = numbers_of(py_totals), weights = numbers_of(py_weights);
  const int64_t terms = task->n_terms;
  if (totals.size < task->first_group + task->groups || weights.size != totals.size * terms)
    throw py::value_error("a row needs a total and a weight of each term for each row or column of the tensor");
  const bool ones = std::all_of(totals.from, totals.from + totals.size, [](double t) { return t == 1.0; });
  if (task->wide)
    send(queue, table_of<double>(totals, weights, task->first_group, task->groups, terms, ones), ones, task, uploads);
  else
    send(queue, table_of<float>(totals, weights, task->first_group, task->groups, terms, ones), ones, task, uploads);
}

std::shared_ptr<Pending> run_one(Queue* queue, const py::dict& piece, bool per_row) {
  const Operands operands = operands_of(piece);
  const Outputs outputs = outputs_of(piece);
  const Rows rows = rows_of(piece, operands);
  const auto given = get<std::vector<GroupRow>>(piece, "rows");
  if (given.size() != outputs.out.size()) throw py::value_error("a row per output is needed");
  auto pending = std::make_shared<SampledOutputs>(operands, outputs);
  if (operands.numel == 0) return pending;
  Uploads uploads;
  pending->prepare(queue);
  for (size_t k = 0; k < given.size(); ++k) {
    GroupTask task{};
    task.inputs = table_of(operands);
    task.per_row = per_row;
    task.columns = rows.columns;
    task.first_group = per_row ? rows.first : 0;
    task.groups = per_row ? rows.count : rows.columns;
    task.numel = operands.numel;
    task.first = operands.first;
    task.to = output_of(outputs, k);
    task.stats = pending->of(k);
    add_row(queue, given[k], operands, &task, &uploads);
    group_sum(task, queue->stream());
    check_launch("combine by group", queue->device());
  }
  pending->fetch(queue);
  return pending;
}

template <bool kPerRow>
Pendings run(Queue* queue, const Pieces& pieces) {
  Pendings all;
  for (const py::dict& piece : pieces) all.push_back(run_one(queue, piece, kPerRow));
  return all;
}

}  // namespace

const Kind kCombineRows = {"combine by row", run<true>};
const Kind kCombineColumns = {"combine by column", run<false>};

}  // namespace cuda
}  // namespace fi
