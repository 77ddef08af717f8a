// Pieces parsed from Python objects (fastinterp/backends/device.py), their results, and the kinds that have a kernel.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "../../binding/parse.h"
#include "../runtime.h"

namespace fi {
namespace cuda {

// Elements [first, first + numel) of a step's tensor, whose operands are in the device's memory.
struct ParsedPiece {
  ParsedStep step;
  std::vector<const void*> x;
  std::vector<DType> in;
  int64_t numel = 0, first = 0;
  bool wide = false;       // some input is F64
  std::vector<void*> out;  // of the kinds that write
  bool fp8_saturate = true;
  int stats_every = 0;
};

// Throws pybind11::value_error, or the exception of a failed conversion.
ParsedPiece parse_piece(const pybind11::handle& piece);

// The length of a row, of which the piece has whole ones.
inline int64_t columns_of(const ParsedPiece& piece) { return fi::columns_of(piece.step, piece.numel); }

// The result of a piece, valid once an event that was recorded after it has passed. See fastinterp/backends/device.py.
class Pending {
 public:
  virtual ~Pending() = default;
  virtual pybind11::object answer() const { return pybind11::none(); }
  virtual pybind11::list stats() const { return pybind11::list(); }
};

using Pieces = std::vector<ParsedPiece>;
using Pendings = std::vector<std::shared_ptr<Pending>>;

// A kind of piece. `run` enqueues the work of one or more pieces of it, and returns the result of each. It is called
// without the GIL: calls of CUDA may wait, and copies of weights take their time.
struct Kind {
  StepKind kind;
  Pendings (*run)(Queue*, const Pieces&);
};

// One row per kind; the table that lists them stands in module.cpp.
extern const Kind kCombine, kGroupCombine, kHistogram, kMaskedStats, kMaskedSum, kMeasure;

// The `run` of a kind whose pieces are launched one by one.
template <std::shared_ptr<Pending> (*kRunOne)(Queue*, const ParsedPiece&)>
Pendings run_each(Queue* queue, const Pieces& pieces) {
  Pendings all;
  for (const ParsedPiece& piece : pieces) all.push_back(kRunOne(queue, piece));
  return all;
}

}  // namespace cuda
}  // namespace fi
