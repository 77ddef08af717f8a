// The extension module fastinterp._cuda: devices, memory, queues and events for Python, and the kinds of pieces that
// have kernels. No arithmetic.

#include <optional>

#include "pieces.h"
#include "prepared.h"

namespace py = pybind11;

namespace {

using fi::cuda::Buffer;
using fi::cuda::Event;
using fi::cuda::Kind;
using fi::cuda::Pending;
using fi::cuda::PreparedSums;
using fi::cuda::Queue;

const Kind* const kKinds[] = {&fi::cuda::kCombine,     &fi::cuda::kGroupCombine, &fi::cuda::kHistogram,
                              &fi::cuda::kMaskedStats, &fi::cuda::kMaskedSum,    &fi::cuda::kMeasure};

const Kind& kind_of(fi::StepKind wanted) {
  for (const Kind* kind : kKinds)
    if (kind->kind == wanted) return *kind;
  throw py::value_error(std::string("no kernel here for pieces of kind ") + fi::name_of(wanted));
}

// Pieces of one kind that stand next to each other are one call.
fi::cuda::Pendings run(Queue* queue, const py::iterable& pieces) {
  fi::cuda::Pendings all;
  fi::cuda::Pieces some;
  const auto flush = [&] {
    if (some.empty()) return;
    const Kind& kind = kind_of(some[0].step.kind);
    const fi::cuda::Pendings pending = [&] {
      const py::gil_scoped_release release;
      const fi::cuda::OnDevice on(queue->device());
      return kind.run(queue, some);
    }();
    all.insert(all.end(), pending.begin(), pending.end());
    some.clear();
  };
  for (const py::handle piece : pieces) {
    fi::cuda::ParsedPiece parsed = fi::cuda::parse_piece(piece);
    if (!some.empty() && some[0].step.kind != parsed.step.kind) flush();
    some.push_back(std::move(parsed));
  }
  flush();
  return all;
}

py::buffer_info bytes_of(Buffer& buffer) {
  return py::buffer_info(reinterpret_cast<uint8_t*>(buffer.address()), buffer.bytes());
}

py::memoryview view_of(const py::object& self) {
  const Buffer& buffer = self.cast<const Buffer&>();
  if (!buffer.host()) throw py::value_error("only memory of the host can be seen from here");
  if (!buffer.address()) throw py::value_error("this memory has been freed");
  return py::memoryview(self);
}

// A device and what its queues share.
struct Device {
  explicit Device(int index) : index(index), pool(std::make_shared<fi::cuda::HostPool>(index)) {}
  const int index;
  const std::shared_ptr<fi::cuda::HostPool> pool;
};

std::unique_ptr<Queue> make_queue(const Device& device, std::optional<uintptr_t> handle) {
  if (handle) return std::make_unique<Queue>(device.index, device.pool, *handle);
  return std::make_unique<Queue>(device.index, device.pool);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  using Free = py::call_guard<py::gil_scoped_release>;
  const py::module_local local;  // tests load an emulation of this module, which has the same classes, beside it
  m.doc() = "fastinterp's CUDA kernels, and what they need of CUDA's runtime.";

  py::register_local_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const fi::cuda::Error& error) {
      const py::module_ errors = py::module_::import("fastinterp.errors");
      PyErr_SetString(errors.attr(error.memory ? "OutOfMemory" : "BackendError").ptr(), error.what());
    }
  });

  m.def("kinds", [] {
    std::vector<std::string> names;
    for (const Kind* kind : kKinds) names.emplace_back(fi::name_of(kind->kind));
    return names;
  });
  m.def("device_count", &fi::cuda::device_count, Free());
  m.def("unusable", &fi::cuda::unusable, py::arg("device"), Free());

  py::class_<Buffer>(m, "Buffer", local, py::buffer_protocol())
      .def_buffer(&bytes_of)
      .def_property_readonly("address", &Buffer::address)
      .def_property_readonly("nbytes", &Buffer::bytes)
      .def_property_readonly("view", &view_of)
      .def("free", &Buffer::free, Free());
  py::class_<Event, std::shared_ptr<Event>>(m, "Event", local)
      .def("done", &Event::done, Free())
      .def("wait", &Event::wait, Free());
  py::class_<Pending, std::shared_ptr<Pending>>(m, "Pending", local)
      .def("answer", &Pending::answer)
      .def("stats", &Pending::stats);
  py::class_<Queue>(m, "Queue", local)
      .def_property_readonly("handle", [](const Queue& q) { return reinterpret_cast<uintptr_t>(q.stream()); })
      .def("upload", &Queue::upload, py::arg("to"), py::arg("host"), py::arg("nbytes"), Free())
      .def("download", &Queue::download, py::arg("host"), py::arg("of"), py::arg("nbytes"), Free())
      .def("run", &run, py::arg("pieces"))
      .def("record", &Queue::record, Free())
      .def("after", &Queue::after, py::arg("event"), Free());
  py::class_<PreparedSums>(m, "PreparedSums", local).def("run", &PreparedSums::run, py::arg("queue"), py::arg("row"));
  py::class_<Device>(m, "Device", local)
      .def(py::init<int>(), py::arg("index"))
      .def_property_readonly("label", [](const Device& d) { return fi::cuda::device_label(d.index); })
      .def(
          "free_bytes", [](const Device& d) { return fi::cuda::free_bytes(d.index); }, Free())
      .def(
          "memory", [](const Device& d, int64_t n) { return std::make_unique<Buffer>(d.index, n, false); },
          py::arg("nbytes"), Free())
      .def(
          "host", [](const Device& d, int64_t n) { return std::make_unique<Buffer>(d.index, n, true); },
          py::arg("nbytes"), Free())
      .def("queue", &make_queue, py::arg("handle") = py::none())
      .def(
          "prepare",
          [](const Device& d, const py::iterable& pieces) {
            return std::make_unique<PreparedSums>(d.index, d.pool, pieces);
          },
          py::arg("pieces"));
}
