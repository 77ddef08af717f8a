#include "mapped.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <unistd.h>

#include <atomic>
#include <mutex>
#include <system_error>

namespace fi {

// Where a file is mapped, for the handler. Places are never freed, so that it may go through all of them at any moment:
// one that is no file's is taken by the next. Of a file, begin is set last and taken back first.
struct MappedPlace {
  static constexpr uintptr_t kNowhere = UINTPTR_MAX;
  std::atomic<uintptr_t> begin{kNowhere}, end{0};
  std::atomic<bool> failed{false};
  std::atomic<uintptr_t> fault{0};  // the address that failed last
  bool taken = false;
  MappedPlace* next = nullptr;
};

namespace {

// Thread-local, and not allocated when a handler first looks at it.
#if defined(__GLIBC__)
#define FI_STATIC_TLS __attribute__((tls_model("initial-exec")))
#else
#define FI_STATIC_TLS
#endif
thread_local FI_STATIC_TLS bool passing_on = false;

std::atomic<MappedPlace*> places{nullptr};
std::atomic<int64_t> faults{0};
static_assert(std::atomic<uintptr_t>::is_always_lock_free && std::atomic<int64_t>::is_always_lock_free,
              "a handler uses them");

std::mutex mutex;         // of what is below, and of `taken`
int guards = 0;           // that live
struct sigaction under;   // what SIGBUS did before the handler was last put in place
struct sigaction before;  // the same, but of the time before another handler was put above this one: mostly equal
bool buried = false;      // whether another was, which may call this one whenever it runs
bool fork_is_watched = false;

void handle(int signal, siginfo_t* info, void* context);

bool is_ours(const struct sigaction& action) { return (action.sa_flags & SA_SIGINFO) && action.sa_sigaction == handle; }

void put_in_place() {
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGBUS, &action, nullptr);
}

// A bare system call where there is one: sanitizers take mmap for a write, which would be a race with the readers.
bool map_zeros(void* at, size_t size) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
#if defined(__linux__) && defined(__LP64__)
  return syscall(SYS_mmap, at, size, PROT_READ, kFlags, -1, 0) != -1;
#else
  return mmap(at, size, PROT_READ, kFlags, -1, 0) != MAP_FAILED;
#endif
}

// Replaces the mapping that has the address, and says so; false if none has it. The flag comes before the zeros: who
// reads these has met a page fault since.
bool replaced(uintptr_t address) {
  for (MappedPlace* place = places.load(); place; place = place->next) {
    const uintptr_t begin = place->begin.load(), end = place->end.load();
    if (address < begin || address >= end || place->begin.load() != begin) continue;
    place->fault = address;
    place->failed = true;
    ++faults;
    // All of it: nothing more that is read of the file counts, and huge pages cannot be replaced in parts.
    return map_zeros(reinterpret_cast<void*>(begin), end - begin);
  }
  return false;
}

// Gives the signal to another action, as the system would.
void pass_on(const struct sigaction& to, int signal, siginfo_t* info, void* context) {
  const bool sent = info->si_code <= 0;  // by a process, and not by an instruction, which raises it again
  if (to.sa_flags & SA_SIGINFO) {
    to.sa_sigaction(signal, info, context);
  } else if (to.sa_handler != SIG_DFL && to.sa_handler != SIG_IGN) {
    to.sa_handler(signal);
  } else if (to.sa_handler == SIG_DFL || !sent) {
    struct sigaction standard{};
    standard.sa_handler = SIG_DFL;
    sigaction(SIGBUS, &standard, nullptr);
    if (sent) raise(signal);
  }
}

void handle(int signal, siginfo_t* info, void* context) {
  const int saved = errno;
  if (info->si_code > 0 && replaced(reinterpret_cast<uintptr_t>(info->si_addr))) {
    errno = saved;
    return;
  }
  if (passing_on) {  // a handler that was put above this one, and calls what it found
    pass_on(before, signal, info, context);
    errno = saved;
    return;
  }
  // The other handler sees itself in place. What it puts there stays: faulthandler puts back what it found, and
  // sends the signal again; where it found this handler, it is passed over then.
  const struct sigaction other = under;
  sigaction(SIGBUS, &other, nullptr);
  passing_on = true;
  pass_on(other, signal, info, context);
  passing_on = false;
  struct sigaction now{};
  sigaction(SIGBUS, nullptr, &now);
  if (is_ours(now))
    under = before;
  else if (now.sa_handler == other.sa_handler && other.sa_handler != SIG_DFL)
    put_in_place();
  errno = saved;
}

}  // namespace

MappedFile::MappedFile(int fd) : fd_(fd) {
  size_ = size_now();
  if (size_ < 0) throw std::system_error(errno, std::generic_category());
  if (size_ == 0) return;
  void* const memory = mmap(nullptr, size_t(size_), PROT_READ, MAP_SHARED, fd, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category());
  begin_ = static_cast<const char*>(memory);
  const std::lock_guard<std::mutex> lock(mutex);
  for (place_ = places.load(); place_ && place_->taken;) place_ = place_->next;
  if (!place_) {
    place_ = new MappedPlace;
    place_->next = places.load();
    places = place_;
  }
  place_->taken = true;
  place_->failed = false;
  place_->end = uintptr_t(memory) + uintptr_t(size_);
  place_->begin = uintptr_t(memory);
}

MappedFile::~MappedFile() {
  if (!begin_) return;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    place_->begin = MappedPlace::kNowhere;
    place_->taken = false;
  }
  munmap(const_cast<char*>(begin_), size_t(size_));
}

const char* MappedFile::at(int64_t offset, int64_t size) const {
  return offset < 0 || size > size_ - offset || failed() ? nullptr : begin_ + offset;
}

bool MappedFile::failed() const { return place_ && place_->failed; }

int64_t MappedFile::failed_at() const { return int64_t(place_->fault - uintptr_t(begin_)); }

int64_t MappedFile::size_now() const {
  struct stat info;
  return fstat(fd_, &info) == 0 ? int64_t(info.st_size) : -1;
}

FaultGuard::FaultGuard() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!fork_is_watched)  // a child must not find the lock taken by a thread that it does not have
    fork_is_watched = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); }) == 0;
  struct sigaction now{};
  sigaction(SIGBUS, nullptr, &now);
  if (!is_ours(now)) {
    buried = buried || guards > 0;
    under = now;
    if (!buried) before = now;
    put_in_place();
  }
  ++guards;
}

FaultGuard::~FaultGuard() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (--guards > 0) return;
  struct sigaction now{};
  sigaction(SIGBUS, nullptr, &now);
  if (is_ours(now))
    sigaction(SIGBUS, &under, nullptr);
  else
    buried = true;
}

int64_t survived_faults() { return faults; }

void let_faults_through() {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGBUS);
  pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
}

}  // namespace fi
