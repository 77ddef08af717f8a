// Where bytes come from and go to: a file or memory. Positioned reads and writes only, so threads share one handle.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fi {

// A read or write that failed. `handle` is the index of the source or sink; `error` is errno, or 0 for a file that
// ended too early: it was cut while it was being read.
struct IoError : std::runtime_error {
  IoError(bool on_write, int which, int code, int64_t at, int64_t wanted, int64_t got);
  bool write;
  int handle, error;
  int64_t offset, expected, done;
};

class Source {
 public:
  Source(int index, int fd) : index_(index), fd_(fd), memory_(nullptr) {}
  Source(int index, const void* memory) : index_(index), fd_(-1), memory_(static_cast<const char*>(memory)) {}

  // The bytes [offset, offset + size): read into `scratch`, or in place when they are in memory already.
  const void* get(int64_t offset, int64_t size, void* scratch) const;

  // Asks the kernel to have these bytes ready soon. A hint: errors do not matter.
  void prefetch(int64_t offset, int64_t size) const;

 private:
  int index_, fd_;
  const char* memory_;
};

class Sink {
 public:
  Sink(int index, int fd) : index_(index), fd_(fd), memory_(nullptr) {}
  Sink(int index, void* memory) : index_(index), fd_(-1), memory_(static_cast<char*>(memory)) {}

  // Where `size` bytes for `offset` should be put together: `scratch`, or their last place when that is memory.
  void* stage(int64_t offset, void* scratch) const;
  void put(int64_t offset, int64_t size, const void* staged) const;

 private:
  int index_, fd_;
  char* memory_;
};

// Reserves `size` bytes of a file that is open for writing, so that a full disk shows before any work is done. File
// systems that cannot reserve get a file of that length. Returns 0 or errno.
int reserve(int fd, int64_t size);

// The part of [offset, offset + size) of a file that is in the page cache, from 64 sampled pages: 0..1, or -1 if
// unknown.
double cached_fraction(int fd, int64_t size);

}  // namespace fi
