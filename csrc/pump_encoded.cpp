// The pump's steps whose outputs are encoded.
#include <algorithm>
#include <cstring>

#include "pump.h"

namespace fi {

// A piece that one thread encodes, and its scratch: sums that are kept until their scales are known, room for a span of
// others, what a span was encoded as, and for statistics.
struct Pump::EncodedPiece {
  const Step& step;
  const Encoding& encoding;
  const Inputs inputs, again;  // again: of bytes that are read once more, from the caches, and not counted
  char* const scratch;
  float* const sums;
  const int64_t span, kept;  // elements, of each output
  RowStats* const stats;

  size_t outputs() const { return step.sinks.size(); }
  // Where the sums of an output lie, of a span that begins `done` elements behind the start of its bands.
  float* sums_at(size_t output, int64_t done) const {
    return sums + int64_t(output) * (kept + span) + (done < kept ? done : kept);
  }
  std::vector<void*> all_at(int64_t done) const {
    std::vector<void*> all;
    for (size_t i = 0; i < outputs(); ++i) all.push_back(sums_at(i, done));
    return all;
  }
  float* decoded() const { return sums_at(outputs(), 0); }
  char* stats_scratch() const { return reinterpret_cast<char*>(decoded() + span); }
};

// Elements of sums that are kept of each output of a step: whole spans, so that a band of rows need not be summed twice
// as far as it fits kKeptBytes.
int64_t Pump::kept_of(const Step& step) const {
  const int64_t span = span_of(step);
  return step.encoding->known() ? 0 : kKeptBytes / int64_t(sizeof(float) * step.sinks.size()) / span * span;
}

int64_t Pump::encoding_scratch(const Step& step) const {
  const int64_t sums = int64_t(step.sinks.size()) * (kept_of(step) + span_of(step)) + span_of(step);
  return sums * int64_t(sizeof(float)) + Encoding::kStatsBytes;
}

// Bands are summed, measured and encoded a span at a time. What is longer than can be kept is summed twice, so that no
// scratch grows with the tensor.
void Pump::run_encoded(const Block& block, char* scratch) {
  const Piece& piece = pieces_[block.begin];
  const Step& step = steps_[size_t(piece.step)];
  std::atomic<int64_t> uncounted{0};
  const EncodedPiece p{step,
                       *step.encoding,
                       inputs_of(step, scratch),
                       inputs_of(step, scratch, &uncounted),
                       scratch,
                       reinterpret_cast<float*>(scratch + encode_at_),
                       span_of(step),
                       kept_of(step),
                       &stats_[piece.stats]};
  const int64_t end = piece.first + piece.count;
  char* const staged = scratch + scratch_bytes_ - decode_bytes_ - out_stride_ * int64_t(p.outputs());
  int64_t start = block.offset, at = start;  // what is staged, in the first sink
  for (int64_t first = piece.first, stop = first; first < end && !cancelled_; first = stop) {
    stop = std::min(end, p.encoding.end_of_bands(first, p.span));
    std::vector<const void*> x;  // the inputs of the last span
    const std::vector<ScaleRun> scales = scales_of(p, first, stop, &x);
    for (int64_t e = first; e < stop && !cancelled_; e += p.span) {
      const int64_t count = std::min(p.span, stop - e), size = p.encoding.codes(0, count).second, done = e - first;
      std::vector<RowStats> ignored(p.outputs());
      if (p.encoding.known())
        x = sum(p.inputs, step, e, count, scratch, p.all_at(done), 0, p.stats);
      else if (stop - first > p.span && (done >= p.kept || is_sampled(e, count)))
        x = sum(p.again, step, e, count, scratch, p.all_at(done), 0, ignored.data());
      std::vector<void*> out;
      for (size_t i = 0; i < p.outputs(); ++i) {
        out.push_back(sinks_[size_t(step.sinks[i])].address(at + step.offsets[i] - step.offsets[0], size));
        if (!out[i]) out[i] = staged + out_stride_ * int64_t(i) + (at - start);
      }
      encode_span(p, e, count, done, x, scales, out);
      at += size;
      if (at >= (start / options_.write_bytes + 1) * options_.write_bytes || e + count == end) {
        write(step, start, at - start, staged);
        start = at;
      }
    }
  }
}

// The scales of bands, which are written; their sums, as far as they are kept, and the inputs of the last span.
std::vector<ScaleRun> Pump::scales_of(const EncodedPiece& p, int64_t first, int64_t stop, std::vector<const void*>* x) {
  const auto [from, blocks] = p.encoding.blocks(first, stop - first);
  std::vector<ScaleRun> scales;
  if (p.encoding.known()) {
    for (size_t i = 0; i < p.outputs(); ++i) scales.push_back(p.encoding.known_scales(i, first, stop - first));
  } else {
    std::vector<std::vector<uint32_t>> magnitudes(p.outputs(), std::vector<uint32_t>(size_t(blocks)));
    for (int64_t e = first; e < stop && !cancelled_; e += p.span) {
      const int64_t count = std::min(p.span, stop - e);
      *x = sum(p.inputs, p.step, e, count, p.scratch, p.all_at(e - first), 0, p.stats);
      for (size_t i = 0; i < p.outputs(); ++i)
        p.encoding.measure(p.sums_at(i, e - first), e, count, from, magnitudes[i].data());
    }
    for (size_t i = 0; i < p.outputs(); ++i) scales.push_back(p.encoding.scales_of(from, magnitudes[i]));
  }
  for (size_t i = 0; i < p.outputs() && !p.encoding.places().empty(); ++i)
    write_scales(p.encoding, i, scales[i], from, blocks);
  return scales;
}

void Pump::encode_span(const EncodedPiece& p, int64_t first, int64_t count, int64_t done,
                       const std::vector<const void*>& x, const std::vector<ScaleRun>& scales,
                       const std::vector<void*>& out) {
  const bool sampled = is_sampled(first, count);
  for (size_t i = 0; i < p.outputs(); ++i) {
    const float* const y = p.sums_at(i, done);
    p.encoding.encode(y, first, count, scales[i], out[i], sampled ? p.decoded() : nullptr);
    const int pivot = p.step.sum->pivot(i);
    for (int64_t c = first / kChunk; sampled && pivot >= 0 && c * kChunk < first + count; ++c) {
      if (c % options_.stats_every != 0) continue;
      const int64_t a = std::max(c * kChunk, first) - first, b = std::min((c + 1) * kChunk, first + count) - first;
      const DType dtype = p.step.inputs[size_t(pivot)].dtype;
      p.encoding.add_stats(static_cast<const char*>(x[size_t(pivot)]) + a * size_of(dtype), dtype, y + a,
                           p.decoded() + a, b - a, p.stats_scratch(), &p.stats[i]);
    }
  }
}

// Whether any of the elements are in a chunk that statistics look at.
bool Pump::is_sampled(int64_t first, int64_t count) const {
  const int every = options_.stats_every;
  for (int64_t c = first / kChunk; every > 0 && c * kChunk < first + count; ++c)
    if (c % every == 0) return true;
  return false;
}

void Pump::write_scales(const Encoding& encoding, size_t output, const ScaleRun& scales, int64_t from, int64_t count) {
  const Encoding::Place& place = encoding.places()[output];
  const Sink& sink = sinks_[size_t(place.sink)];
  const int64_t size = encoding.scale_bytes(), offset = place.offset + from * size, bytes = count * size;
  if (count == 0) return;
  refuse_faults();
  const char* const stored = scales.stored.data() + (from - scales.first) * size;
  if (char* const address = sink.address(offset, bytes))
    memcpy(address, stored, size_t(bytes));
  else
    sink.write(offset, bytes, stored);
  bytes_written_ += bytes;
}

}  // namespace fi
