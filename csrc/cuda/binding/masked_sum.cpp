#include "../masked_sum.h"

#include "masks.h"
#include "sampled.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

// The terms of an output, and which inputs it reads.
void add_terms(const ParsedMaskedOutput& output, MaskedSumTask* task) {
  const auto reads = [&](int input) {
    task->reads |= uint64_t(1) << input;
    return input;
  };
  task->reads = 0;
  task->random = false;
  task->base = reads(output.base);
  task->n_terms = int(output.terms.size());
  task->important = output.important;
  for (size_t i = 0; i < output.terms.size(); ++i) {
    const ParsedTerm& term = output.terms[i];
    task->terms[i] = {reads(term.input), term.importance < 0 ? -1 : reads(term.importance),
                      term.weight,       term.weight * 1e-6,
                      term.sign_weight,  term.share,
                      term.sole_weight,  range_of(term.test)};
    task->random = task->random || task->terms[i].test.limit < kWords;
  }
  task->elects_signs = output.elects_signs;
  task->divides = output.divides;
  task->has_sole_weights = output.has_sole_weights;
  task->least_share = output.least_share;
  task->other_share = output.other_share;
  task->limit = output.limit;
  task->wide = false;
  for (int i = 0; i < int(kMaxInputs); ++i)
    task->wide = task->wide || (task->reads >> i & 1 && task->inputs.in[i] == DType::F64);
}

std::shared_ptr<Pending> run_one(Queue* queue, const ParsedPiece& piece) {
  const Rows rows = rows_of(piece);
  MaskedSumTask shared{};
  shared.inputs = table_of(piece);
  shared.numel = piece.numel;
  shared.first = piece.first;
  std::vector<MaskedSumTask> tasks(piece.out.size(), shared);
  Uploads uploads;
  for (size_t k = 0; k < tasks.size(); ++k) {
    const ParsedMaskedOutput& output = piece.step.outputs[k];
    add_terms(output, &tasks[k]);
    tasks[k].score = score_of(queue, output.score, rows, &uploads);
    tasks[k].to = output_of(piece, k);
  }
  auto pending = std::make_shared<SampledOutputs>(piece);
  if (piece.numel == 0) return pending;
  pending->prepare(queue);
  for (size_t k = 0; k < tasks.size(); ++k) {
    tasks[k].stats = pending->of(k);
    masked_sum(tasks[k], queue->stream());
    check_launch("masked_sum", queue->device());
  }
  pending->fetch(queue);
  return pending;
}

}  // namespace

const Kind kMaskedSum = {StepKind::kMaskedSum, run_each<run_one>};

}  // namespace cuda
}  // namespace fi
