#include "io.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "checksum.h"
#include "mapped.h"
#include "range_cache.h"

namespace fi {

IoError::IoError(bool on_write, int which, int code, int64_t at, int64_t wanted, int64_t got)
    : std::runtime_error(on_write ? "write failed" : "read failed"),
      write(on_write),
      handle(which),
      error(code),
      offset(at),
      expected(wanted),
      done(got) {}

namespace {

// The number of the bytes [offset, offset + wanted) that lie within `size`; fewer than wanted are an error.
int64_t within(int64_t offset, int64_t wanted, int64_t size) {
  return offset < 0 || offset > size ? 0 : std::min(wanted, size - offset);
}

}  // namespace

Source::Source(int index, std::shared_ptr<MappedFile> mapped)
    : index_(index), fd_(mapped->fd()), mapped_(std::move(mapped)) {}

const void* Source::get(int64_t offset, int64_t size, void* to) const {
  if (const char* const bytes = mapped_ ? mapped_->at(offset, size) : nullptr) {
    MappedReads::given_.push_back({this, offset, size});
    return bytes;
  }
  if (!memory_) {
    read(offset, size, to);
    return to;
  }
  const int64_t held = within(offset, size, size_);
  if (held < size) throw IoError(false, index_, 0, offset, size, held);
  return memory_ + offset;
}

void Source::read(int64_t offset, int64_t size, void* to) const {
  if (memory_) {
    memcpy(to, get(offset, size, to), size_t(size));
    return;
  }
  char* const bytes = static_cast<char*>(to);
  if (cache_) {
    int64_t got = 0;
    try {
      got = cache_->read(fd_, offset, size, bytes, cancelled_);
    } catch (const RangeCache::Stopped&) {
      throw IoError(false, index_, EIO, offset, size, 0);
    }
    if (got < size) throw IoError(false, index_, 0, offset, size, got);
    return;
  }
  for (int64_t done = 0; done < size;) {
    const ssize_t got = pread(fd_, bytes + done, size_t(size - done), offset + done);
    if (got > 0)
      done += got;
    else if (got == 0)
      throw IoError(false, index_, 0, offset, size, done);
    else if (errno != EINTR)
      throw IoError(false, index_, errno, offset, size, done);
  }
}

void Source::prefetch(int64_t offset, int64_t size) const {
  if (memory_) return;
  if (cache_) return cache_->want(fd_, offset, size);
#if defined(POSIX_FADV_WILLNEED)
  posix_fadvise(fd_, offset, size, POSIX_FADV_WILLNEED);
#endif
}

thread_local std::vector<MappedReads::Given> MappedReads::given_;

void MappedReads::begin() { given_.clear(); }

void MappedReads::refuse_failed() {
  const Given* suspect = nullptr;
  for (const Given& given : given_) {
    if (!given.source->mapped_->failed()) continue;
    read_again(given);
    suspect = &given;
  }
  if (!suspect) return;
  // It is another part of the file that is not there, or it is there again.
  const MappedFile& file = *suspect->source->mapped_;
  const int64_t at = file.failed_at(), size = std::min<int64_t>(4096, file.size() - at);
  read_again({suspect->source, at, size});
  throw IoError(false, suspect->source->index_, EIO, at, size, 0);
}

void MappedReads::refuse_cut() {
  const MappedFile* last = nullptr;
  int64_t size = 0;
  for (const Given& given : given_) {
    const MappedFile* const file = given.source->mapped_.get();
    if (file != last) size = file->size_now();
    last = file;
    if (given.offset + given.size > size) read_again(given);
  }
}

void MappedReads::read_again(const Given& given) {
  std::vector<char> bytes(size_t(given.size));
  given.source->read(given.offset, given.size, bytes.data());
}

Sink::Sink(int index, std::shared_ptr<FileChecksum> checksum)
    : index_(index), fd_(checksum->fd()), checksum_(std::move(checksum)) {}

char* Sink::address(int64_t offset, int64_t size) const {
  if (!memory_) return nullptr;
  const int64_t held = within(offset, size, size_);
  if (held < size) throw IoError(true, index_, 0, offset, size, held);
  return memory_ + offset;
}

void Sink::write(int64_t offset, int64_t size, const void* from) const {
  const char* const bytes = static_cast<const char*>(from);
  if (checksum_) checksum_->add(offset, size, from);  // while they are in the caches
  for (int64_t done = 0; done < size;) {
    const ssize_t put = pwrite(fd_, bytes + done, size_t(size - done), offset + done);
    if (put > 0)
      done += put;
    else if (put == 0 || errno != EINTR)
      throw IoError(true, index_, put == 0 ? ENOSPC : errno, offset, size, done);
  }
}

int reserve(int fd, int64_t size) {
#if defined(__linux__)
  // A limit on the size of files shows only when they grow.
  struct stat info;
  if (fstat(fd, &info) != 0) return errno;
  if (info.st_size < size && (ftruncate(fd, size) != 0 || ftruncate(fd, info.st_size) != 0)) return errno;
  if (size == 0) return 0;
  for (;;) {
    if (fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, size) == 0) return 0;
    if (errno == EINTR) continue;
    if (errno == EOPNOTSUPP || errno == ENOSYS) break;  // not posix_fallocate: it would write every block there
    return errno;
  }
#endif
  return ftruncate(fd, size) == 0 ? 0 : errno;
}

void start_writeback(int fd) {
#if defined(__linux__)
  sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE);
#endif
  (void)fd;
}

double cached_fraction(int fd, int64_t size) {
  if (size <= 0) return 1;
  // To somebody who could not write the file, Linux says that all of it is resident.
  struct stat info;
  if (fstat(fd, &info) != 0 || (geteuid() != 0 && geteuid() != info.st_uid)) return -1;
  void* map = mmap(nullptr, size_t(size), PROT_NONE, MAP_SHARED, fd, 0);  // never touched: it cannot raise SIGBUS
  if (map == MAP_FAILED) return -1;
  const int64_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page, samples = std::min<int64_t>(64, pages);
  int64_t in_cache = 0;
  for (int64_t i = 0; i < samples; ++i) {
    unsigned char bit = 0;
    const int64_t at = i * pages / samples;
    if (mincore(static_cast<char*>(map) + at * page, size_t(page), &bit) != 0) {
      munmap(map, size_t(size));
      return -1;
    }
    in_cache += bit & 1;
  }
  munmap(map, size_t(size));
  return double(in_cache) / double(samples);
}

}  // namespace fi
