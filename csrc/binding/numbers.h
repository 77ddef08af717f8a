// Numbers between C++ and Python, for both extensions: contiguous buffers in, memoryviews and statistics out.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "../ops.h"

namespace fi {

// A contiguous buffer of numbers, of so many unless `count` is negative: an array, a memoryview; bytes too. Valid while
// this lives. Throws pybind11::value_error.
template <class T>
class Numbers {
 public:
  Numbers() = default;
  explicit Numbers(const pybind11::buffer& buffer, int64_t count = -1) : info_(buffer.request()) {
    const bool fits = info_.itemsize == 1 || info_.item_type_is_equivalent_to<T>();
    const size_t bytes = size_t(info_.size * info_.itemsize);
    if (!fits || info_.ndim != 1 || info_.strides[0] != info_.itemsize || bytes % sizeof(T) != 0 ||
        (count >= 0 && bytes != size_t(count) * sizeof(T)))
      throw pybind11::value_error("expected a contiguous buffer of " + (count < 0 ? "" : std::to_string(count) + " ") +
                                  (std::is_floating_point_v<T> ? "float"
                                   : std::is_signed_v<T>       ? "int"
                                                               : "uint") +
                                  std::to_string(8 * sizeof(T)));
    size_ = int64_t(bytes / sizeof(T));
  }
  int64_t size() const { return size_; }
  // Of any alignment.
  const void* data() const { return info_.ptr; }
  T operator[](int64_t i) const {
    T number;
    memcpy(&number, static_cast<const char*>(info_.ptr) + i * int64_t(sizeof(T)), sizeof number);
    return number;
  }
  std::vector<T> copy() const {
    std::vector<T> numbers(static_cast<size_t>(size_));
    if (size_ != 0) memcpy(numbers.data(), info_.ptr, numbers.size() * sizeof(T));
    return numbers;
  }

 private:
  pybind11::buffer_info info_;
  int64_t size_ = 0;
};

template <class T>
std::vector<T> numbers_of(const pybind11::buffer& buffer, int64_t count = -1) {
  return Numbers<T>(buffer, count).copy();
}

// A copy, as a memoryview of float64 ("d"), int64 ("q") or uint64 ("Q").
template <class T>
pybind11::object view_of(const T* values, size_t count, const char* format) {
  const pybind11::bytes bytes(reinterpret_cast<const char*>(values), count * sizeof(T));
  return pybind11::memoryview(bytes).attr("cast")(format);
}

// The statistics of one output. All dicts share their keys, so that those of many tensors take little memory.
inline pybind11::dict as_dict(const RowStats& s) {
  pybind11::dict d;
  const auto set = [&d](const char* name, auto value) {
    if (PyDict_SetItemString(d.ptr(), name, pybind11::cast(value).ptr()) != 0) throw pybind11::error_already_set();
  };
  set("nan_in", s.nan_in);
  set("inf_in", s.inf_in);
  set("nan_out", s.nan_out);
  set("inf_out", s.inf_out);
  set("sampled", s.sampled);
  set("changed", s.changed);
  set("sum_pp", s.sum_pp);
  set("sum_dd", s.sum_dd);
  set("sum_od", s.sum_od);
  return d;
}

}  // namespace fi
