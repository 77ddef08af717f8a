// The pump's steps whose outputs are encoded.
#include <algorithm>
#include <cstring>

#include "pump.h"

namespace fi {

// Bands are summed, measured and encoded a span at a time. What is longer than a span is summed twice, so that no
// scratch grows with the tensor.
void Pump::run_encoded(const Block& block, char* scratch) {
  const Piece& piece = pieces_[block.begin];
  const Step& step = steps_[size_t(piece.step)];
  const Encoding& encoding = *step.encoding;
  const size_t k = step.sinks.size();
  const int64_t span = span_of(step), end = piece.first + piece.count;
  char* const staged = scratch + scratch_bytes_ - decode_bytes_ - out_stride_ * int64_t(k);
  std::vector<void*> sums;
  for (size_t i = 0; i <= k; ++i) sums.push_back(scratch + encode_at_ + span * int64_t(sizeof(float) * i));
  float* const decoded = static_cast<float*>(sums.back());
  char* const stats_scratch = scratch + encode_at_ + span * int64_t(sizeof(float) * (k + 1));
  sums.pop_back();
  std::atomic<int64_t> uncounted{0};  // bytes that are read again, from the caches
  const Inputs inputs = inputs_of(step, scratch), again = inputs_of(step, scratch, &uncounted);
  RowStats* const stats = &stats_[piece.stats];
  int64_t start = block.offset, at = start;  // what is staged, in the first sink
  for (int64_t first = piece.first, stop = first; first < end && !cancelled_; first = stop) {
    stop = std::min(end, encoding.end_of_bands(first, span));
    const auto [from, blocks] = encoding.blocks(first, stop - first);
    const bool held = stop - first <= span && !encoding.known();  // sums are still there when scales are known
    std::vector<const void*> x;
    std::vector<ScaleRun> scales;
    if (!encoding.known()) {
      std::vector<std::vector<uint32_t>> magnitudes(k, std::vector<uint32_t>(size_t(blocks)));
      std::vector<RowStats> ignored(k);
      for (int64_t e = first; e < stop && !cancelled_; e += span) {
        const int64_t count = std::min(span, stop - e);
        x = sum(inputs, step, e, count, scratch, sums, 0, held ? stats : ignored.data());
        for (size_t i = 0; i < k; ++i)
          encoding.measure(static_cast<const float*>(sums[i]), e, count, from, magnitudes[i].data());
      }
      for (size_t i = 0; i < k; ++i) scales.push_back(encoding.scales_of(from, magnitudes[i]));
    } else {
      for (size_t i = 0; i < k; ++i) scales.push_back(encoding.known_scales(i, first, stop - first));
    }
    for (size_t i = 0; i < k && !encoding.places().empty(); ++i) write_scales(encoding, i, scales[i], from, blocks);
    for (int64_t e = first; e < stop && !cancelled_; e += span) {
      const int64_t count = std::min(span, stop - e), size = encoding.codes(0, count).second;
      if (!held) x = sum(encoding.known() ? inputs : again, step, e, count, scratch, sums, 0, stats);
      const int every = options_.stats_every;
      bool sampled = false;
      for (int64_t c = e / kChunk; every > 0 && c * kChunk < e + count; ++c) sampled = sampled || c % every == 0;
      for (size_t i = 0; i < k; ++i) {
        const float* const y = static_cast<const float*>(sums[i]);
        void* out = sinks_[size_t(step.sinks[i])].address(at + step.offsets[i] - step.offsets[0], size);
        if (!out) out = staged + out_stride_ * int64_t(i) + (at - start);
        encoding.encode(y, e, count, scales[i], out, sampled ? decoded : nullptr);
        const int pivot = step.sum->pivot(i);
        for (int64_t c = e / kChunk; sampled && pivot >= 0 && c * kChunk < e + count; ++c) {
          if (c % every != 0) continue;
          const int64_t a = std::max(c * kChunk, e) - e, b = std::min((c + 1) * kChunk, e + count) - e;
          const DType dtype = step.inputs[size_t(pivot)].dtype;
          encoding.add_stats(static_cast<const char*>(x[size_t(pivot)]) + a * size_of(dtype), dtype, y + a, decoded + a,
                             b - a, stats_scratch, &stats[i]);
        }
      }
      at += size;
      if (at >= (start / options_.write_bytes + 1) * options_.write_bytes || e + count == end) {
        write(step, start, at - start, staged);
        start = at;
      }
    }
  }
}

void Pump::write_scales(const Encoding& encoding, size_t output, const ScaleRun& scales, int64_t from, int64_t count) {
  const Encoding::Place& place = encoding.places()[output];
  const Sink& sink = sinks_[size_t(place.sink)];
  const int64_t size = encoding.scale_bytes(), offset = place.offset + from * size, bytes = count * size;
  if (count == 0) return;
  const char* const stored = scales.stored.data() + (from - scales.first) * size;
  if (char* const address = sink.address(offset, bytes))
    memcpy(address, stored, size_t(bytes));
  else
    sink.write(offset, bytes, stored);
  bytes_written_ += bytes;
}

}  // namespace fi
