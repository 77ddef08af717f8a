#include "sampled.h"

namespace py = pybind11;

namespace fi {
namespace cuda {

namespace {

constexpr int64_t kCountBytes = 4 * int64_t(sizeof(int64_t));

}  // namespace

OutputTask output_of(const ParsedPiece& piece, size_t k) {
  const std::vector<uint64_t>& keys = piece.step.keys;
  return {piece.out[k], piece.step.out_dtype, !keys.empty(), piece.fp8_saturate, keys.empty() ? 0 : keys[k]};
}

SampledOutputs::SampledOutputs(const ParsedPiece& piece) : outputs_(piece.out.size()) {
  const int64_t every = piece.stats_every;
  if (every <= 0 || piece.numel == 0) return;
  const int64_t last = (piece.first + piece.numel - 1) / kChunk;
  chunks_.every = every;
  chunks_.first_chunk = (piece.first / kChunk + every - 1) / every * every;
  chunks_.chunks = chunks_.first_chunk <= last ? (last - chunks_.first_chunk) / every + 1 : 0;
}

int64_t SampledOutputs::bytes_of_output() const { return kCountBytes + chunks_.chunks * int64_t(sizeof(ChunkSample)); }

void SampledOutputs::prepare(Queue* queue) {
  if (chunks_.every == 0) return;
  const int64_t bytes = int64_t(outputs_) * bytes_of_output();
  device_ = std::make_unique<Scratch>(queue, bytes, "statistics");
  queue->zero(device_->at(), bytes);
}

OutputStats SampledOutputs::of(size_t k) const {
  OutputStats stats = chunks_;
  if (!device_) return stats;
  char* const at = static_cast<char*>(device_->at()) + int64_t(k) * bytes_of_output();
  stats.counts = reinterpret_cast<int64_t*>(at);
  stats.samples = reinterpret_cast<ChunkSample*>(at + kCountBytes);
  return stats;
}

void SampledOutputs::fetch(Queue* queue) {
  if (!device_) return;
  fetched_ = queue->fetch(device_->at(), int64_t(outputs_) * bytes_of_output());
  device_.reset();
}

py::list SampledOutputs::stats() const {
  py::list all;
  for (size_t k = 0; k < outputs_; ++k) {
    RowStats sum{};
    if (fetched_) {
      const char* const at = fetched_.get() + int64_t(k) * bytes_of_output();
      const auto* const counts = reinterpret_cast<const int64_t*>(at);
      const auto* const samples = reinterpret_cast<const ChunkSample*>(at + kCountBytes);
      sum = {counts[0], counts[1], counts[2], counts[3], 0, 0, 0, 0, 0};
      for (int64_t c = 0; c < chunks_.chunks; ++c) {
        const ChunkSample& s = samples[c];
        add({0, 0, 0, 0, s.sampled, s.changed, s.sum_pp, s.sum_dd, s.sum_od}, &sum);
      }
    }
    all.append(as_dict(sum));
  }
  return all;
}

}  // namespace cuda
}  // namespace fi
