// The threads of a block as fibers of one thread of the host. A thread runs until it waits at a barrier or ends; when
// all wait, they go on, in order. If the first thread meets no barrier, the others run one after another in one fiber.

// Fibers live as long as their thread of the host, and run one block after another. Only the first switch to one is by
// setcontext: that and swapcontext call the system each time, for the signal mask, which took most of a test's time.

#undef _FORTIFY_SOURCE  // its longjmp refuses to go to another stack
#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <vector>

namespace fi_host {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr uint32_t kMostThreads = 1024;

enum class State { kNew, kRunning, kWaiting, kEnded };

struct Fiber {
  State state = State::kNew;
  jmp_buf place;  // where it left
};

struct Block {
  jmp_buf outside;
  std::vector<Fiber> fibers;
  char* stacks = nullptr;
  const std::function<void()>* thread = nullptr;
  void (*body)() = nullptr;  // what a fiber does when it is started
  Here here{};
  uint32_t fiber = 0;  // the one that runs

  ~Block() {
    if (stacks) munmap(stacks, kStackBytes * kMostThreads);
  }
};
thread_local Block block;

// Leaves the running fiber.
void leave(State state) {
  Fiber& own = block.fibers[block.fiber];
  own.state = state;
  if (_setjmp(own.place) == 0) _longjmp(block.outside, 1);
}

void one_thread() { (*block.thread)(); }

// All threads of the block but the first.
void other_threads() {
  for (uint32_t t = 1; t < block.here.threads; ++t) {
    block.here.thread = t;
    (*block.thread)();
  }
}

void fiber_main() {
  for (;;) {
    block.body();
    leave(State::kEnded);
  }
}

[[noreturn]] void enter_new(uint32_t fiber) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = block.stacks + kStackBytes * fiber;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
  __builtin_unreachable();
}

State resume(uint32_t fiber) {
  Fiber& other = block.fibers[fiber];
  block.here.thread = block.fiber = fiber;
  if (_setjmp(block.outside) == 0) {
    const bool is_new = other.state == State::kNew;
    other.state = State::kRunning;
    if (is_new) enter_new(fiber);
    _longjmp(other.place, 1);
  }
  return block.fibers[fiber].state;
}

State start(uint32_t fiber, void (*body)()) {
  block.body = body;
  return resume(fiber);
}

const char* run_block(uint32_t threads) {
  if (start(0, one_thread) == State::kEnded) {
    if (threads == 1 || start(1, other_threads) == State::kEnded) return nullptr;
    return "a thread waits at a barrier, but the first of its block has ended";
  }
  uint32_t waiting = 1;
  for (uint32_t t = 1; t < threads; ++t) waiting += start(t, one_thread) == State::kWaiting;
  while (waiting == threads) {
    waiting = 0;
    for (uint32_t t = 0; t < threads; ++t) waiting += resume(t) == State::kWaiting;
  }
  return waiting == 0 ? nullptr : "some threads of a block wait at a barrier, others have ended";
}

}  // namespace

const Here& here() { return block.here; }

void sync_threads() { leave(State::kWaiting); }

const char* run_grid(uint32_t blocks, uint32_t threads, const std::function<void()>& thread) {
  if (blocks == 0 || threads == 0 || threads > kMostThreads) return "a launch has no blocks, or no or too many threads";
  if (!block.stacks) {
    void* const stacks = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) return "there is no memory for the stacks of a block";
    block.stacks = static_cast<char*>(stacks);
    block.fibers.resize(kMostThreads);
  }
  block.thread = &thread;
  for (uint32_t b = 0; b < blocks; ++b) {
    block.here = {0, b, threads, blocks};
    if (const char* const wrong = run_block(threads)) {
      for (Fiber& fiber : block.fibers) fiber.state = State::kNew;  // some are in the middle of a thread
      return wrong;
    }
  }
  return nullptr;
}

}  // namespace fi_host
