#include "bind_keeps.h"
#include "bind_sampled.h"
#include "masked.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

// What output d adds to a task.
void add_terms(const py::dict& d, MaskedTask* task) {
  const int inputs = int(kMaxInputs);
  const auto input = [&](const py::handle given) {
    const int i = given.cast<int>();
    if (i < 0 || i >= inputs || !task->inputs.x[i]) throw py::value_error("a masked output names none of the inputs");
    task->reads |= uint64_t(1) << i;
    return i;
  };
  const auto terms = d["terms"].cast<py::list>();
  if (terms.empty() || terms.size() > size_t(kMaxInputs))
    throw py::value_error("expected 1 to " + std::to_string(kMaxInputs) + " terms, got " +
                          std::to_string(terms.size()));
  task->reads = 0;
  task->base = input(d["base"]);
  task->n_terms = int(terms.size());
  for (size_t i = 0; i < terms.size(); ++i) {
    const auto t = terms[i].cast<py::dict>();
    const bool important = t["importance"].cast<int>() >= 0;
    if (i == 0) task->important = important;
    if (important != task->important) throw py::value_error("all terms have an importance, or none");
    task->terms[i] = {input(t["input"]),
                      important ? input(t["importance"]) : -1,
                      t["weight"].cast<double>(),
                      t["vote"].cast<double>(),
                      t["share"].cast<double>(),
                      t["alone"].cast<double>(),
                      keep_of(t["keep"].cast<py::dict>())};
  }
  task->votes = d["votes"].cast<bool>();
  task->divides = d["divides"].cast<bool>();
  task->alone = d["alone"].cast<bool>();
  task->least_share = d["least_share"].cast<double>();
  task->other_share = d["other_share"].cast<double>();
  task->limit = d["limit"].cast<double>();
  task->wide = false;
  for (int i = 0; i < inputs; ++i)
    task->wide = task->wide || (task->reads >> i & 1 && task->inputs.in[i] == DType::F64);
}

std::shared_ptr<Pending> run_one(Queue* queue, const py::dict& piece) {
  const Operands operands = operands_of(piece);
  const Outputs outputs = outputs_of(piece);
  const auto dicts = get<std::vector<py::dict>>(piece, "masked");
  if (dicts.size() != outputs.out.size()) throw py::value_error("as many outputs as masked sums are needed");
  const Rows rows = rows_of(piece, operands);
  MaskedTask shared{};
  shared.inputs = table_of(operands);
  shared.numel = operands.numel;
  shared.first = operands.first;
  std::vector<MaskedTask> tasks(dicts.size(), shared);
  Uploads uploads;
  for (size_t k = 0; k < dicts.size(); ++k) {
    add_terms(dicts[k], &tasks[k]);
    tasks[k].score = score_of(queue, dicts[k]["score"], rows, &uploads);
    tasks[k].to = output_of(outputs, k);
  }
  auto pending = std::make_shared<SampledOutputs>(operands, outputs);
  if (operands.numel == 0) return pending;
  const py::gil_scoped_release release;
  pending->prepare(queue);
  for (size_t k = 0; k < tasks.size(); ++k) {
    tasks[k].stats = pending->of(k);
    masked(tasks[k], queue->stream());
    check_launch("masked", queue->device());
  }
  pending->fetch(queue);
  return pending;
}

Pendings run(Queue* queue, const Pieces& pieces) {
  Pendings all;
  for (const py::dict& piece : pieces) all.push_back(run_one(queue, piece));
  return all;
}

}  // namespace

const Kind kMasked = {"masked", run};

}  // namespace cuda
}  // namespace fi
