// Conversions between Python and the pump: steps, sources and sinks in, results of surveys out.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../checksum.h"
#include "../mapped.h"
#include "../range_cache.h"
#include "../steps/step.h"

namespace fi {

// A file of a RangeCache, as a source.
struct RemoteSource {
  std::shared_ptr<RangeCache> cache;
  int file;
};

// A file descriptor, or ("memory", address, bytes); of a source also a RemoteSource or a MappedFile, of a sink the
// checksum of a file.
template <class Handle>
std::vector<Handle> handles_of(const pybind11::sequence& sequence) {
  std::vector<Handle> handles;
  for (const pybind11::handle h : sequence) {
    const int index = int(handles.size());
    if (pybind11::isinstance<pybind11::int_>(h)) {
      handles.emplace_back(index, h.cast<int>());
      continue;
    }
    if constexpr (std::is_same_v<Handle, Source>) {
      if (pybind11::isinstance<RemoteSource>(h)) {
        const RemoteSource& remote = h.cast<const RemoteSource&>();
        handles.emplace_back(index, remote.cache, remote.file);
        continue;
      }
      if (pybind11::isinstance<MappedFile>(h)) {
        handles.emplace_back(index, h.cast<std::shared_ptr<MappedFile>>());
        continue;
      }
    }
    if constexpr (std::is_same_v<Handle, Sink>) {
      if (pybind11::isinstance<FileChecksum>(h)) {
        handles.emplace_back(index, h.cast<std::shared_ptr<FileChecksum>>());
        continue;
      }
    }
    const auto [kind, address, size] = h.cast<std::tuple<std::string, uintptr_t, int64_t>>();
    if (kind != "memory" || size < 0) throw pybind11::value_error("a source or sink is a file descriptor or memory");
    handles.emplace_back(index, reinterpret_cast<void*>(address), size);
  }
  return handles;
}

// A step from an object of fastinterp/ops/steps.py. Throws pybind11::value_error, or the exception of a failed
// conversion.
Step step_of(const pybind11::handle& object, const Backend& backend, size_t sources, size_t sinks, bool stochastic);

// Binds the classes Counts, the result of a histogram, and Masks, which statistics of masked deltas fill; and the
// function that folds the results of a tensor's pieces.
void bind_answers(pybind11::module_& m);

// Binds RangeCache, with which the caller feeds the pump what is elsewhere, and RemoteSource.
void bind_range_cache(pybind11::module_& m);
// Binds the class FileChecksum, and functions about files.
void bind_files(pybind11::module_& m);

// (f64[...], i64[...]) as memoryviews; of a histogram a list of counts.
pybind11::object answer_of(const Answer& answer);

}  // namespace fi
