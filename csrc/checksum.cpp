#include "checksum.h"

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "io.h"

namespace fi {

namespace {

constexpr int64_t kRunCells = 8;  // that are read at a time: 256 KiB

int64_t regions_of(int64_t begin, int64_t end) {
  return begin < end ? (end - 1) / kRegionBytes - begin / kRegionBytes + 1 : 0;
}

}  // namespace

FileChecksum::FileChecksum(const Xxh3& xxh3, int fd, int64_t begin, int64_t end)
    : xxh3_(xxh3),
      fd_(fd),
      begin_(begin),
      end_(end),
      sums_(size_t(regions_of(begin, end))),
      hashed_(sums_.size() * size_t(kCells / 64)) {
  if (begin < 0 || end < begin) throw std::invalid_argument("a section begins at 0 or later, and ends behind that");
}

int64_t FileChecksum::begin_of(int64_t cell) const { return std::max(begin_, cell * kCellBytes); }

int64_t FileChecksum::end_of(int64_t cell) const { return std::min(end_, (cell + 1) * kCellBytes); }

bool FileChecksum::is_hashed(int64_t cell) const {
  const int64_t bit = cell - first_region() * kCells;
  return hashed_[size_t(bit / 64)] >> (bit % 64) & 1;
}

void FileChecksum::take(int64_t cell, uint64_t hash) {
  const int64_t bit = cell - first_region() * kCells;
  const uint64_t mask = uint64_t(1) << (bit % 64);
  if ((hashed_[size_t(bit / 64)].fetch_or(mask) & mask) == 0) sums_[size_t(bit / kCells)] += hash;
}

void FileChecksum::add(int64_t offset, int64_t size, const void* bytes) {
  if (offset < begin_ || size < 0 || size > end_ - offset) throw std::invalid_argument("bytes outside of the section");
  const char* from = static_cast<const char*>(bytes);
  for (const int64_t stop = offset + size; offset < stop;) {
    const int64_t cell = offset / kCellBytes, until = std::min(stop, end_of(cell)), count = until - offset;
    const bool from_begin = offset == begin_of(cell), to_end = until == end_of(cell);
    if (from_begin && to_end) {
      take(cell, xxh3_.hash(from, size_t(count), uint64_t(cell)));
    } else if (std::unique_ptr<Part> part = from_begin ? std::make_unique<Part>() : part_ending_at(offset)) {
      if (from_begin) xxh3_.begin(&part->state, uint64_t(cell));
      xxh3_.add(&part->state, from, size_t(count));
      part->end = until;
      if (to_end)
        take(cell, xxh3_.end(&part->state));
      else
        keep(std::move(part));
    }
    offset = until;
    from += count;
  }
}

std::unique_ptr<FileChecksum::Part> FileChecksum::part_ending_at(int64_t offset) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto part = parts_.rbegin(); part != parts_.rend(); ++part)
    if ((*part)->end == offset) {
      std::unique_ptr<Part> found = std::move(*part);
      parts_.erase(std::next(part).base());
      return found;
    }
  return nullptr;
}

// Of too many parts the oldest are dropped: nothing may ever follow on them, since threads write at several places.
void FileChecksum::keep(std::unique_ptr<Part> part) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (parts_.size() == kParts) parts_.erase(parts_.begin());
  parts_.push_back(std::move(part));
}

std::vector<uint64_t> FileChecksum::regions(int threads) {
  const int64_t first = begin_ / kCellBytes, cells = end_ > begin_ ? (end_ - 1) / kCellBytes + 1 - first : 0;
  std::vector<int64_t> missing;
  for (int64_t cell = first; cell < first + cells; ++cell)
    if (!is_hashed(cell)) missing.push_back(cell);
  std::atomic<size_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      std::vector<char> bytes(size_t(kRunCells * kCellBytes));
      for (;;) {
        const size_t from = next.fetch_add(kRunCells), to = std::min(from + kRunCells, missing.size());
        for (size_t i = from; i < to;) {
          size_t run = i + 1;  // cells that follow each other are read together
          while (run < to && missing[run] == missing[run - 1] + 1) ++run;
          const int64_t start = begin_of(missing[i]);
          Source(0, fd_).read(start, end_of(missing[run - 1]) - start, bytes.data());
          for (; i < run; ++i) {
            const int64_t at = begin_of(missing[i]), size = end_of(missing[i]) - at;
            take(missing[i], xxh3_.hash(bytes.data() + (at - start), size_t(size), uint64_t(missing[i])));
          }
        }
        if (to == missing.size()) return;
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
      next = missing.size();
    }
  };
  const int64_t runs = (int64_t(missing.size()) + kRunCells - 1) / kRunCells;
  std::vector<std::thread> others;
  for (int64_t i = 1; i < std::min<int64_t>(threads, runs); ++i) {
    try {
      others.emplace_back(work);
    } catch (const std::system_error&) {  // the system allows no more threads: this one does it
      break;
    }
  }
  work();
  for (std::thread& thread : others) thread.join();
  if (error) std::rethrow_exception(error);
  return {sums_.begin(), sums_.end()};
}

int64_t FileChecksum::slot(int64_t region) const {
  if (region < first_region() || region - first_region() >= region_count())
    throw std::invalid_argument("a region outside of the section");
  return region - first_region();
}

FileChecksum::Progress FileChecksum::progress(int64_t region) const {
  const int64_t index = slot(region);
  Progress progress{sums_[size_t(index)], std::vector<uint8_t>(size_t(kCells / 8))};
  for (int64_t cell = 0; cell < kCells; ++cell)
    progress.hashed[size_t(cell / 8)] |= uint8_t(is_hashed(region * kCells + cell) << (cell % 8));
  return progress;
}

void FileChecksum::restore(int64_t region, const Progress& progress) {
  const int64_t index = slot(region);
  if (int64_t(progress.hashed.size()) != kCells / 8) throw std::invalid_argument("a region has a bit for each cell");
  for (int64_t word = 0; word < kCells / 64; ++word) {
    uint64_t bits = 0;
    for (int64_t byte = 0; byte < 8; ++byte) bits |= uint64_t(progress.hashed[size_t(word * 8 + byte)]) << (8 * byte);
    hashed_[size_t(index * kCells / 64 + word)] = bits;
  }
  sums_[size_t(index)] = progress.sum;
}

bool FileChecksum::matches(int64_t region) const {
  const int64_t index = slot(region);
  const int64_t first = std::max(region * kCells, begin_ / kCellBytes);
  const int64_t last = std::min((region + 1) * kCells, (end_ - 1) / kCellBytes + 1);
  std::vector<char> bytes(static_cast<size_t>(kCellBytes));
  uint64_t sum = 0;
  for (int64_t cell = first; cell < last; ++cell) {
    if (!is_hashed(cell)) continue;
    const int64_t at = begin_of(cell), size = end_of(cell) - at;
    Source(0, fd_).read(at, size, bytes.data());
    sum += xxh3_.hash(bytes.data(), size_t(size), uint64_t(cell));
  }
  return sum == sums_[size_t(index)];
}

}  // namespace fi
