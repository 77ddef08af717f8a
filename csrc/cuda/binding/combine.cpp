#include "../combine.h"

#include "pieces.h"
#include "prepared.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

class PendingSum : public Pending {
 public:
  explicit PendingSum(SumStats stats) : stats_(std::move(stats)) {}
  py::list stats() const override {
    py::list all;
    for (const RowStats& row : stats_.rows()) all.append(as_dict(row));
    return all;
  }

 private:
  const SumStats stats_;
};

Sum sum_of(const ParsedPiece& piece) {
  const bool stochastic = !piece.step.keys.empty();
  Sum sum{piece.x,           piece.in,    {},         piece.step.out_dtype, stochastic, piece.fp8_saturate,
          piece.stats_every, piece.numel, piece.first};
  for (size_t k = 0; k < piece.out.size(); ++k) {
    const ParsedRow& row = piece.step.rows[k];
    SumRow added{row.pivot, row.total, {}, piece.out[k], stochastic ? piece.step.keys[k] : 0};
    for (const Term& term : row.terms) added.terms.push_back({term.input, term.weight});
    sum.rows.push_back(std::move(added));
  }
  return sum;
}

Pendings run(Queue* queue, const Pieces& pieces) {
  std::vector<Sum> sums;
  for (const ParsedPiece& piece : pieces) sums.push_back(sum_of(piece));
  std::vector<SumStats> stats = combine(queue, sums);
  Pendings pendings;
  for (SumStats& s : stats) pendings.push_back(std::make_shared<PendingSum>(std::move(s)));
  return pendings;
}

}  // namespace

const Kind kCombine = {StepKind::kCombine, run};

PreparedSums::PreparedSums(const py::iterable& pieces) {
  for (const py::handle object : pieces) {
    const ParsedPiece piece = parse_piece(object);
    if (piece.step.kind != StepKind::kCombine || piece.out.size() != 1 || piece.stats_every)
      throw py::value_error("sums of one output each, without statistics, can be prepared");
    if (!sums_.empty() && sums_[0].x.size() != piece.x.size())
      throw py::value_error("sums that are prepared together need equally many inputs");
    sums_.push_back(sum_of(piece));
  }
}

void PreparedSums::run(Queue* queue, const py::handle& row) {
  if (sums_.empty()) return;
  const ParsedRow parsed = parse_row(row, sums_[0].x.size());
  const py::gil_scoped_release release;
  const OnDevice on(queue->device());
  const std::lock_guard<std::mutex> lock(mutex_);
  for (Sum& sum : sums_) {
    SumRow& own = sum.rows[0];
    own.pivot = parsed.pivot;
    own.total = parsed.total;
    own.terms.assign(parsed.terms.begin(), parsed.terms.end());
  }
  combine(queue, sums_);
}

}  // namespace cuda
}  // namespace fi
