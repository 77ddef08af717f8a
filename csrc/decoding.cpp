#include "decoding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "ops.h"

namespace fi {

namespace {

constexpr int64_t kHeldBytes = 256 << 10;  // of a companion that is held; of a larger one, spans read a range
constexpr int64_t kRangeBytes = 64 << 10;  // of a companion, that one span needs
// Columns of a matrix that are transposed at a time: whole lines of the cache are written, and what is read stays in
// it.
constexpr int64_t kSlabColumns = 64, kSlabBytes = 256 << 10;

}  // namespace

struct Decoding::Held {
  std::vector<std::unique_ptr<char[]>> copies;  // of those that are not in memory
  std::vector<const void*> companions;          // null: not held
};

Decoding::Decoding(const Decoder& decoder, int64_t numel, int64_t columns, std::vector<Companion> companions,
                   std::vector<double> parameters)
    : decoder_(decoder),
      numel_(numel),
      columns_(columns),
      most_(kChunk / decoder.block_elements * decoder.block_elements),
      companions_(std::move(companions)),
      parameters_(std::move(parameters)) {
  for (const Companion& c : companions_) companion_bytes_.push_back(c.bytes);
  check();
  if (!decoder_.transpose) return;
  int64_t bytes = column_bytes();
  for (size_t i = 0; i < companions_.size(); ++i) bytes += companion_column(int(i));
  const int64_t slabs = (columns_ + slab_columns() - 1) / slab_columns();
  matrices_ = std::make_unique<TransposedMatrices>(matrix_elements(), bytes * columns_, slabs);
}

void Decoding::check() const {
  const DecodeArgs args = args_of(0, numel_);
  const std::string what = "decoder " + std::string(decoder_.name) + ": ";
  if (const char* wrong = decoder_.wrong ? decoder_.wrong(args) : nullptr) throw std::invalid_argument(what + wrong);
  if (!decoder_.companion_range) return;
  for (size_t i = 0; i < companions_.size(); ++i) {
    const ByteRange all = decoder_.companion_range(args, int(i));
    if (all.from + all.bytes != companion_bytes_[i])
      throw std::invalid_argument(what + "companion " + std::to_string(i) + " has " +
                                  std::to_string(companion_bytes_[i]) + " bytes, and the tensor needs " +
                                  std::to_string(all.from + all.bytes));
  }
}

// Without bytes, companions and a place for the result.
DecodeArgs Decoding::args_of(int64_t first, int64_t count) const {
  DecodeArgs args{};
  args.first = first;
  args.count = count;
  args.numel = numel_;
  args.columns = columns_;
  args.companion_bytes = companion_bytes_.data();
  args.companion_count = int(companions_.size());
  args.parameters = parameters_.data();
  args.parameter_count = int(parameters_.size());
  return args;
}

std::pair<int64_t, int64_t> Decoding::stored(int64_t first, int64_t count) const {
  if (matrices_) {
    const int64_t size = matrix_elements(), begin = first / size, end = (first + count + size - 1) / size;
    return {begin * columns_ * column_bytes(), (end - begin) * columns_ * column_bytes()};
  }
  const int64_t size = decoder_.block_elements, begin = first / size, end = (first + count + size - 1) / size;
  return {begin * decoder_.block_bytes, (end - begin) * decoder_.block_bytes};
}

// Decoded elements that are not wanted where they would lie, the bytes that are read of a file, ranges of companions.
int64_t Decoding::scratch_bytes() const {
  if (matrices_) {
    int64_t column = column_bytes();
    for (size_t i = 0; i < companions_.size(); ++i) column += companion_column(int(i));
    return kChunk * int64_t(sizeof(float)) + slab_columns() * column;
  }
  int64_t bytes = kChunk * int64_t(sizeof(float)) + most_ / decoder_.block_elements * decoder_.block_bytes;
  for (size_t i = 0; i < companions_.size(); ++i) bytes += is_held(int(i)) ? 0 : kRangeBytes;
  return bytes;
}

bool Decoding::is_held(int companion) const {
  return !decoder_.companion_range || companion_bytes_[size_t(companion)] <= kHeldBytes;
}

std::shared_ptr<const Decoding::Held> Decoding::held(const std::vector<Source>& sources,
                                                     std::atomic<int64_t>* bytes_read) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (held_) return held_;
  auto loaded = std::make_shared<Held>();
  for (size_t i = 0; i < companions_.size(); ++i) {
    const Companion& c = companions_[i];
    loaded->companions.push_back(nullptr);
    if (!is_held(int(i))) continue;
    loaded->copies.emplace_back(new char[size_t(c.bytes)]);
    char* const copy = loaded->copies.back().get();
    // Not where they lie: if a page of a mapping failed, only the block that asked would be told.
    sources[size_t(c.source)].read(c.offset, c.bytes, copy);
    loaded->companions[i] = copy;
    *bytes_read += c.bytes;
  }
  held_ = loaded;
  return loaded;
}

void Decoding::release() const {
  if (matrices_) matrices_->release();
  const std::lock_guard<std::mutex> lock(mutex_);
  held_.reset();
}

