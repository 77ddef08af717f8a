// The extension module fastinterp._C: argument checks, the GIL, and conversions. No arithmetic.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "../cpu/backend.h"
#include "../decoder.h"
#include "../pump.h"
#include "../steps/histogram.h"
#include "parse.h"
#include "steps.h"
#include "sums.h"

namespace py = pybind11;

namespace {

using fi::Backend;
using fi::RowStats;

// From a PumpOptions of Python.
fi::PumpOptions options_of(const py::object& object) {
  fi::PumpOptions options;
  options.threads = object.attr("threads").cast<int>();
  options.write_bytes = object.attr("write_bytes").cast<int64_t>();
  options.read_bytes = object.attr("read_bytes").cast<int64_t>();
  options.stochastic = object.attr("stochastic").cast<bool>();
  options.fp8_saturate = object.attr("fp8_saturate").cast<bool>();
  options.prefetch = object.attr("prefetch").cast<bool>();
  options.ahead = object.attr("ahead").cast<int>();
  options.stats_every = object.attr("stats_every").cast<int>();
  if (options.threads < 1) throw py::value_error("at least one thread is needed");
  if (options.write_bytes < 4096 || options.read_bytes < 4096)
    throw py::value_error("reads and writes must have at least 4096 bytes");
  return options;
}

std::unique_ptr<fi::Pump> make_pump(const py::sequence& py_sources, const py::sequence& py_sinks,
                                    const py::sequence& py_steps, const py::object& py_options) {
  const fi::PumpOptions options = options_of(py_options);
  const Backend& chosen = fi::backend_named(py_options.attr("isa").cast<std::string>());
  std::vector<fi::Source> sources = fi::handles_of<fi::Source>(py_sources);
  std::vector<fi::Sink> sinks = fi::handles_of<fi::Sink>(py_sinks);
  std::vector<fi::Step> steps;
  for (const py::handle step : py_steps)
    steps.push_back(fi::step_of(step, chosen, sources.size(), sinks.size(), options.stochastic));
  return std::make_unique<fi::Pump>(std::move(sources), std::move(sinks), std::move(steps), options);
}

void register_decoder(const std::string& name, uintptr_t decode, int64_t block_elements, int64_t block_bytes) {
  if (name.empty() || decode == 0 ||
      !fi::register_decoder(
          {name.c_str(), block_elements, block_bytes, reinterpret_cast<void (*)(const fi::DecodeArgs&)>(decode)}))
    throw py::value_error("a decoder has a name, a function, and blocks of 1 to " + std::to_string(fi::kChunk) +
                          " elements, of 1 to 16 bytes each");
}

// The pump's error, for the caller to translate: ("read" | "write", handle, errno, offset, expected, done),
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
    for (const RowStats& s : rows) of_step.append(fi::as_dict(s));
    steps.append(of_step);
  }
  return steps;
}

// Per step the result of its survey, or None.
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
  m.attr("LANES") = fi::kLanes;
  m.attr("BLOCK_ROWS") = fi::kBlockRows;
  py::list widths;
  for (int code = 0; code < fi::kDTypes; ++code) widths.append(fi::size_of(fi::DType(code)));
  m.attr("DTYPE_BYTES") = py::tuple(widths);

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

  m.def("register_decoder", &register_decoder, py::arg("name"), py::arg("decode"), py::arg("block_elements"),
        py::arg("block_bytes"),
        "Add a decoder, or replace one that was added: the address of a function as csrc/decoder.h has it.");

  fi::bind_answers(m);
  fi::bind_range_cache(m);
  fi::bind_files(m);
  fi::bind_sums(m);
  fi::bind_plain_sums(m);
  py::class_<fi::Pump>(m, "Pump", "Reads, combines and writes steps on its own threads.")
      .def(py::init(&make_pump), py::arg("sources"), py::arg("sinks"), py::arg("steps"), py::arg("options"))
      .def("start", &fi::Pump::start)
      .def("wait", &fi::Pump::wait, py::arg("seconds"), py::call_guard<py::gil_scoped_release>(),
           "True when all threads have ended.")
      .def("cancel", &fi::Pump::cancel)
      .def("join", &fi::Pump::join, py::call_guard<py::gil_scoped_release>())
      .def("error", &error_of)
      .def("stats", &stats_of)
      .def("answers", &answers_of,
           "Per step None if it writes, else the result of its survey: float64 and int64 memoryviews. Of measure: the "
           "upper "
           "triangle of the Gram matrix, then L1 norms; counts of nonzero elements.")
      .def_property_readonly("bytes_read", &fi::Pump::bytes_read)
      .def_property_readonly("bytes_written", &fi::Pump::bytes_written)
      .def_property_readonly("scratch_bytes", &fi::Pump::scratch_bytes);
}
