// Files that are written: their space, and their checksums. Files that are mapped.
#include <pybind11/stl.h>

#include <cerrno>
#include <system_error>

#include "../cpu/backend.h"
#include "steps.h"

namespace py = pybind11;

namespace fi {

namespace {

void raise_os_error(int code) {
  errno = code;
  PyErr_SetFromErrno(PyExc_OSError);
  throw py::error_already_set();
}

const Xxh3& xxh3_of(const std::string& isa) {
  const Backend* const chosen = isa.empty() ? &best_backend() : find_backend(isa.c_str());
  if (!chosen || !chosen->usable()) throw py::value_error("this processor or build has no " + isa);
  return *chosen->xxh3;
}

// What `read` returns; without the GIL. A file that ends too early is an error without a number.
template <class Read>
auto reading(Read read) {
  try {
    const py::gil_scoped_release release;
    return read();
  } catch (const IoError& error) {
    if (error.error == 0) throw py::value_error("the file ends before the section does");
    raise_os_error(error.error);
    throw;
  }
}

void add_bytes(FileChecksum& checksum, int64_t offset, const py::buffer& bytes) {
  const py::buffer_info info = bytes.request();
  if (info.ndim != 1 || info.strides[0] != info.itemsize) throw py::value_error("bytes lie one after the other");
  const py::gil_scoped_release release;
  checksum.add(offset, info.size * info.itemsize, info.ptr);
}

py::tuple progress_of(const FileChecksum& checksum, int64_t region) {
  const FileChecksum::Progress progress = checksum.progress(region);
  return py::make_tuple(progress.sum,
                        py::bytes(reinterpret_cast<const char*>(progress.hashed.data()), progress.hashed.size()));
}

void restore(FileChecksum& checksum, int64_t region, uint64_t sum, const std::string& hashed) {
  checksum.restore(region, {sum, {hashed.begin(), hashed.end()}});
}

std::vector<uint64_t> checksum_of(int fd, int64_t begin, int64_t end, int threads, const std::string& isa) {
  FileChecksum checksum(xxh3_of(isa), fd, begin, end);
  return reading([&] { return checksum.regions(threads); });
}

// XXH3-64 of bytes that come one after the other.
class Hash {
 public:
  Hash() : xxh3_(*best_backend().xxh3), state_(std::make_unique<Xxh3State>()) { xxh3_.begin(state_.get(), 0); }
  void add(const py::bytes& bytes) {
    const std::string_view view = bytes;
    const py::gil_scoped_release release;
    xxh3_.add(state_.get(), view.data(), view.size());
  }
  uint64_t end() const { return xxh3_.end(state_.get()); }

 private:
  const Xxh3& xxh3_;
  const std::unique_ptr<Xxh3State> state_;  // aligned by `new`
};

}  // namespace

void bind_files(py::module_& m) {
  m.attr("CELL_BYTES") = kCellBytes;
  m.attr("REGION_BYTES") = kRegionBytes;
  m.def(
      "reserve",
      [](int fd, int64_t size) {
        const int code = reserve(fd, size);
        if (code != 0) raise_os_error(code);
      },
      py::arg("fd"), py::arg("size"), "Reserve the bytes of an output file. Raises: OSError, if the disk is full.");
  m.def("start_writeback", &start_writeback, py::arg("fd"), py::call_guard<py::gil_scoped_release>(),
        "Begin writing to the disk what was written to a file.");
  m.def("cached_fraction", &cached_fraction, py::arg("fd"), py::arg("size"),
        "Fraction of a file in the page cache, from 64 sampled pages; -1 if unknown.");
  m.def(
      "xxh3",
      [](const py::bytes& bytes, uint64_t seed) {
        const std::string_view view = bytes;
        return best_backend().xxh3->hash(view.data(), view.size(), seed);
      },
      py::arg("bytes"), py::arg("seed") = 0, "XXH3-64.");
  m.def("checksum", &checksum_of, py::arg("fd"), py::arg("begin"), py::arg("end"), py::arg("threads") = 1,
        py::arg("isa") = "", "The checksum of each region of a file's section.");

  py::class_<Hash>(m, "Xxh3", "XXH3-64 of bytes that come one after the other.")
      .def(py::init<>())
      .def("add", &Hash::add, py::arg("bytes"))
      .def("end", &Hash::end);

  py::class_<MappedFile, std::shared_ptr<MappedFile>>(m, "MappedFile", "A file as a source that kernels read in place.")
      .def(py::init([](int fd) {
             try {
               return std::make_shared<MappedFile>(fd);
             } catch (const std::system_error& error) {
               raise_os_error(error.code().value());
               throw;
             }
           }),
           py::arg("fd"))
      .def_property_readonly("fd", &MappedFile::fd)
      .def_property_readonly("failed", &MappedFile::failed);

  py::class_<FileChecksum, std::shared_ptr<FileChecksum>>(m, "FileChecksum", "The checksum of a file that is written.")
      .def(py::init([](int fd, int64_t begin, int64_t end, const std::string& isa) {
             return std::make_shared<FileChecksum>(xxh3_of(isa), fd, begin, end);
           }),
           py::arg("fd"), py::arg("begin"), py::arg("end"), py::arg("isa") = "")
      .def_property_readonly("fd", &FileChecksum::fd)
      .def_property_readonly("first_region", &FileChecksum::first_region)
      .def_property_readonly("region_count", &FileChecksum::region_count)
      .def("add", &add_bytes, py::arg("offset"), py::arg("bytes"))
      .def(
          "regions",
          [](FileChecksum& checksum, int threads) { return reading([&] { return checksum.regions(threads); }); },
          py::arg("threads") = 1)
      .def("progress", &progress_of, py::arg("region"))
      .def("restore", &restore, py::arg("region"), py::arg("sum"), py::arg("hashed"))
      .def(
          "matches",
          [](const FileChecksum& checksum, int64_t region) {
            return reading([&] { return checksum.matches(region); });
          },
          py::arg("region"));
}

}  // namespace fi
