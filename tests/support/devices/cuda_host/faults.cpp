// Kernels with mistakes, which the emulation must notice, and one without.

#include <cuda_runtime.h>

extern "C" {

// Adds up 1 .. threads in memory that a block shares. kind 0: rightly. 1: the second half of the threads leaves out the
// barrier. 2: the first thread alone does. 3: the threads do not wait, and add what is not there yet.
__attribute__((visibility("default"))) void fake_sum(int kind, uint32_t threads, int64_t* sums, uint32_t blocks) {
  fi_host::launch(blocks, threads, nullptr, [=] {
    static thread_local int64_t shared[1024];
    const uint32_t me = fi_host::here().thread;
    shared[me] = me + 1;
    if (kind == 0 || (kind == 1 && me < threads / 2) || (kind == 2 && me != 0)) fi_host::sync_threads();
    if (me != 0) return;
    int64_t sum = 0;
    for (uint32_t i = 0; i < threads; ++i) sum += shared[i], shared[i] = 0;
    sums[fi_host::here().block] = sum;
  });
}

}  // extern "C"
