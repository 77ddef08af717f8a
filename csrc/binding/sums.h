// Weighted sums of arrays of Python in memory.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "../cpu/backend.h"
#include "parse.h"

namespace fi {

// A row of Python (fastinterp/ops/combine.py), parsed once for many sums of so many inputs.
class SumRow {
 public:
  // Throws pybind11::value_error.
  SumRow(const pybind11::handle& row, size_t inputs) : parsed_(parse_row(row, inputs)), inputs_(inputs) {}
  size_t inputs() const { return inputs_; }
  // Valid while this lives.
  Row row() const { return {parsed_.pivot, int(parsed_.terms.size()), parsed_.total, parsed_.terms.data()}; }

 private:
  ParsedRow parsed_;
  size_t inputs_;
};

// The backend of an instruction set; of none, the best of this machine. Throws pybind11::value_error.
const Backend& backend_named(const std::string& isa);

// Binds combine, SumRow and PreparedSums.
void bind_sums(pybind11::module_& m);
// Binds PlainSums: sums of small arrays at the cost of a call.
void bind_plain_sums(pybind11::module_& m);

}  // namespace fi
