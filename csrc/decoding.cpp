#include "decoding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "ops.h"

namespace fi {

namespace {

constexpr int64_t kHeldBytes = 256 << 10;  // of a companion that is held; of a larger one, spans read a range
constexpr int64_t kRangeBytes = 64 << 10;  // of a companion, that one span needs

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
  const int64_t size = decoder_.block_elements, begin = first / size, end = (first + count + size - 1) / size;
  return {begin * decoder_.block_bytes, (end - begin) * decoder_.block_bytes};
}

// Decoded elements that are not wanted where they would lie, the bytes that are read of a file, ranges of companions.
int64_t Decoding::scratch_bytes() const {
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
    loaded->companions[i] = sources[size_t(c.source)].get(c.offset, c.bytes, loaded->copies.back().get());
    *bytes_read += c.bytes;
  }
  held_ = loaded;
  return loaded;
}

void Decoding::release() const {
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

}  // namespace fi
