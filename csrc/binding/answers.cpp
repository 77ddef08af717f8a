// Results of surveys as Python objects.

#include <pybind11/stl.h>

#include "../steps/histogram.h"
#include "../steps/masked.h"
#include "../steps/survey.h"
#include "numbers.h"
#include "steps.h"

namespace py = pybind11;

namespace fi {

namespace {

template <class T>
py::object view_of(const std::vector<T>& values, const char* format) {
  return fi::view_of(values.data(), values.size(), format);
}

// The answer of a tensor from those of its pieces, in order: see fold_chunks in survey.h.
py::object fold(const std::vector<std::pair<py::buffer, py::buffer>>& pieces) {
  Answer whole;
  size_t width = 0;
  for (const auto& [reals, counts] : pieces) {
    const std::vector<double> piece_reals = numbers_of<double>(reals);
    const std::vector<int64_t> piece_counts = numbers_of<int64_t>(counts);
    if (whole.reals.empty()) {
      width = piece_reals.size();
      whole.counts.resize(piece_counts.size());
    }
    if (width == 0 || piece_reals.size() != width || piece_counts.size() != whole.counts.size())
      throw py::value_error("the pieces' answers differ in length, or are none");
    whole.reals.insert(whole.reals.end(), piece_reals.begin(), piece_reals.end());
    for (size_t i = 0; i < piece_counts.size(); ++i) whole.counts[i] += piece_counts[i];
  }
  if (width == 0) throw py::value_error("there are no answers to fold");
  fold_chunks(width, &whole.reals);
  return answer_of(whole);
}

std::shared_ptr<Counts> counts_of(int64_t elements, int64_t above, int64_t zero, const py::buffer& bins) {
  const std::vector<uint32_t> counted = numbers_of<uint32_t>(bins);
  if (counted.empty()) throw py::value_error("counts have at least one bin");
  return std::make_shared<Counts>(elements, above, zero, counted.data(), int64_t(counted.size()));
}

}  // namespace

py::object answer_of(const Answer& answer) {
  if (!answer.histograms.empty()) return py::cast(answer.histograms);
  return py::make_tuple(view_of(answer.reals, "d"), view_of(answer.counts, "q"));
}

void bind_answers(py::module_& m) {
  py::class_<Masks, std::shared_ptr<Masks>>(m, "Masks", "Masks of the deltas of one tensor, a bit per element.")
      .def(py::init([](int count, int64_t numel) {
             if (count < 1 || numel < 0) throw py::value_error("masks are one or more, of 0 elements or more");
             return std::make_shared<Masks>(count, numel);
           }),
           py::arg("count"), py::arg("numel"))
      .def_property_readonly("nbytes", &Masks::bytes)
      .def_property_readonly("filled", &Masks::allocated,
                             "Whether a step of masked statistics has been created that fills them.");
  py::class_<Counts, std::shared_ptr<Counts>>(m, "Counts", "How many magnitudes of one vector lie where.")
      .def(py::init(&counts_of), py::arg("elements"), py::arg("above"), py::arg("zero"), py::arg("bins"))
      .def_readonly("elements", &Counts::elements, "That were looked at.")
      .def_readonly("above", &Counts::above, "Above the last bin.")
      .def_readonly("zero", &Counts::zero, "That are 0, in a bin or not.")
      .def_property_readonly(
          "bins", [](const Counts& c) { return view_of(c.bins(), "Q"); }, "A copy: u64[bins] as a memoryview.")
      .def(
          "add", [](Counts& c, const Counts& other) { c.add(other); }, py::arg("other"),
          "Add another tensor's counts. Raises: ValueError, if those have other bins.")
      .def("rank", &Counts::rank, py::arg("k"),
           "The bin of the k-th largest in bins, and how many are in it or above; (-1, all) if those are fewer.")
      .def("at_least", &Counts::at_least, py::arg("first"), "How many are in bin `first` or above.");
  m.def("fold", &fold, py::arg("pieces"),
        "The answer to a measure or to masked statistics from those of its pieces, in order: sums add in pairs, an "
        "unpaired one goes on to the next level, and counts add.");
}

}  // namespace fi
