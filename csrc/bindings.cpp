// The extension module fastinterp._C: argument checks, the GIL, and conversions. No arithmetic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bind_steps.h"
#include "cpu/backend.h"
#include "histogram.h"
#include "memory.h"
#include "pump.h"

namespace py = pybind11;

namespace {

using fi::Backend;
using fi::DType;
using fi::PyRow;
using fi::Row;
using fi::RowStats;
using fi::Term;

const Backend& backend(const std::string& isa) {
  if (isa.empty()) return fi::best_backend();
  const Backend* found = fi::find_backend(isa.c_str());
  if (!found) throw py::value_error("no such instruction set in this build: " + isa);
  if (!found->usable()) throw py::value_error("this processor cannot run " + isa);
  return *found;
}

std::vector<DType> dtypes(const std::vector<int>& codes) {
  std::vector<DType> all;
  for (const int code : codes) all.push_back(fi::dtype_of(code));
  return all;
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
                              bool fp8_saturate, int stats_every, int threads, const std::string& isa,
                              std::optional<bool> streamed) {
  fi::check_count(inputs.size(), fi::kMaxInputs, "inputs");
  fi::check_count(py_rows.size(), fi::kMaxOutputs, "rows");
  if (in_dtypes.size() != inputs.size()) throw py::value_error("as many dtypes as inputs are needed");
  if (outputs.size() != py_rows.size()) throw py::value_error("as many outputs as rows are needed");
  if (stochastic && keys.size() != py_rows.size()) throw py::value_error("stochastic rounding needs a key per row");
  if (numel < 0 || first < 0) throw py::value_error("numel and first must not be negative");
  std::vector<std::vector<Term>> terms;
  std::vector<Row> rows;
  for (const PyRow& row : py_rows) {
    fi::check_row(row, inputs.size());
    terms.push_back(fi::terms_of(row));
    rows.push_back({std::get<0>(row), int(terms.back().size()), std::get<1>(row), terms.back().data()});
  }
  const std::vector<DType> in = dtypes(in_dtypes);
  fi::CombineArgs args{};
  args.in = in.data();
  args.rows = rows.data();
  args.keys = keys.data();
  args.n = int(in.size());
  args.k = int(rows.size());
  args.out_dtype = fi::dtype_of(out_dtype);
  args.stochastic = stochastic;
  args.fp8_saturate = fp8_saturate;
  args.stats_every = stats_every;
  args.first = first;
  args.numel = numel;
  args.streamed = streamed.value_or(fi::worth_streaming(int64_t(outputs.size()) * numel * fi::size_of(args.out_dtype)));
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

std::unique_ptr<fi::Pump> make_pump(const std::string& isa, const py::list& py_sources, const py::list& py_sinks,
                                    const py::list& py_steps, int threads, int64_t write_bytes, int64_t read_bytes,
                                    bool stochastic, bool fp8_saturate, bool prefetch, int stats_every) {
  if (threads < 1) throw py::value_error("at least one thread is needed");
  if (write_bytes < 4096 || read_bytes < 4096) throw py::value_error("reads and writes must have at least 4096 bytes");
  const Backend& chosen = backend(isa);
  std::vector<fi::Source> sources = fi::handles_of<fi::Source>(py_sources);
  std::vector<fi::Sink> sinks = fi::handles_of<fi::Sink>(py_sinks);
  std::vector<fi::Step> steps;
  for (const py::handle s : py_steps)
    steps.push_back(fi::step_of(s.cast<py::dict>(), chosen, sources.size(), sinks.size(), stochastic));
  fi::PumpOptions options;
  options.threads = threads;
  options.write_bytes = write_bytes;
  options.read_bytes = read_bytes;
  options.stochastic = stochastic;
  options.fp8_saturate = fp8_saturate;
  options.prefetch = prefetch;
  options.stats_every = stats_every;
  return std::make_unique<fi::Pump>(std::move(sources), std::move(sinks), std::move(steps), options);
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

// Per step what its survey found, or None.
py::list answers_of(const fi::Pump& pump) {
  py::list answers;
  for (const fi::Step& step : pump.steps())
    answers.append(step.survey ? fi::answer_of(step.survey->answer()) : py::none());
  return answers;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastinterp's native kernels and the pump that feeds them.";
  m.attr("MAX_INPUTS") = fi::kMaxInputs;
  m.attr("MAX_OUTPUTS") = fi::kMaxOutputs;
  m.attr("CHUNK") = fi::kChunk;
  m.attr("STRIP") = fi::kStrip;

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

  m.def(
      "combine", &combine, py::arg("inputs"), py::arg("in_dtypes"), py::arg("rows"), py::arg("outputs"),
      py::arg("out_dtype"), py::arg("numel"), py::kw_only(), py::arg("first") = 0, py::arg("stochastic") = false,
      py::arg("keys") = std::vector<uint64_t>{}, py::arg("fp8_saturate") = true, py::arg("stats_every") = 32,
      py::arg("threads") = 1, py::arg("isa") = "", py::arg("streamed") = py::none(),
      "Weighted sums of arrays in memory, given by address. The caller answers for the addresses. streamed: store the "
      "outputs around the caches; None decides by their size.");

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

  fi::bind_answers(m);
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
      .def("answers", &answers_of,
           "Per step None if it writes, else what it found: float64 and int64 memoryviews. Of measure: the upper "
           "triangle of the Gram matrix, then L1 norms; counts of nonzero elements.")
      .def_property_readonly("bytes_read", &fi::Pump::bytes_read)
      .def_property_readonly("bytes_written", &fi::Pump::bytes_written)
      .def_property_readonly("scratch_bytes", &fi::Pump::scratch_bytes);
}
