// Steps, sources and sinks as Python gives them.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "step.h"

namespace fi {

using PyTerms = std::vector<std::pair<int, double>>;
using PyRow = std::tuple<int, double, PyTerms>;  // pivot, total, (input, weight)

// All throw pybind11::value_error, or what a conversion throws.
DType dtype_of(int code);
void check_count(size_t count, int most, const char* what);
void check_row(const PyRow& row, size_t inputs);
std::vector<Term> terms_of(const PyRow& row);

// A file descriptor, or ("memory", address, bytes).
template <class Handle>
std::vector<Handle> handles_of(const pybind11::list& given) {
  std::vector<Handle> handles;
  for (const pybind11::handle h : given) {
    const int index = int(handles.size());
    if (pybind11::isinstance<pybind11::int_>(h)) {
      handles.emplace_back(index, h.cast<int>());
      continue;
    }
    const auto [kind, address, size] = h.cast<std::tuple<std::string, uintptr_t, int64_t>>();
    if (kind != "memory" || size < 0) throw pybind11::value_error("a source or sink is a file descriptor or memory");
    handles.emplace_back(index, reinterpret_cast<void*>(address), size);
  }
  return handles;
}

// A contiguous buffer of numbers, of so many unless `count` is negative: an array, a memoryview; bytes too.
template <class T>
std::vector<T> numbers_of(const pybind11::buffer& given, int64_t count = -1) {
  const pybind11::buffer_info info = given.request();
  const bool fits = info.itemsize == 1 || info.item_type_is_equivalent_to<T>();
  const size_t bytes = size_t(info.size * info.itemsize);
  if (!fits || info.ndim != 1 || info.strides[0] != info.itemsize || bytes % sizeof(T) != 0 ||
      (count >= 0 && bytes != size_t(count) * sizeof(T)))
    throw pybind11::value_error("expected a contiguous buffer of " + (count < 0 ? "" : std::to_string(count) + " ") +
                                (std::is_floating_point_v<T> ? "float"
                                 : std::is_signed_v<T>       ? "int"
                                                             : "uint") +
                                std::to_string(8 * sizeof(T)));
  std::vector<T> numbers(bytes / sizeof(T));
  if (bytes != 0) memcpy(numbers.data(), info.ptr, bytes);
  return numbers;
}

// A step from its dict. Its kind's row in the table of bind_steps.cpp tells which keys it has.
Step step_of(const pybind11::dict& given, const Backend& backend, size_t sources, size_t sinks, bool stochastic);

// Adds the classes of the counts that a histogram answers with, and of the masks that a survey of keeps fills; and what
// folds the answers of a tensor's pieces.
void bind_answers(pybind11::module_& m);

// (f64[...], i64[...]) as memoryviews; of a histogram a list of counts.
pybind11::object answer_of(const Answer& answer);

}  // namespace fi
