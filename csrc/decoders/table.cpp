// The decoders of this build, compiled for one instruction set.
#include "table.h"

namespace fi {
namespace FI_ISA {

extern const Decoder kScaledE4M3, kScaledE5M2, kScaledI8, kMxfp4, kMxfp4Transposed, kNvfp4, kQ8_0;

const Decoder* const kDecoders[] = {&kScaledE4M3,      &kScaledE5M2, &kScaledI8, &kMxfp4,
                                    &kMxfp4Transposed, &kNvfp4,      &kQ8_0,     nullptr};

}  // namespace FI_ISA
}  // namespace fi
