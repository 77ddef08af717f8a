// Where bytes come from and go to. Positioned reads and writes only, so threads share one handle.
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
  Source(int index, int fd) : index_(index), fd_(fd) {}

  // Reads the bytes [offset, offset + size).
  void get(int64_t offset, int64_t size, void* to) const;

  // Asks the kernel to have these bytes ready soon. A hint: errors do not matter.
  void prefetch(int64_t offset, int64_t size) const;

 private:
  int index_, fd_;
};

class Sink {
 public:
  Sink(int index, int fd) : index_(index), fd_(fd) {}

  // Writes `size` bytes at `offset`.
  void put(int64_t offset, int64_t size, const void* from) const;

 private:
  int index_, fd_;
};

// Reserves `size` bytes of a file that is open for writing, so that a full disk shows before any work is done. File
// systems that cannot reserve get a file of that length. Returns 0 or errno.
int reserve(int fd, int64_t size);

// The part of a file's first `size` bytes that is in the page cache, from 64 sampled pages: 0..1, or -1 if unknown.
double cached_fraction(int fd, int64_t size);

}  // namespace fi
