#include "../histogram.h"

#include "masks.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

constexpr int64_t kStripElements = kStripUnits * kUnit;

// The result of a histogram, fetched from the device: two counts of each bracket, then all bins.
class Histograms : public Pending {
 public:
  Histograms(std::vector<ParsedBracket> ranked, int64_t elements) : ranked_(std::move(ranked)), elements_(elements) {}

  int64_t count_bytes() const { return int64_t(ranked_.size()) * 2 * int64_t(sizeof(int64_t)); }
  int64_t bytes() const {
    int64_t all = count_bytes();
    for (const ParsedBracket& r : ranked_) all += r.bins() * int64_t(sizeof(uint32_t));
    return all;
  }
  void hold(std::shared_ptr<const char> counts) { counts_ = std::move(counts); }

  py::object answer() const override {
    const py::object made = py::module_::import("fastinterp._C").attr("Counts");
    const auto* const counts = reinterpret_cast<const int64_t*>(counts_.get());
    const char* at = counts_.get() + count_bytes();
    py::list all;
    for (size_t b = 0; b < ranked_.size(); ++b) {
      std::vector<uint32_t> bins(size_t(ranked_[b].bins()));
      const int64_t zero = counts[2 * b + 1];
      memcpy(bins.data(), at, bins.size() * sizeof(uint32_t));
      at += bins.size() * sizeof(uint32_t);
      if (ranked_[b].low == 0) bins[0] += uint32_t(zero);
      all.append(made(elements_, counts[2 * b], zero,
                      py::memoryview::from_memory(bins.data(), ptrdiff_t(bins.size() * sizeof(uint32_t)))));
    }
    return all;
  }

 private:
  const std::vector<ParsedBracket> ranked_;
  const int64_t elements_;
  std::shared_ptr<const char> counts_;
};

// The strips of the piece that are looked at, and how many elements those have.
int64_t find_strips(const ParsedPiece& piece, HistogramTask* task) {
  const int64_t every = piece.step.every;
  if (piece.first % kStripElements != 0) throw py::value_error("a piece of a histogram begins with a strip");
  if (piece.numel > int64_t(0xffffffff)) throw py::value_error("a piece of a histogram has below 2**32 elements");
  const int64_t begin = piece.first / kStripElements;
  const int64_t end = (piece.first + piece.numel + kStripElements - 1) / kStripElements;
  task->every = every;
  task->first_strip = (begin + every - 1) / every * every;
  task->strips = task->first_strip < end ? (end - 1 - task->first_strip) / every + 1 : 0;
  int64_t elements = task->strips * kStripElements;
  const int64_t rest = (piece.first + piece.numel) % kStripElements;
  if (task->strips > 0 && (end - 1) % every == 0 && rest != 0) elements -= kStripElements - rest;
  return elements;
}

// Launches the kernel, up to kMostBrackets brackets at a time.
void launch(Queue* queue, const std::vector<ParsedBracket>& ranked, HistogramTask task) {
  uint32_t bin = 0;
  int64_t* const counts = task.counts;
  for (size_t done = 0; done < ranked.size(); done += size_t(task.n_brackets)) {
    task.n_brackets = int(std::min(ranked.size() - done, size_t(kMostBrackets)));
    task.counts = counts + 2 * done;
    for (int b = 0; b < task.n_brackets; ++b) {
      const ParsedBracket& r = ranked[done + size_t(b)];
      task.brackets[b] = {r.input, r.shift, r.low, r.high - r.low, bin};
      bin += uint32_t(r.bins());
    }
    histogram(task, queue->stream());
    check_launch("histogram", queue->device());
  }
}

std::shared_ptr<Pending> run_one(Queue* queue, const ParsedPiece& piece) {
  HistogramTask task{};
  task.inputs = table_of(piece);
  task.n = int(piece.x.size());
  task.numel = piece.numel;
  task.first = piece.first;
  Uploads uploads;
  task.score = score_of(queue, piece.step.score, rows_of(piece), &uploads);
  const bool scores = task.score.kind != Score::kNone;
  const std::vector<ParsedBracket>& brackets = piece.step.brackets;
  task.wide = piece.in[0] == DType::F64 || (scores && piece.wide);
  for (const ParsedBracket& b : brackets) task.wide = task.wide || (!scores && piece.in[size_t(b.input)] == DType::F64);
  const int64_t elements = find_strips(piece, &task);
  auto pending = std::make_shared<Histograms>(brackets, elements);
  const Scratch scratch(queue, pending->bytes(), "counts");
  queue->zero(scratch.at(), pending->bytes());
  task.counts = static_cast<int64_t*>(scratch.at());
  task.bins = reinterpret_cast<uint32_t*>(static_cast<char*>(scratch.at()) + pending->count_bytes());
  if (task.strips > 0) launch(queue, brackets, task);
  pending->hold(queue->fetch(scratch.at(), pending->bytes()));
  return pending;
}

}  // namespace

const Kind kHistogram = {StepKind::kHistogram, run_each<run_one>};

}  // namespace cuda
}  // namespace fi
