#include "step.h"

#include <algorithm>
#include <cstring>

namespace fi {

namespace {

// Calls take(source, offset, bytes) for every run of bytes that lie one behind the other, in order; source -1 for
// zeros.
template <class Take>
void for_runs(const Operand& from, int64_t first, int64_t count, Take take) {
  const int64_t start = first * from.width, end = start + count * from.width;
  if (!from.gathered) return take(from.source, from.offset + start, end - start);
  const std::vector<RowMap::Location>& rows = from.gathered->rows;
  const int64_t size = from.gathered->row_bytes;
  for (int64_t at = start; at < end;) {
    int64_t row = at / size;
    const RowMap::Location location = rows[size_t(row)];
    const int64_t offset = location.offset + at % size;
    int64_t run = size - at % size;
    const auto goes_on = [&](const RowMap::Location& next) {
      return next.source == location.source && (location.source < 0 || next.offset == offset + run);
    };
    for (; at + run < end && goes_on(rows[size_t(row + 1)]); ++row) run += size;
    run = std::min(run, end - at);
    take(location.source, offset, run);
    at += run;
  }
}

}  // namespace

int64_t read_span(const std::vector<DType>& dtypes) {
  constexpr int64_t kWidest = 8, kAll = 24;  // bytes of an element where one chunk fits; of all inputs, 384 KiB
  int64_t widest = 1, all = 0;
  for (const DType d : dtypes) {
    widest = std::max<int64_t>(widest, size_of(d));
    all += size_of(d);
  }
  return kChunk * std::max<int64_t>(1, std::min(kWidest / widest, kAll / std::max<int64_t>(all, 1)));
}

const void* Inputs::get(size_t input, int64_t first, int64_t count, void* to) const {
  const Operand& from = step_.inputs[input];
  if (from.gathered || from.decoding || from.low_rank) {
    read(input, first, count, to);
    return to;
  }
  *bytes_read_ += count * from.width;
  return sources_[size_t(from.source)].get(from.offset + first * from.width, count * from.width, to);
}

void Inputs::read(size_t input, int64_t first, int64_t count, void* to) const {
  const Operand& from = step_.inputs[input];
  if (from.low_rank) return from.low_rank->read(sources_, first, count, to, scratch_, bytes_read_);
  if (from.decoding)
    return from.decoding->read(sources_, from.source, from.offset, first, count, to, scratch_, bytes_read_);
  char* next = static_cast<char*>(to);
  for_runs(from, first, count, [&](int source, int64_t offset, int64_t bytes) {
    if (source < 0) {
      memset(next, 0, size_t(bytes));
    } else {
      sources_[size_t(source)].read(offset, bytes, next);
      *bytes_read_ += bytes;
    }
    next += bytes;
  });
}

void Inputs::prefetch(size_t input, int64_t first, int64_t count) const {
  const Operand& from = step_.inputs[input];
  if (from.low_rank) return from.low_rank->prefetch(sources_, first, count);
  if (from.decoding) {
    const auto [offset, bytes] = from.decoding->stored(first, count);
    return sources_[size_t(from.source)].prefetch(from.offset + offset, bytes);
  }
  for_runs(from, first, count, [&](int source, int64_t offset, int64_t bytes) {
    if (source >= 0) sources_[size_t(source)].prefetch(offset, bytes);
  });
}

int64_t decoding_scratch(const Step& step) {
  int64_t bytes = 0;
  for (const Operand& input : step.inputs)
    if (input.low_rank)
      bytes = std::max(bytes, input.low_rank->scratch_bytes());
    else if (input.decoding)
      bytes = std::max(bytes, input.decoding->scratch_bytes());
  return bytes;
}

}  // namespace fi
