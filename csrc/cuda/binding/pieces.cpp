#include "pieces.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

ParsedPiece parse_piece(const py::handle& object) {
  ParsedPiece piece;
  piece.step = parse_step(object.attr("step"));
  for (const ParsedOperand& operand : piece.step.inputs) {
    if (!operand.decoder.name.empty() || !operand.decoders.empty() || !operand.low_rank.changes.empty())
      throw py::value_error("no kernel here reads encoded inputs");
    piece.in.push_back(operand.dtype);
    piece.wide = piece.wide || operand.dtype == DType::F64;
  }
  for (const uintptr_t address : object.attr("inputs").cast<std::vector<uintptr_t>>())
    piece.x.push_back(reinterpret_cast<const void*>(address));
  for (const uintptr_t address : object.attr("outputs").cast<std::vector<uintptr_t>>())
    piece.out.push_back(reinterpret_cast<void*>(address));
  if (piece.x.size() != piece.in.size()) throw py::value_error("a piece needs an address per input");
  if (piece.out.size() != piece.step.sinks.size()) throw py::value_error("a piece needs an address per output");
  piece.numel = object.attr("numel").cast<int64_t>();
  piece.first = object.attr("first").cast<int64_t>();
  if (piece.numel < 0 || piece.first < 0) throw py::value_error("numel and first must not be negative");
  piece.fp8_saturate = object.attr("fp8_saturate").cast<bool>();
  piece.stats_every = object.attr("stats_every").cast<int>();
  return piece;
}

}  // namespace cuda
}  // namespace fi
