#include <pybind11/numpy.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "../cpu/backend.h"
#include "../memory.h"
#include "sums.h"

namespace py = pybind11;

namespace fi {

namespace {

// An array or tensor. Its shape is the array's own, or `own`.
struct View {
  uintptr_t address = 0;
  DType dtype{};
  int dimensions = 0;
  const Py_ssize_t* shape = nullptr;
  std::vector<Py_ssize_t> own;

  bool is_shaped_as(const View& other) const {
    return dimensions == other.dimensions && std::equal(shape, shape + dimensions, other.shape);
  }
};

// An attribute's name. What fails returns null or false, and leaves no Python error.
class Name {
 public:
  explicit Name(const char* name) : name_(PyUnicode_InternFromString(name)) {}
  py::object of(const py::handle& object) const { return kept(PyObject_GetAttr(object.ptr(), name_)); }
  py::object called(const py::handle& object) const { return kept(PyObject_CallMethodNoArgs(object.ptr(), name_)); }
  // Whether the attribute, or what the method returns, is this value.
  bool is(const py::handle& object, PyObject* value) const { return of(object).ptr() == value; }
  bool returns(const py::handle& object, PyObject* value) const { return called(object).ptr() == value; }

 private:
  static py::object kept(PyObject* result) {
    if (result == nullptr) PyErr_Clear();
    return py::reinterpret_steal<py::object>(result);
  }
  PyObject* name_;  // kept until the process ends
};

struct Names {
  Name dtype{"dtype"}, shape{"shape"}, data_ptr{"data_ptr"}, is_cpu{"is_cpu"};
  Name is_contiguous{"is_contiguous"}, is_neg{"is_neg"}, requires_grad{"requires_grad"};
};

const Names& names() {
  static const Names* names = new Names;
  return *names;
}

// codes: dtype -> code. False: it has none.
bool find_code(const py::handle& key, const py::dict& codes, DType* dtype) {
  PyObject* code = key ? PyDict_GetItemWithError(codes.ptr(), key.ptr()) : nullptr;
  if (code == nullptr) {
    PyErr_Clear();
    return false;
  }
  *dtype = dtype_of(py::handle(code).cast<int>());
  return true;
}

bool view_of_array(const py::handle& array, const py::dict& codes, bool writable, View* view) {
  const auto* a = py::detail::array_proxy(array.ptr());
  const int needed =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | (writable ? py::detail::npy_api::NPY_ARRAY_WRITEABLE_ : 0);
  if ((a->flags & needed) != needed || !find_code(a->descr, codes, &view->dtype)) return false;
  view->address = reinterpret_cast<uintptr_t>(a->data);
  view->dimensions = a->nd;
  view->shape = a->dimensions;
  return true;
}

bool view_of_tensor(const py::handle& tensor, const py::dict& codes, bool followed, View* view) {
  const Names& n = names();
  if (!n.is_cpu.is(tensor, Py_True) || !n.is_contiguous.returns(tensor, Py_True) || !n.is_neg.returns(tensor, Py_False))
    return false;
  if (followed && !n.requires_grad.is(tensor, Py_False)) return false;
  if (!find_code(n.dtype.of(tensor), codes, &view->dtype)) return false;
  const py::object shape = n.shape.of(tensor), address = n.data_ptr.called(tensor);
  if (!shape || !PyTuple_Check(shape.ptr()) || !address) return false;
  for (const py::handle length : py::reinterpret_borrow<py::tuple>(shape))
    view->own.push_back(length.cast<Py_ssize_t>());
  view->dimensions = int(view->own.size());
  view->shape = view->own.data();
  view->address = address.cast<uintptr_t>();
  return view->address != 0;  // whose storage was let go
}

// The backend that FASTINTERP_ISA names, in any case, else the best. Null: Python has to say what is wrong with it.
const Backend* chosen_backend() {
  const char* set = std::getenv("FASTINTERP_ISA");
  if (set == nullptr || *set == 0) return &best_backend();
  std::string name = set;
  for (char& c : name) c = char(std::tolower(static_cast<unsigned char>(c)));
  const Backend* backend = find_backend(name.c_str());
  return backend != nullptr && backend->usable() ? backend : nullptr;
}

// One kind of arrays of which sums are computed without a check in Python.
class PlainSums {
 public:
  PlainSums(py::tuple types, py::dict codes, bool tensors)
      : types_(std::move(types)), codes_(std::move(codes)), tensors_(tensors) {}

  bool sum(const py::sequence& arrays, const SumRow& sum, const py::object& out, const py::object& threads,
           bool followed) const {
    const Backend* backend = chosen_backend();
    if (backend == nullptr) return false;
    const py::tuple held(arrays);  // the caller's list may change while others run
    const size_t n = held.size();
    std::vector<View> views(n);
    for (size_t i = 0; i < n; ++i)
      if (!view(held[i], false, followed, &views[i]) || !views[i].is_shaped_as(views[0])) return false;
    View target;
    if (n != sum.inputs() || !view(out, true, followed, &target) || !target.is_shaped_as(views[0])) return false;
    int64_t numel = 1, each = size_of(target.dtype);  // each: bytes of an element of all arrays
    for (int i = 0; i < target.dimensions; ++i) numel *= target.shape[i];
    if (numel == 0) return false;
    const auto end = [numel](const View& v) { return v.address + uintptr_t(numel * size_of(v.dtype)); };
    std::vector<uintptr_t> inputs;
    std::vector<DType> dtypes;
    for (const View& v : views) {
      if (v.address < end(target) && target.address < end(v)) return false;
      inputs.push_back(v.address);
      dtypes.push_back(v.dtype);
      each += size_of(v.dtype);
    }
    const Row row = sum.row();
    CombineArgs args{};
    args.in = dtypes.data();
    args.rows = &row;
    args.n = int(n);
    args.k = 1;
    args.out_dtype = target.dtype;
    args.fp8_saturate = true;
    args.numel = numel;
    args.streamed = worth_streaming(numel * each);
    int count = 1;
    if (numel > kOneThread) count = (PyLong_Check(threads.ptr()) ? threads : threads()).cast<int>();
    const py::gil_scoped_release release;
    combine_in_memory(*backend, inputs, {target.address}, args, count);
    return true;
  }

 private:
  static constexpr int64_t kOneThread = 16 * kChunk;  // elements, which one thread takes at a time

  bool view(const py::handle& array, bool writable, bool followed, View* view) const {
    bool known = false;
    for (const py::handle type : types_) known |= type.ptr() == reinterpret_cast<PyObject*>(Py_TYPE(array.ptr()));
    return known &&
           (tensors_ ? view_of_tensor(array, codes_, followed, view) : view_of_array(array, codes_, writable, view));
  }

  py::tuple types_;
  py::dict codes_;
  bool tensors_;
};

}  // namespace

void bind_plain_sums(py::module_& m) {
  py::class_<PlainSums>(m, "PlainSums",
                        "Weighted sums of arrays whose types are `types`, exactly, numpy's or torch's (`tensors`), and "
                        "whose dtypes are among `codes`, dtype -> code, on the CPU.")
      .def(py::init<py::tuple, py::dict, bool>(), py::arg("types"), py::arg("codes"), py::arg("tensors"))
      .def("sum", &PlainSums::sum, py::arg("arrays"), py::arg("row"), py::arg("out"), py::arg("threads"),
           py::arg("followed"),
           "Write a sum into `out`. threads: their number, or a function that returns it. followed: autograd records. "
           "False, with nothing written: the arrays are of other kinds, do not fit each other, or are empty, or "
           "FASTINTERP_ISA names what cannot be used here.");
}

}  // namespace fi
