#define FI_ISA neon
#define FI_ISA_NAME "neon"

namespace fi {
namespace neon {
static bool usable() { return true; }
}  // namespace neon
}  // namespace fi

#include "loops.inc"
