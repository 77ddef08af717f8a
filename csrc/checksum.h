// Checksums of the data section of a file, computed while it is written: fastinterp/reference/checksum.py defines them.
//
// The file is cut at multiples of kCellBytes; a cell's bytes are those of the section that lie in it, and its hash is
// XXH3-64 of them with the cell's index as seed. A region is as many cells as have kRegionBytes, and its checksum is
// the sum of their hashes, modulo 2^64. So neither the order nor the cuts of writes matter.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "xxh3.h"

namespace fi {

constexpr int64_t kCellBytes = 32 << 10;
constexpr int64_t kRegionBytes = 64 << 20;

// All functions may be called from several threads at once, but for restore.
class FileChecksum {
 public:
  // fd          of the file, open for reading
  // begin, end  the section, bytes of the file
  FileChecksum(const Xxh3& xxh3, int fd, int64_t begin, int64_t end);

  int fd() const { return fd_; }
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }

  // Hashes bytes that are written at `offset`, within the section. A cell that comes in parts is hashed where each part
  // follows on the one before it. Bytes that come again are those that came before.
  void add(int64_t offset, int64_t size, const void* bytes);

  // The checksum of every region from that of `begin` on. What has not been hashed is read from the file first, by
  // several threads; none of it may be written meanwhile. Throws IoError.
  std::vector<uint64_t> regions(int threads);

  // What of a region has been hashed: the sum so far, and a bit per cell, the lowest of the first byte first.
  struct Progress {
    uint64_t sum;
    std::vector<uint8_t> hashed;
  };
  int64_t first_region() const { return begin_ / kRegionBytes; }
  int64_t region_count() const { return int64_t(sums_.size()); }
  Progress progress(int64_t region) const;
  // The progress of an earlier process, instead of this one's. Throws std::invalid_argument.
  void restore(int64_t region, const Progress& progress);
  // Whether the cells of a region that have been hashed are in the file as they were. Reads them. Throws IoError.
  bool matches(int64_t region) const;

 private:
  static constexpr int64_t kCells = kRegionBytes / kCellBytes;  // of a region
  static constexpr size_t kParts = 256;                         // of cells that are hashed in part

  // A cell that is hashed up to `end`.
  struct Part {
    int64_t end;
    Xxh3State state;
  };

  int64_t begin_of(int64_t cell) const;
  int64_t end_of(int64_t cell) const;
  int64_t slot(int64_t region) const;  // index in sums_. Throws std::invalid_argument
  bool is_hashed(int64_t cell) const;
  void take(int64_t cell, uint64_t hash);
  std::unique_ptr<Part> part_ending_at(int64_t offset);
  void keep(std::unique_ptr<Part> part);

  const Xxh3& xxh3_;
  const int fd_;
  const int64_t begin_, end_;
  std::vector<std::atomic<uint64_t>> sums_;    // of the regions
  std::vector<std::atomic<uint64_t>> hashed_;  // a bit per cell, from the first of the first region on
  std::mutex mutex_;
  std::vector<std::unique_ptr<Part>> parts_;  // the oldest first
};

}  // namespace fi
