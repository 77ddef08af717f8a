#define FI_ISA avx2
#define FI_ISA_NAME "avx2"

namespace fi {
namespace avx2 {
static bool usable() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
}  // namespace avx2
}  // namespace fi

#include "loops.inc"
