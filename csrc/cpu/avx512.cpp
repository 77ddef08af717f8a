#define FI_ISA avx512
#define FI_ISA_NAME "avx512"

namespace fi {
namespace avx512 {
static bool usable() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
}  // namespace avx512
}  // namespace fi

#include "loops.inc"
