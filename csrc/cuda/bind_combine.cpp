#include "bind_pieces.h"
#include "combine.h"

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

using PyRow = std::tuple<int, double, std::vector<std::pair<int, double>>>;  // pivot, total, (input, weight)

Sum sum_of(const py::dict& piece) {
  const Operands operands = operands_of(piece);
  const Outputs outputs = outputs_of(piece);
  Sum sum{operands.x,          operands.in,           {},
          outputs.out_dtype,   !outputs.keys.empty(), outputs.fp8_saturate,
          outputs.stats_every, operands.numel,        operands.first};
  const auto check = [&](int i) {
    if (i < 0 || size_t(i) >= sum.x.size()) throw py::value_error("a row names none of the inputs");
    return i;
  };
  for (const auto& [pivot, total, terms] : get<std::vector<PyRow>>(piece, "rows")) {
    const size_t r = sum.rows.size();
    if (r == outputs.out.size()) break;
    SumRow row{check(pivot), total, {}, outputs.out[r], sum.stochastic ? outputs.keys[r] : 0};
    for (const auto& [input, weight] : terms) row.terms.push_back({check(input), weight});
    sum.rows.push_back(std::move(row));
  }
  if (piece["rows"].cast<py::list>().size() != outputs.out.size())
    throw py::value_error("as many outputs as rows are needed");
  return sum;
}

Pendings run(Queue* queue, const Pieces& pieces) {
  std::vector<Sum> sums;
  for (const py::dict& piece : pieces) sums.push_back(sum_of(piece));
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

const Kind kCombine = {"combine", run};

}  // namespace cuda
}  // namespace fi
