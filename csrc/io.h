// Sources and sinks of bytes: files, by positioned reads and writes only, so that threads share one handle, and memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace fi {

class FileChecksum;

// A read or write that failed. `handle` is the index of the source or sink; `error` is errno, or 0 for a file that
// ended too early: it was cut while it was being read.
struct IoError : std::runtime_error {
  IoError(bool on_write, int which, int code, int64_t at, int64_t wanted, int64_t got);
  bool write;
  int handle, error;
  int64_t offset, expected, done;
};

class MappedFile;
class RangeCache;

// Bytes to read: a file, mapped or not, one that is elsewhere, or a range of memory that its owner neither frees nor
// changes meanwhile.
class Source {
 public:
  Source(int index, int fd) : index_(index), fd_(fd) {}
  Source(int index, const void* memory, int64_t size)
      : index_(index), memory_(static_cast<const char*>(memory)), size_(size) {}
  Source(int index, std::shared_ptr<RangeCache> cache, int file) : index_(index), fd_(file), cache_(std::move(cache)) {}

  Source(int index, std::shared_ptr<MappedFile> mapped);

  // Reads of a file elsewhere end with an error when this becomes true.
  void end_with(const std::atomic<bool>* cancelled) { cancelled_ = cancelled; }

  bool is_mapped() const { return mapped_ != nullptr; }

  // The bytes [offset, offset + size): where they lie, if that is memory or a mapping, else `to`, into which they are
  // read.
  const void* get(int64_t offset, int64_t size, void* to) const;

  // Reads them into `to` in any case.
  void read(int64_t offset, int64_t size, void* to) const;

  // Asks the kernel to have these bytes ready soon. A hint: errors do not matter.
  void prefetch(int64_t offset, int64_t size) const;

 private:
  int index_, fd_ = -1;  // or the number of a file elsewhere
  const char* memory_ = nullptr;
  int64_t size_ = 0;
  std::shared_ptr<RangeCache> cache_ = nullptr;
  std::shared_ptr<MappedFile> mapped_ = nullptr;

  friend class MappedReads;
  const std::atomic<bool>* cancelled_ = nullptr;
};

// What `get` has given out of mappings to this thread. All throw the IoError of a `read` of what is not there.
class MappedReads {
 public:
  static void begin();          // forgets
  static void refuse_failed();  // files of which a page failed
  static void refuse_cut();     // files that are shorter now than what was read: the rest of a page is zeros then

 private:
  struct Given {
    const Source* source;
    int64_t offset, size;
  };
  static void read_again(const Given& given);
  static thread_local std::vector<Given> given_;

  friend class Source;
};

// Bytes to write: a file, or a range of memory, which overlaps no source.
class Sink {
 public:
  Sink(int index, int fd) : index_(index), fd_(fd) {}
  // checksum: of the file, which hashes all that is written
  Sink(int index, std::shared_ptr<FileChecksum> checksum);
  Sink(int index, void* memory, int64_t size) : index_(index), memory_(static_cast<char*>(memory)), size_(size) {}

  bool in_memory() const { return memory_ != nullptr; }

  // The address at which the bytes [offset, offset + size) are to be stored, if the sink is memory: then there is
  // nothing to write. Null for a file.
  char* address(int64_t offset, int64_t size) const;

  // Writes `size` bytes at `offset` of a file.
  void write(int64_t offset, int64_t size, const void* from) const;

 private:
  int index_, fd_ = -1;
  char* memory_ = nullptr;
  int64_t size_ = 0;
  std::shared_ptr<FileChecksum> checksum_ = nullptr;
};

// Reserves `size` bytes of a file that is open for writing, so that a full disk shows before any work is done. The file
// does not grow: it has no more bytes than were written. File systems that cannot reserve get a file of that length.
// Returns 0 or errno.
int reserve(int fd, int64_t size);

// Asks the kernel to begin writing to the disk what was written to the file. A hint: errors do not matter.
void start_writeback(int fd);

// The part of a file's first `size` bytes that is in the page cache, from 64 sampled pages: 0..1, or -1 if unknown.
double cached_fraction(int fd, int64_t size);

}  // namespace fi
