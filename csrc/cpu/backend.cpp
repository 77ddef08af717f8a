#include "backend.h"

#include <cstring>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fi {

namespace {

const Backend* const kBackends[] = {
#if defined(FI_BASELINE)
#elif defined(__x86_64__)
    &avx512::kBackend,
    &avx2::kBackend,
#elif defined(__aarch64__)
    &neon::kBackend,
#endif
    &scalar::kBackend,
};

}  // namespace

int backend_count() { return int(sizeof kBackends / sizeof *kBackends); }

const Backend& backend_at(int i) { return *kBackends[i]; }

const Backend* find_backend(const char* name) {
  for (const Backend* b : kBackends)
    if (strcmp(b->name, name) == 0) return b;
  return nullptr;
}

const Backend& best_backend() {
  for (const Backend* b : kBackends)
    if (b->usable()) return *b;
  return scalar::kBackend;
}

#if defined(__x86_64__)
FloatEnvironment::FloatEnvironment() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
FloatEnvironment::~FloatEnvironment() { _mm_setcsr(static_cast<unsigned>(saved_)); }
#elif defined(__aarch64__)
FloatEnvironment::FloatEnvironment() {
  asm volatile("mrs %0, fpcr" : "=r"(saved_));
  asm volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
}
FloatEnvironment::~FloatEnvironment() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }
#else
#error "fastinterp runs on x86-64 and aarch64; another processor needs its floating-point environment named here"
#endif

}  // namespace fi
