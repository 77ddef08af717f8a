// The extension module fastinterp._C: argument checks, the GIL, and conversions. No arithmetic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cpu/backend.h"
#include "memory.h"
#include "pump.h"

namespace py = pybind11;

namespace {

using fi::Backend;
using fi::DType;
using fi::Row;
using fi::RowStats;
using fi::Term;

using PyTerms = std::vector<std::pair<int, double>>;
using PyRow = std::tuple<int, double, PyTerms>;

const Backend& backend(const std::string& isa) {
  if (isa.empty()) return fi::best_backend();
  const Backend* found = fi::find_backend(isa.c_str());
  if (!found) throw py::value_error("no such instruction set in this build: " + isa);
  if (!found->usable()) throw py::value_error("this processor cannot run " + isa);
  return *found;
}

DType dtype(int code) {
  if (code < 0 || code >= fi::kDTypes) throw py::value_error("no dtype has code " + std::to_string(code));
  return DType(code);
}

std::vector<DType> dtypes(const std::vector<int>& codes) {
  std::vector<DType> all;
  for (const int code : codes) all.push_back(dtype(code));
  return all;
}

void check_count(size_t count, int most, const char* what) {
  if (count < 1 || count > size_t(most))
    throw py::value_error(std::string("expected 1 to ") + std::to_string(most) + " " + what + ", got " +
                          std::to_string(count));
}

void check_row(const PyRow& row, size_t inputs) {
  const auto bad = [&](int i) { return i < 0 || size_t(i) >= inputs; };
  if (bad(std::get<0>(row))) throw py::value_error("a row's pivot is none of the inputs");
  for (const auto& [input, weight] : std::get<2>(row))
    if (bad(input)) throw py::value_error("a row's term is none of the inputs");
}

std::vector<Term> terms_of(const PyRow& row) {
  std::vector<Term> terms;
  for (const auto& [input, weight] : std::get<2>(row)) terms.push_back({input, weight});
  return terms;
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

std::vector<py::dict> combine(const std::vector<uintptr_t>& inputs, const std::vector<int>& in_dtypes,
                              const std::vector<PyRow>& py_rows, const std::vector<uintptr_t>& outputs, int out_dtype,
                              int64_t numel, int64_t first, bool stochastic, const std::vector<uint64_t>& keys,
                              bool fp8_saturate, int stats_every, int threads, const std::string& isa) {
  check_count(inputs.size(), fi::kMaxInputs, "inputs");
  check_count(py_rows.size(), fi::kMaxOutputs, "rows");
  if (in_dtypes.size() != inputs.size()) throw py::value_error("as many dtypes as inputs are needed");
  if (outputs.size() != py_rows.size()) throw py::value_error("as many outputs as rows are needed");
  if (stochastic && keys.size() != py_rows.size()) throw py::value_error("stochastic rounding needs a key per row");
  if (numel < 0 || first < 0) throw py::value_error("numel and first must not be negative");
  std::vector<std::vector<Term>> terms;
  std::vector<Row> rows;
  for (const PyRow& row : py_rows) {
    check_row(row, inputs.size());
    terms.push_back(terms_of(row));
    rows.push_back({std::get<0>(row), int(terms.back().size()), std::get<1>(row), terms.back().data()});
  }
  const std::vector<DType> in = dtypes(in_dtypes);
  fi::CombineArgs args{};
  args.in = in.data();
  args.rows = rows.data();
  args.keys = keys.data();
  args.n = int(in.size());
  args.k = int(rows.size());
  args.out_dtype = dtype(out_dtype);
  args.stochastic = stochastic;
  args.fp8_saturate = fp8_saturate;
  args.stats_every = stats_every;
  args.first = first;
  args.numel = numel;
  const Backend& chosen = backend(isa);
  std::vector<RowStats> stats;
  {
    const py::gil_scoped_release release;
    stats = fi::combine_in_memory(chosen, inputs, outputs, args, threads);
  }
  std::vector<py::dict> dicts;
  for (const RowStats& s : stats) dicts.push_back(as_dict(s));
  return dicts;
}

// (source, offset, dtype code)
using PyOperand = std::tuple<int, int64_t, int>;
// (kind, operands, rows, sinks, offsets, out dtype code, numel, keys), with kind "combine", "same", "measure" or
// "measure_deltas"
using PyStep = std::tuple<std::string, std::vector<PyOperand>, std::vector<PyRow>, std::vector<int>,
                          std::vector<int64_t>, int, int64_t, std::vector<uint64_t>>;

fi::Step step_of(const PyStep& py_step, size_t sources, size_t sinks, bool stochastic) {
  const auto& [kind, operands, rows, places, offsets, out_dtype, numel, keys] = py_step;
  fi::Step step;
  const bool combines = kind == "combine", same = kind == "same";
  step.deltas = kind == "measure_deltas";
  if (!combines && !same && !step.deltas && kind != "measure") throw py::value_error("no such kind of step: " + kind);
  step.kind = combines ? fi::Step::kCombine : same ? fi::Step::kSame : fi::Step::kMeasure;
  check_count(operands.size(), fi::kMaxInputs, "inputs");
  if (combines || same) check_count(places.size(), fi::kMaxOutputs, "outputs");
  if (offsets.size() != places.size()) throw py::value_error("as many offsets as sinks are needed");
  if (combines && rows.size() != places.size()) throw py::value_error("as many sinks as rows are needed");
  if (combines && stochastic && keys.size() != rows.size()) throw py::value_error("a key per row is needed");
  if (!combines && !rows.empty()) throw py::value_error("only a combine has rows");
  for (const auto& [source, at, code] : operands) {
    if (source < 0 || size_t(source) >= sources) throw py::value_error("an operand's source is none of the sources");
    step.inputs.push_back({source, at, same ? DType::F32 : dtype(code)});
  }
  for (const int sink : places)
    if (sink < 0 || size_t(sink) >= sinks) throw py::value_error("a step's sink is none of the sinks");
  for (const PyRow& row : rows) {
    check_row(row, operands.size());
    step.terms.push_back(terms_of(row));
    step.rows.push_back({std::get<0>(row), 0, std::get<1>(row), nullptr});
  }
  step.sinks = places;
  step.offsets = offsets;
  step.out_dtype = combines ? dtype(out_dtype) : DType::F32;
  step.numel = numel;
  step.keys = keys;
  return step;
}

std::unique_ptr<fi::Pump> make_pump(const std::string& isa, const std::vector<int>& source_fds,
                                    const std::vector<int>& sink_fds, const std::vector<PyStep>& py_steps, int threads,
                                    int64_t write_bytes, int64_t read_bytes, bool stochastic, bool fp8_saturate,
                                    bool prefetch, int stats_every) {
  if (threads < 1) throw py::value_error("at least one thread is needed");
  if (write_bytes < 4096 || read_bytes < 4096) throw py::value_error("reads and writes must have at least 4096 bytes");
  std::vector<fi::Source> sources;
  for (const int fd : source_fds) sources.emplace_back(int(sources.size()), fd);
  std::vector<fi::Sink> sinks;
  for (const int fd : sink_fds) sinks.emplace_back(int(sinks.size()), fd);
  std::vector<fi::Step> steps;
  for (const PyStep& s : py_steps) steps.push_back(step_of(s, sources.size(), sinks.size(), stochastic));
  fi::PumpOptions options;
  options.threads = threads;
  options.write_bytes = write_bytes;
  options.read_bytes = read_bytes;
  options.stochastic = stochastic;
  options.fp8_saturate = fp8_saturate;
  options.prefetch = prefetch;
  options.stats_every = stats_every;
  return std::make_unique<fi::Pump>(backend(isa), std::move(sources), std::move(sinks), std::move(steps), options);
}

// What went wrong, for the caller to put into words: ("read" | "write", handle, errno, offset, expected, done),
// ("differs", step, input), ("other", text), or None.
py::object error_of(const fi::Pump& pump) {
  if (!pump.error()) return py::none();
  try {
    std::rethrow_exception(pump.error());
  } catch (const fi::IoError& e) {
    return py::make_tuple(e.write ? "write" : "read", e.handle, e.error, e.offset, e.expected, e.done);
  } catch (const fi::Differs& e) {
    return py::make_tuple("differs", e.step, e.input);
  } catch (const std::exception& e) {
    return py::make_tuple("other", e.what());
  }
}

py::list stats_of(const fi::Pump& pump) {
  py::list steps;
  for (const std::vector<RowStats>& rows : pump.stats()) {
    py::list of_step;
    for (const RowStats& s : rows) of_step.append(as_dict(s));
    steps.append(of_step);
  }
  return steps;
}

py::list measured_of(const fi::Pump& pump) {
  py::list steps;
  for (const fi::Measured& m : pump.measured()) steps.append(py::make_tuple(m.sums, m.nonzero));
  return steps;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastinterp's native kernels and the pump that feeds them.";
  m.attr("MAX_INPUTS") = fi::kMaxInputs;
  m.attr("MAX_OUTPUTS") = fi::kMaxOutputs;
  m.attr("CHUNK") = fi::kChunk;

  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < fi::backend_count(); ++i)
          if (fi::backend_at(i).usable()) names.emplace_back(fi::backend_at(i).name);
        return names;
      },
      "Instruction sets that this machine can run, best first.");
  m.def(
      "built_isas",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i < fi::backend_count(); ++i) names.emplace_back(fi::backend_at(i).name);
        return names;
      },
      "Instruction sets in this build, best first.");

  m.def("combine", &combine, py::arg("inputs"), py::arg("in_dtypes"), py::arg("rows"), py::arg("outputs"),
        py::arg("out_dtype"), py::arg("numel"), py::kw_only(), py::arg("first") = 0, py::arg("stochastic") = false,
        py::arg("keys") = std::vector<uint64_t>{}, py::arg("fp8_saturate") = true, py::arg("stats_every") = 32,
        py::arg("threads") = 1, py::arg("isa") = "",
        "Weighted sums of arrays in memory, given by address. The caller answers for the addresses.");

  m.def(
      "reserve",
      [](int fd, int64_t size) {
        const int code = fi::reserve(fd, size);
        if (code != 0) {
          errno = code;
          PyErr_SetFromErrno(PyExc_OSError);
          throw py::error_already_set();
        }
      },
      py::arg("fd"), py::arg("size"), "Reserve the bytes of an output file. Raises: OSError, if the disk is full.");
  m.def("cached_fraction", &fi::cached_fraction, py::arg("fd"), py::arg("size"),
        "Fraction of a file in the page cache, from 64 sampled pages; -1 if unknown.");

  py::class_<fi::Pump>(m, "Pump", "Reads, combines and writes steps on threads of its own.")
      .def(py::init(&make_pump), py::arg("isa"), py::arg("sources"), py::arg("sinks"), py::arg("steps"), py::kw_only(),
           py::arg("threads"), py::arg("write_bytes"), py::arg("read_bytes"), py::arg("stochastic"),
           py::arg("fp8_saturate"), py::arg("prefetch"), py::arg("stats_every"))
      .def("start", &fi::Pump::start)
      .def("wait", &fi::Pump::wait, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
           "True when all threads have ended.")
      .def("cancel", &fi::Pump::cancel)
      .def("join", &fi::Pump::join, py::call_guard<py::gil_scoped_release>())
      .def("error", &error_of)
      .def("stats", &stats_of)
      .def("measured", &measured_of,
           "Per step: sums (upper triangle of the Gram matrix, then L1 norms) and counts of nonzero elements.")
      .def_property_readonly("bytes_read", &fi::Pump::bytes_read)
      .def_property_readonly("bytes_written", &fi::Pump::bytes_written)
      .def_property_readonly("scratch_bytes", &fi::Pump::scratch_bytes);
}
