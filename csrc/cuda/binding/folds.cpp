#include "folds.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

class Sums : public Pending {
 public:
  Sums(std::shared_ptr<const char> held, int64_t groups, int64_t reals, int64_t counts)
      : held_(std::move(held)), groups_(groups), reals_(reals), counts_(counts) {}

  py::object answer() const override {
    std::vector<double> reals(size_t(groups_ * reals_));
    std::vector<int64_t> counts(size_t(groups_ * counts_));
    const double* from = reinterpret_cast<const double*>(held_.get());
    for (int64_t g = 0; g < groups_ && held_; ++g) {
      for (int64_t i = 0; i < reals_; ++i) reals[size_t(g * reals_ + i)] = *from++;
      for (int64_t i = 0; i < counts_; ++i) counts[size_t(g * counts_ + i)] = int64_t(*from++);
    }
    return py::make_tuple(view_of(reals.data(), reals.size(), "d"), view_of(counts.data(), counts.size(), "q"));
  }

 private:
  const std::shared_ptr<const char> held_;  // null: all are 0
  const int64_t groups_, reals_, counts_;
};

}  // namespace

InputTable table_of(const ParsedPiece& piece) {
  InputTable table{};
  for (size_t i = 0; i < piece.x.size(); ++i) {
    table.x[i] = piece.x[i];
    table.in[i] = piece.in[i];
  }
  return table;
}

std::shared_ptr<Pending> no_sums(int64_t groups, int64_t reals, int64_t counts) {
  return std::make_shared<Sums>(nullptr, groups, reals, counts);
}

std::shared_ptr<Pending> fetched_sums(Queue* queue, const double* totals, int64_t groups, int64_t reals,
                                      int64_t counts) {
  const int64_t bytes = groups * (reals + counts) * int64_t(sizeof(double));
  return std::make_shared<Sums>(queue->fetch(totals, bytes), groups, reals, counts);
}

std::shared_ptr<Pending> folded(Queue* queue, const FoldTask& parts, int64_t groups, int64_t reals, int64_t counts,
                                const char* kernel, const std::function<void(double*)>& fill) {
  const int64_t parts_size = parts.rows * parts.count * parts.width;
  const Scratch scratch(queue, (parts_size + fold_scratch(parts)) * int64_t(sizeof(double)), "sums");
  double* const sums = static_cast<double*>(scratch.at());
  fill(sums);
  check_launch(kernel, queue->device());
  const double* const totals = fold_parts(parts, sums, sums + parts_size, queue->stream());
  check_launch("fold", queue->device());
  return fetched_sums(queue, totals, groups, reals, counts);
}

}  // namespace cuda
}  // namespace fi
