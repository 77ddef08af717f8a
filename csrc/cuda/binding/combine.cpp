#include "../combine.h"

#include <map>

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

PreparedSums::PreparedSums(int device, std::shared_ptr<HostPool> pool, const py::iterable& pieces) {
  std::map<DType, std::vector<Sum>> tables;
  for (const py::handle object : pieces) {
    const ParsedPiece piece = parse_piece(object);
    if (piece.step.kind != StepKind::kCombine || piece.out.size() != 1 || piece.stats_every)
      throw py::value_error("sums of one output each, without statistics, can be prepared");
    if (!sums_.empty() && sums_[0].x.size() != piece.x.size())
      throw py::value_error("sums that are prepared together need equally many inputs");
    sums_.push_back(sum_of(piece));
    if (PreparedTable::takes(sums_.back()))
      tables[sums_.back().out_dtype].push_back(sums_.back());
    else
      rest_.push_back(sums_.back());
  }
  const py::gil_scoped_release release;
  const OnDevice on(device);
  for (const auto& [dtype, sums] : tables) tables_.push_back(std::make_unique<PreparedTable>(device, pool, sums));
}

void PreparedSums::run(Queue* queue, const py::handle& row) {
  if (sums_.empty()) return;
  const ParsedRow parsed = parse_row(row, sums_[0].x.size());
  SumRow told{parsed.pivot, parsed.total, {}, nullptr, 0};
  for (const Term& term : parsed.terms) told.terms.push_back({term.input, term.weight});
  const py::gil_scoped_release release;
  const OnDevice on(queue->device());
  const std::lock_guard<std::mutex> lock(mutex_);
  // A graph may live longer than the tables: its launches carry all that they need.
  const bool by_table = PreparedTable::takes(told) && !queue->capturing();
  std::vector<Sum>& others = by_table ? rest_ : sums_;
  for (Sum& sum : others) {
    SumRow& own = sum.rows[0];
    own.pivot = told.pivot;
    own.total = told.total;
    own.terms = told.terms;
  }
  if (by_table)
    for (const auto& table : tables_) table->run(queue, told);
  combine(queue, others);
}

}  // namespace cuda
}  // namespace fi
