#include "masks.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

MaskRange range_of(const MaskTest& test) {
  if (is_ranked(test)) throw py::value_error("there is no kernel for random masks by rank");
  const bool none = test.min_bits > test.max_bits;  // nothing has the magnitude 2^32 - 1
  return {none ? 0xffffffffu : test.min_bits, none ? 0u : test.max_bits - test.min_bits, test.low_limit, test.key};
}

Rows rows_of(const ParsedPiece& piece) {
  const int64_t columns = piece.step.columns;
  if (columns < 1) throw py::value_error("a piece needs `columns`, the length of a row");
  const int64_t first = piece.first / columns, end = piece.first + piece.numel;
  return {first, piece.numel ? (end - 1) / columns - first + 1 : 0, columns};
}

const void* upload(Queue* queue, const void* from, int64_t bytes, const char* what, Uploads* uploads) {
  if (bytes == 0) return nullptr;
  uploads->push_back(std::make_unique<Scratch>(queue, bytes, what));
  queue->send(uploads->back()->at(), from, bytes);
  return uploads->back()->at();
}

ScoreTask score_of(Queue* queue, const ParsedScore& parsed, const Rows& rows, Uploads* uploads) {
  if (parsed.kind != Score::kDivergence) return {parsed.kind, parsed.min_bits, nullptr, 0, rows.columns};
  const int64_t from = rows.first * int64_t(sizeof(float)), size = rows.count * int64_t(sizeof(float));
  if (int64_t(parsed.factors.size()) < from + size) throw py::value_error("a divergence needs a factor per row");
  const void* const at = upload(queue, parsed.factors.data() + from, size, "the factors of a score", uploads);
  return {Score::kDivergence, parsed.min_bits, static_cast<const float*>(at), rows.first, rows.columns};
}

}  // namespace cuda
}  // namespace fi
