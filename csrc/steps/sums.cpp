#include "sums.h"

#include <algorithm>

namespace fi {

PlainSum::PlainSum(const Backend& backend, std::vector<Row> rows, std::vector<std::vector<Term>> terms)
    : backend_(backend), rows_(std::move(rows)), terms_(std::move(terms)) {
  for (size_t k = 0; k < rows_.size(); ++k) {
    rows_[k].terms = terms_[k].data();
    rows_[k].n_terms = int(terms_[k].size());
  }
}

void PlainSum::run(const CombineArgs& args, char*) const {
  CombineArgs with_rows = args;
  with_rows.rows = rows_.data();
  backend_.combine(with_rows);
}

GroupSum::GroupSum(const Backend& backend, std::vector<Output> outputs, bool per_row, int64_t columns, int64_t groups)
    : backend_(backend), outputs_(std::move(outputs)), per_row_(per_row), columns_(columns), groups_(groups) {
  for (Output& output : outputs_) {
    const size_t terms = output.inputs.size(), count = output.totals.size();
    std::vector<double> by_term(output.weights.size());
    for (size_t g = 0; g < count; ++g)
      for (size_t t = 0; t < terms; ++t) by_term[t * count + g] = output.weights[g * terms + t];
    output.weights = std::move(by_term);
    const bool ones = std::all_of(output.totals.begin(), output.totals.end(), [](double t) { return t == 1.0; });
    rows_.push_back(
        {output.pivot, int(terms), output.inputs.data(), ones ? nullptr : output.totals.data(), output.weights.data()});
  }
}

void GroupSum::run(const CombineArgs& args, char*) const {
  backend_.combine_groups({args, rows_.data(), columns_, groups_, per_row_});
}

}  // namespace fi
