#include "step.h"

#include <algorithm>
#include <cstring>

namespace fi {

namespace {

// Calls take(part, offset, bytes) for every run of bytes of a gathered operand that lie one behind the other in one of
// its parts, in order; null for zeros.
template <class Take>
void for_runs(const Operand& from, int64_t first, int64_t count, Take take) {
  const int64_t start = first * from.width, end = start + count * from.width;
  const std::vector<RowMap::Location>& rows = from.gathered->rows;
  const int64_t size = from.gathered->row_bytes;
  for (int64_t at = start; at < end;) {
    int64_t row = at / size;
    const RowMap::Location location = rows[size_t(row)];
    const int64_t offset = location.offset + at % size;
    int64_t run = size - at % size;
    const auto goes_on = [&](const RowMap::Location& next) {
      return next.part == location.part && (location.part < 0 || next.offset == offset + run);
    };
    for (; at + run < end && goes_on(rows[size_t(row + 1)]); ++row) run += size;
    run = std::min(run, end - at);
    take(location.part < 0 ? nullptr : &from.gathered->parts[size_t(location.part)], offset, run);
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
  if (!from.gathered) {
    sources_[size_t(from.source)].read(from.offset + first * from.width, count * from.width, to);
    *bytes_read_ += count * from.width;
    return;
  }
  char* next = static_cast<char*>(to);
  for_runs(from, first, count, [&](const RowMap::Part* part, int64_t offset, int64_t bytes) {
    if (!part) {
      memset(next, 0, size_t(bytes));
    } else if (part->decoding) {
      part->decoding->read(sources_, part->source, part->offset, offset / from.width, bytes / from.width, next, scratch_,
                           bytes_read_);
    } else {
      sources_[size_t(part->source)].read(part->offset + offset, bytes, next);
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
  if (!from.gathered) return sources_[size_t(from.source)].prefetch(from.offset + first * from.width, count * from.width);
  for_runs(from, first, count, [&](const RowMap::Part* part, int64_t offset, int64_t bytes) {
    if (!part) return;
    const auto [start, length] = part->decoding ? part->decoding->stored(offset / from.width, bytes / from.width)
                                                : std::make_pair(offset, bytes);
    sources_[size_t(part->source)].prefetch(part->offset + start, length);
  });
}

int64_t decoding_scratch(const Step& step) {
  int64_t bytes = 0;
  for (const Operand& input : step.inputs) {
    if (input.low_rank) bytes = std::max(bytes, input.low_rank->scratch_bytes());
    if (input.decoding) bytes = std::max(bytes, input.decoding->scratch_bytes());
    if (!input.gathered) continue;
    for (const RowMap::Part& part : input.gathered->parts)
      if (part.decoding) bytes = std::max(bytes, part.decoding->scratch_bytes());
  }
  return bytes;
}

void release_held(const Step& step) {
  for (const Operand& input : step.inputs) {
    if (input.decoding) input.decoding->release();
    if (input.low_rank) input.low_rank->release();
    if (!input.gathered) continue;
    for (const RowMap::Part& part : input.gathered->parts)
      if (part.decoding) part.decoding->release();
  }
}

}  // namespace fi
