// The CPU backends, one per instruction set, and the choice among them.
#pragma once

#include "../ops.h"

namespace fi {

#if defined(__x86_64__)
namespace avx512 {
extern const Backend kBackend;
}
namespace avx2 {
extern const Backend kBackend;
}
#elif defined(__aarch64__)
namespace neon {
extern const Backend kBackend;
}
#endif
namespace scalar {
extern const Backend kBackend;
}

// Every backend of this build, best first.
int backend_count();
const Backend& backend_at(int i);

// The backend called `name`, or null if this build has none of that name.
const Backend* find_backend(const char* name);

// The best backend that this machine can run.
const Backend& best_backend();

// Sets the floating-point environment that the contract needs (nearest even, subnormals preserved) for the thread that
// holds it: another library may have switched subnormals off for the whole process.
class FloatEnvironment {
 public:
  FloatEnvironment();
  ~FloatEnvironment();
  FloatEnvironment(const FloatEnvironment&) = delete;
  FloatEnvironment& operator=(const FloatEnvironment&) = delete;

 private:
  uint64_t saved_;
};

}  // namespace fi
