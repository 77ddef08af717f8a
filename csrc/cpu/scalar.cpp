#define FI_ISA scalar
#define FI_ISA_NAME "scalar"

namespace fi {
namespace scalar {
static bool usable() { return true; }
}  // namespace scalar
}  // namespace fi

#include "loops.inc"
