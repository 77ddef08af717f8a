#include "sums.h"

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

}  // namespace fi
