#include "sums.h"

#include <pybind11/stl.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../memory.h"

namespace py = pybind11;

namespace fi {

namespace {

std::vector<DType> dtypes(const std::vector<int>& codes) {
  std::vector<DType> all;
  for (const int code : codes) all.push_back(dtype_of(code));
  return all;
}

std::vector<py::dict> combine(const std::vector<uintptr_t>& inputs, const std::vector<int>& in_dtypes,
                              const py::sequence& py_rows, const std::vector<uintptr_t>& outputs, int out_dtype,
                              int64_t numel, int64_t first, bool stochastic, const std::vector<uint64_t>& keys,
                              bool fp8_saturate, int stats_every, int threads, const std::string& isa,
                              std::optional<bool> streamed) {
  check_count(inputs.size(), kMaxInputs, "inputs");
  check_count(py_rows.size(), kMaxOutputs, "rows");
  if (in_dtypes.size() != inputs.size()) throw py::value_error("as many dtypes as inputs are needed");
  if (outputs.size() != py_rows.size()) throw py::value_error("as many outputs as rows are needed");
  if (stochastic && keys.size() != py_rows.size()) throw py::value_error("stochastic rounding needs a key per row");
  if (numel < 0 || first < 0) throw py::value_error("numel and first must not be negative");
  std::vector<std::vector<Term>> terms;
  std::vector<Row> rows;
  for (const py::handle row_object : py_rows) {
    ParsedRow row = parse_row(row_object, inputs.size());
    terms.push_back(std::move(row.terms));
    rows.push_back({row.pivot, int(terms.back().size()), row.total, terms.back().data()});
  }
  const std::vector<DType> in = dtypes(in_dtypes);
  CombineArgs args{};
  args.in = in.data();
  args.rows = rows.data();
  args.keys = keys.data();
  args.n = int(in.size());
  args.k = int(rows.size());
  args.out_dtype = dtype_of(out_dtype);
  args.stochastic = stochastic;
  args.fp8_saturate = fp8_saturate;
  args.stats_every = stats_every;
  args.first = first;
  args.numel = numel;
  int64_t each = int64_t(outputs.size()) * size_of(args.out_dtype);  // bytes, read and written
  for (const DType dtype : in) each += size_of(dtype);
  args.streamed = streamed.value_or(worth_streaming(each * numel));
  const Backend& chosen = backend_named(isa);
  std::vector<RowStats> stats;
  {
    const py::gil_scoped_release release;
    stats = combine_in_memory(chosen, inputs, outputs, args, threads);
  }
  std::vector<py::dict> dicts;
  for (const RowStats& s : stats) dicts.push_back(as_dict(s));
  return dicts;
}

// Sums in memory that differ in their arrays alone: one row for all of them, another at every run.
class PreparedSums {
 public:
  using Array = std::pair<uintptr_t, int>;  // address, code of the dtype

  PreparedSums(const std::vector<std::tuple<std::vector<Array>, Array, int64_t>>& sums, const std::string& isa)
      : backend_(backend_named(isa)) {
    for (const auto& [inputs, out, numel] : sums) {
      check_count(inputs.size(), kMaxInputs, "inputs");
      if (numel < 0 || inputs.size() != std::get<0>(sums[0]).size())
        throw py::value_error("sums need equally many inputs, and no negative number of elements");
      MemorySum sum;
      for (const auto& [address, code] : inputs) {
        sum.inputs.push_back(address);
        sum.in.push_back(dtype_of(code));
      }
      sum.out = out.first;
      sum.out_dtype = dtype_of(out.second);
      sum.numel = numel;
      inputs_ = inputs.size();
      sums_.push_back(std::move(sum));
    }
  }

  void run(const SumRow& row, int threads) const {
    if (!sums_.empty() && row.inputs() != inputs_) throw py::value_error("the row is one of other inputs");
    const py::gil_scoped_release release;
    sum_in_memory(backend_, sums_, row.row(), threads);
  }

 private:
  const Backend& backend_;
  std::vector<MemorySum> sums_;
  size_t inputs_ = 0;
};

}  // namespace

const Backend& backend_named(const std::string& isa) {
  if (isa.empty()) return best_backend();
  const Backend* backend = find_backend(isa.c_str());
  if (!backend) throw py::value_error("no such instruction set in this build: " + isa);
  if (!backend->usable()) throw py::value_error("this processor cannot run " + isa);
  return *backend;
}

void bind_sums(py::module_& m) {
  m.def("combine", &combine, py::arg("inputs"), py::arg("in_dtypes"), py::arg("rows"), py::arg("outputs"),
        py::arg("out_dtype"), py::arg("numel"), py::kw_only(), py::arg("first") = 0, py::arg("stochastic") = false,
        py::arg("keys") = std::vector<uint64_t>{}, py::arg("fp8_saturate") = true, py::arg("stats_every") = 32,
        py::arg("threads") = 1, py::arg("isa") = "", py::arg("streamed") = py::none(),
        "Weighted sums of arrays in memory, by address. The caller answers for the addresses. streamed: store the "
        "outputs around the caches; None decides by the size of all arrays.");

  py::class_<SumRow>(m, "SumRow", "A row of a sum of so many inputs, as kernels take it.")
      .def(py::init<py::handle, size_t>(), py::arg("row"), py::arg("inputs"));
  py::class_<PreparedSums>(
      m, "PreparedSums",
      "Sums in memory: [((address, code) of each input, (address, code) of the output, numel)]. No "
      "output overlaps what another sum reads. The caller answers for the addresses.")
      .def(py::init<const std::vector<std::tuple<std::vector<PreparedSums::Array>, PreparedSums::Array, int64_t>>&,
                    const std::string&>(),
           py::arg("sums"), py::arg("isa") = "")
      .def("run", &PreparedSums::run, py::arg("row"), py::arg("threads"), "Compute all of them, with this row.");
}

}  // namespace fi
