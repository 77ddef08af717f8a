// Files that are read where the page cache has them, through mappings. A page that the file no longer has, or that the
// system cannot read, is SIGBUS: while a FaultGuard lives, the process survives that in a mapping of this class.
#pragma once

#include <cstdint>

namespace fi {

// A whole file, mapped read-only and shared, but for what is appended later. Throws std::system_error, if it cannot be.
class MappedFile {
 public:
  explicit MappedFile(int fd);  // stays the caller's, and open as long as this is read
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  int fd() const { return fd_; }
  int64_t size() const { return size_; }
  // The address of bytes [offset, offset + size); null, if they are not all in the mapping, or a page of it failed.
  const char* at(int64_t offset, int64_t size) const;
  // Whether a page failed. Whatever was read of the mapping may be zeros then.
  bool failed() const;
  // If so: which byte.
  int64_t failed_at() const;
  // The length of the file now; -1 if that is unknown.
  int64_t size_now() const;

 private:
  const int fd_;
  int64_t size_ = 0;
  const char* begin_ = nullptr;
  struct MappedPlace* place_ = nullptr;
};

// While one lives, SIGBUS at an address of a MappedFile replaces its mapping by zeros, marks the file as failed, and
// goes on with the instruction: no frame is left, so that locks and destructors do not matter. Every other SIGBUS goes
// to the handler that was there before.
class FaultGuard {
 public:
  FaultGuard();
  ~FaultGuard();
  FaultGuard(const FaultGuard&) = delete;
  FaultGuard& operator=(const FaultGuard&) = delete;
};

// How many faults were survived in this process. Whoever reads zeros of a failed mapping sees a larger number after it.
int64_t survived_faults();

// Called by a thread that reads mappings: a fault of a thread that blocks SIGBUS ends the process.
void let_faults_through();

}  // namespace fi
