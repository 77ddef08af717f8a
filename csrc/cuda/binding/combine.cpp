#include "../combine.h"

#include "pieces.h"

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
  std::vector<SumStats> stats;
  {
    const py::gil_scoped_release release;
    stats = combine(queue, sums);
  }
  Pendings pendings;
  for (SumStats& s : stats) pendings.push_back(std::make_shared<PendingSum>(std::move(s)));
  return pendings;
}

}  // namespace

const Kind kCombine = {StepKind::kCombine, run};

}  // namespace cuda
}  // namespace fi
