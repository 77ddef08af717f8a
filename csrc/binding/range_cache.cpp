// RangeCache and RemoteSource for Python.

#include "../range_cache.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "steps.h"

namespace py = pybind11;

namespace fi {

namespace {

std::unique_ptr<RangeCache> make_cache(const std::vector<int64_t>& sizes, int64_t cell_bytes, int64_t most) {
  if (cell_bytes < 4096 || most < 0) throw py::value_error("cells have at least 4096 bytes");
  return std::make_unique<RangeCache>(sizes, cell_bytes, most);
}

py::object take(RangeCache& cache, double seconds) {
  RangeCache::Claim claim{};
  {
    const py::gil_scoped_release release;
    if (!cache.take(seconds, &claim)) return py::none();
  }
  return py::make_tuple(claim.file, claim.offset, py::memoryview::from_memory(claim.to, py::ssize_t(claim.bytes)));
}

}  // namespace

void bind_range_cache(py::module_& m) {
  py::class_<RangeCache, std::shared_ptr<RangeCache>>(m, "RangeCache", "Files elsewhere, as far as they are in memory.")
      .def(py::init(&make_cache), py::arg("sizes"), py::arg("cell_bytes"), py::arg("most"))
      .def("take", &take, py::arg("seconds"),
           "(file, offset, memory to fill) of a cell that is wanted; None, if there is none in this time.")
      .def("filled", &RangeCache::filled, py::arg("file"), py::arg("offset"), py::call_guard<py::gil_scoped_release>())
      .def("fail", &RangeCache::fail, py::arg("file"), py::call_guard<py::gil_scoped_release>())
      .def("stop", &RangeCache::stop, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("stopped", &RangeCache::stopped)
      .def_property_readonly("fetched", &RangeCache::fetched);
  py::class_<RemoteSource>(m, "RemoteSource", "A file of a RangeCache, as a source of a Pump.")
      .def(py::init([](std::shared_ptr<RangeCache> cache, int file) { return RemoteSource{std::move(cache), file}; }),
           py::arg("cache"), py::arg("file"));
}

}  // namespace fi
