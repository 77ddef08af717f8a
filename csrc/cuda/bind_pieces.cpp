#include "bind_pieces.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

DType dtype_of(int code) {
  if (code < 0 || code >= kDTypes) throw py::value_error("no dtype has code " + std::to_string(code));
  return DType(code);
}

Operands operands_of(const py::dict& piece) {
  Operands operands;
  for (const auto& [address, code] : get<std::vector<std::pair<uintptr_t, int>>>(piece, "inputs")) {
    operands.x.push_back(reinterpret_cast<const void*>(address));
    operands.in.push_back(dtype_of(code));
    operands.wide = operands.wide || operands.in.back() == DType::F64;
  }
  if (operands.x.empty() || operands.x.size() > size_t(kMaxInputs))
    throw py::value_error("a piece has 1 to " + std::to_string(kMaxInputs) + " inputs, got " +
                          std::to_string(operands.x.size()));
  operands.numel = get<int64_t>(piece, "numel");
  operands.first = get<int64_t>(piece, "first", 0);
  if (operands.numel < 0 || operands.first < 0) throw py::value_error("numel and first must not be negative");
  return operands;
}

Outputs outputs_of(const py::dict& piece) {
  Outputs outputs;
  for (const uintptr_t address : get<std::vector<uintptr_t>>(piece, "outputs"))
    outputs.out.push_back(reinterpret_cast<void*>(address));
  if (outputs.out.empty() || outputs.out.size() > size_t(kMaxOutputs))
    throw py::value_error("a piece that writes has 1 to " + std::to_string(kMaxOutputs) + " outputs, got " +
                          std::to_string(outputs.out.size()));
  outputs.out_dtype = dtype_of(get<int>(piece, "out_dtype"));
  outputs.keys = get<std::vector<uint64_t>>(piece, "keys", {});
  if (!outputs.keys.empty() && outputs.keys.size() != outputs.out.size())
    throw py::value_error("stochastic rounding needs a key per output");
  outputs.fp8_saturate = get<bool>(piece, "fp8_saturate", true);
  outputs.stats_every = get<int>(piece, "stats_every", 0);
  return outputs;
}

py::dict as_dict(const RowStats& s) {
  py::dict d;
  d["nan_in"] = s.nan_in;
  d["inf_in"] = s.inf_in;
  d["nan_out"] = s.nan_out;
  d["inf_out"] = s.inf_out;
  d["sampled"] = s.sampled;
  d["changed"] = s.changed;
  d["sum_pp"] = s.sum_pp;
  d["sum_dd"] = s.sum_dd;
  d["sum_od"] = s.sum_od;
  return d;
}

}  // namespace cuda
}  // namespace fi
