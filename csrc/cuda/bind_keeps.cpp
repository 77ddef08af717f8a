#include "bind_keeps.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

KeepRange keep_of(const py::dict& d) {
  const auto limit = [&](const char* key) { return std::min(d[key].cast<uint64_t>(), kWords); };
  const KeepTest keep{d["least"].cast<uint32_t>(), d["most"].cast<uint32_t>(), limit("lo"), limit("hi"),
                      d["key"].cast<uint64_t>()};
  if (is_ranked(keep)) throw py::value_error("there is no kernel for random keeps by rank");
  const bool none = keep.least > keep.most;  // nothing has the magnitude 2^32 - 1
  return {none ? 0xffffffffu : keep.least, none ? 0u : keep.most - keep.least, keep.lo, keep.key};
}

Rows rows_of(const py::dict& piece, const Operands& operands) {
  const int64_t columns = get<int64_t>(piece, "columns");
  if (columns < 1) throw py::value_error("a piece needs `columns`, the length of a row");
  const int64_t first = operands.first / columns, end = operands.first + operands.numel;
  return {first, operands.numel ? (end - 1) / columns - first + 1 : 0, columns};
}

const void* upload(Queue* queue, const void* from, int64_t bytes, const char* what, Uploads* uploads) {
  if (bytes == 0) return nullptr;
  uploads->push_back(std::make_unique<Scratch>(queue, bytes, what));
  queue->send(uploads->back()->at(), from, bytes);
  return uploads->back()->at();
}

ScoreTask score_of(Queue* queue, const py::object& given, const Rows& rows, Uploads* uploads) {
  if (given.is_none()) return {Score::kNone, 0, nullptr, 0, rows.columns};
  const auto [kind, least, factors] = given.cast<std::tuple<std::string, uint32_t, py::bytes>>();
  if (kind == "spread") return {Score::kSpread, least, nullptr, 0, rows.columns};
  const std::string_view bytes = factors;
  const int64_t from = rows.first * int64_t(sizeof(float)), size = rows.count * int64_t(sizeof(float));
  if (int64_t(bytes.size()) < from + size) throw py::value_error("a divergence needs a factor per row");
  const void* const at = upload(queue, bytes.data() + from, size, "the factors of a score", uploads);
  return {Score::kDivergence, least, static_cast<const float*>(at), rows.first, rows.columns};
}

}  // namespace cuda
}  // namespace fi