// Reads the ranges that are needed of companions that are not held, and says in `at` where each companion would begin.
// There may be fewer elements than asked for afterwards: so many that each range fits its place.
void Decoding::read_ranges(const std::vector<Source>& sources, DecodeArgs* args, std::vector<const void*>* at,
                           char* scratch, std::atomic<int64_t>* bytes_read) const {
  const auto fits = [&] {
    for (size_t i = 0; i < companions_.size(); ++i)
      if (!is_held(int(i)) && decoder_.companion_range(*args, int(i)).bytes > kRangeBytes) return false;
    return true;
  };
  const int64_t size = decoder_.block_elements;
  while (args->count > size && !fits()) args->count = (args->count / size + 1) / 2 * size;
  for (size_t i = 0; i < companions_.size(); ++i) {
    if (is_held(int(i))) continue;
    const Companion& c = companions_[i];
    const ByteRange range = decoder_.companion_range(*args, int(i));
    const void* const bytes = sources[size_t(c.source)].get(c.offset + range.from, range.bytes, scratch);
    (*at)[i] = reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(bytes) - uintptr_t(range.from));
    *bytes_read += range.bytes;
    scratch += kRangeBytes;
  }
}

void Decoding::read(const std::vector<Source>& sources, int source, int64_t offset, int64_t first, int64_t count,
                    void* to, char* scratch, std::atomic<int64_t>* bytes_read) const {
  if (matrices_)
    return read_transposed(sources, source, offset, first, count, static_cast<char*>(to), scratch, bytes_read);
  const std::shared_ptr<const Held> held_companions = held(sources, bytes_read);
  std::vector<const void*> companions = held_companions->companions;
  const int64_t size = decoder_.block_elements, end = first + count;
  float* const aside = reinterpret_cast<float*>(scratch);
  char* const raw = scratch + kChunk * int64_t(sizeof(float));
  char* next = static_cast<char*>(to);
  for (int64_t at = first; at < end;) {
    const int64_t begin = at / size * size;
    DecodeArgs args = args_of(begin, std::min(most_, (end - begin + size - 1) / size * size));
    read_ranges(sources, &args, &companions, raw + most_ / size * decoder_.block_bytes, bytes_read);
    args.companions = companions.data();
    const auto [from, bytes] = stored(args.first, args.count);
    args.bytes = sources[size_t(source)].get(offset + from, bytes, raw);
    *bytes_read += bytes;
    const int64_t skipped = at - args.first, wanted = std::min(args.first + args.count, end) - at;
    const bool whole = wanted == args.count && reinterpret_cast<uintptr_t>(next) % alignof(float) == 0;
    args.to = whole ? reinterpret_cast<float*>(next) : aside;
    decoder_.decode(args);
    if (!whole) memcpy(next, aside + skipped, size_t(wanted) * sizeof(float));
    next += wanted * int64_t(sizeof(float));
    at += wanted;
  }
}

// ---- matrices that are stored by columns ---------------------------------------------------------------------------

int64_t Decoding::column_bytes() const {
  return int64_t(parameters_[0]) / decoder_.block_elements * decoder_.block_bytes;
}

int64_t Decoding::companion_column(int companion) const {
  return numel_ == 0 ? 0 : companion_bytes_[size_t(companion)] / (numel_ / int64_t(parameters_[0]));
}

int64_t Decoding::slab_columns() const {
  return std::max(int64_t(1), std::min({columns_, kSlabColumns, kSlabBytes / column_bytes()}));
}

void Decoding::fill_slab(const std::vector<Source>& sources, int source, int64_t offset, int64_t matrix, int64_t slab,
                         char* to, char* scratch, std::atomic<int64_t>* bytes_read) const {
  TransposeArgs args{};
  args.first = slab * slab_columns();
  args.count = std::min(slab_columns(), columns_ - args.first);
  args.rows = int64_t(parameters_[0]);
  args.columns = columns_;
  args.to = to;
  const int64_t column = matrix * columns_ + args.first;
  const auto get = [&](int from, int64_t begin, int64_t size) {
    const void* const bytes = sources[size_t(from)].get(begin + column * size, args.count * size, scratch);
    scratch += args.count * size;
    *bytes_read += args.count * size;
    return bytes;
  };
  args.bytes = get(source, offset, column_bytes());
  std::vector<const void*> companions;
  for (size_t i = 0; i < companions_.size(); ++i)
    companions.push_back(get(companions_[i].source, companions_[i].offset, companion_column(int(i))));
  args.companions = companions.data();
  decoder_.transpose(args);
}

void Decoding::read_transposed(const std::vector<Source>& sources, int source, int64_t offset, int64_t first,
                               int64_t count, char* to, char* scratch, std::atomic<int64_t>* bytes_read) const {
  float* const aside = reinterpret_cast<float*>(scratch);
  char* const raw = scratch + kChunk * int64_t(sizeof(float));
  const int64_t size = matrix_elements(), end = first + count;
  const bool aligned = reinterpret_cast<uintptr_t>(to) % alignof(float) == 0;
  for (int64_t at = first; at < end;) {
    const int64_t index = at / size, here = std::min(end, (index + 1) * size) - at;
    {
      const std::shared_ptr<TransposedMatrix> matrix = matrices_->get(index, scratch);
      DecodeArgs args = args_of(0, 0);
      args.numel = size;
      args.bytes = matrix->filled(
          [&](int64_t slab, char* bytes) { fill_slab(sources, source, offset, index, slab, bytes, raw, bytes_read); });
      for (int64_t done = 0; done < here; done += args.count) {
        args.first = at % size + done;
        args.count = std::min(here - done, kChunk);
        args.to = aligned ? reinterpret_cast<float*>(to) : aside;
        decoder_.decode(args);
        if (!aligned) memcpy(to, aside, size_t(args.count) * sizeof(float));
        to += args.count * int64_t(sizeof(float));
      }
    }
    matrices_->decoded(index, here);
    at += here;
  }
}

}  // namespace fi
