// Pieces as Python gives them, what they answer, and the table of the kinds that have a kernel.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "../ops.h"
#include "runtime.h"

namespace fi {
namespace cuda {

// What a piece answers, once an event that was recorded after it has passed. See fastinterp/backends/device.py.
class Pending {
 public:
  virtual ~Pending() = default;
  virtual pybind11::object answer() const { return pybind11::none(); }
  virtual pybind11::list stats() const { return pybind11::list(); }
};

using Pieces = std::vector<pybind11::dict>;
using Pendings = std::vector<std::shared_ptr<Pending>>;

// A kind of piece. `run` is given one or more pieces of it, puts their work into the queue, and returns what each will
// answer. It holds the GIL, and lets go of it while it talks to CUDA.
struct Kind {
  const char* name;
  Pendings (*run)(Queue*, const Pieces&);
};

// One row per file bind_NAME.cpp; the table that lists them stands in bindings.cpp.
extern const Kind kCombine, kCombineRows, kCombineColumns, kHistogram, kKept, kMasked, kMeasure, kMeasureRows,
    kMeasureColumns, kMeasureDeltas, kMeasureDeltasRows, kMeasureDeltasColumns;

// ---- for the functions of kinds. All throw pybind11::value_error, or what a conversion throws. ----------------------

template <class T>
T get(const pybind11::dict& piece, const char* key) {
  if (!piece.contains(key)) throw pybind11::value_error(std::string("a piece lacks `") + key + "`");
  return piece[key].template cast<T>();
}

template <class T>
T get(const pybind11::dict& piece, const char* key, T otherwise) {
  return piece.contains(key) ? piece[key].template cast<T>() : otherwise;
}

DType dtype_of(int code);

// What every piece has.
struct Operands {
  std::vector<const void*> x;
  std::vector<DType> in;
  int64_t numel = 0, first = 0;
  bool wide = false;  // some input is F64
};
Operands operands_of(const pybind11::dict& piece);

// What every piece has that writes.
struct Outputs {
  std::vector<void*> out;
  DType out_dtype = DType::F32;
  std::vector<uint64_t> keys;  // one per output if rounding is stochastic, else none
  bool fp8_saturate = true;
  int stats_every = 0;
};
Outputs outputs_of(const pybind11::dict& piece);

// One entry per output, as `_C.Pump.stats` has it.
pybind11::dict as_dict(const RowStats& stats);

// A copy, as a memoryview of float64 ("d") or int64 ("q").
template <class T>
pybind11::object view_of(const T* values, size_t count, const char* format) {
  const pybind11::bytes bytes(reinterpret_cast<const char*>(values), count * sizeof(T));
  return pybind11::memoryview(bytes).attr("cast")(format);
}

}  // namespace cuda
}  // namespace fi
