#include "decoding.h"

#include <algorithm>
#include <cstring>

#include "ops.h"

namespace fi {

struct Decoding::Held {
  std::vector<std::unique_ptr<char[]>> copies;  // of those that are not in memory
  std::vector<const void*> companions;
  std::vector<int64_t> bytes;
};

Decoding::Decoding(const Decoder& decoder, int64_t numel, int64_t columns, std::vector<Companion> companions,
                   std::vector<double> parameters)
    : decoder_(decoder),
      numel_(numel),
      columns_(columns),
      most_(kChunk / decoder.block_elements * decoder.block_elements),
      companions_(std::move(companions)),
      parameters_(std::move(parameters)) {}

std::pair<int64_t, int64_t> Decoding::stored(int64_t first, int64_t count) const {
  const int64_t size = decoder_.block_elements, begin = first / size, end = (first + count + size - 1) / size;
  return {begin * decoder_.block_bytes, (end - begin) * decoder_.block_bytes};
}

// Decoded elements that are not wanted where they would lie, then the bytes that are read of a file.
int64_t Decoding::scratch_bytes() const {
  return kChunk * int64_t(sizeof(float)) + most_ / decoder_.block_elements * decoder_.block_bytes;
}

std::shared_ptr<const Decoding::Held> Decoding::held(const std::vector<Source>& sources,
                                                     std::atomic<int64_t>* bytes_read) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (held_) return held_;
  auto loaded = std::make_shared<Held>();
  for (const Companion& c : companions_) {
    loaded->copies.emplace_back(new char[size_t(c.bytes)]);
    loaded->companions.push_back(sources[size_t(c.source)].get(c.offset, c.bytes, loaded->copies.back().get()));
    loaded->bytes.push_back(c.bytes);
    *bytes_read += c.bytes;
  }
  held_ = loaded;
  return loaded;
}

void Decoding::release() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  held_.reset();
}

void Decoding::read(const std::vector<Source>& sources, int source, int64_t offset, int64_t first, int64_t count,
                    void* to, char* scratch, std::atomic<int64_t>* bytes_read) const {
  const std::shared_ptr<const Held> companions = held(sources, bytes_read);
  const int64_t size = decoder_.block_elements, end = first + count;
  float* const aside = reinterpret_cast<float*>(scratch);
  char* const raw = scratch + kChunk * int64_t(sizeof(float));
  char* next = static_cast<char*>(to);
  DecodeArgs args{};
  args.numel = numel_;
  args.columns = columns_;
  args.companions = companions->companions.data();
  args.companion_bytes = companions->bytes.data();
  args.companion_count = int(companions->bytes.size());
  args.parameters = parameters_.data();
  args.parameter_count = int(parameters_.size());
  for (int64_t at = first; at < end;) {
    args.first = at / size * size;
    args.count = std::min(most_, (end - args.first + size - 1) / size * size);
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
