// The decoders of this build, compiled for one instruction set.
#include "table.h"

namespace fi {
namespace FI_ISA {

extern const Decoder kScaledE4M3, kScaledE5M2, kScaledI8, kMxfp4, kMxfp4Transposed, kNvfp4;
extern const Decoder kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kIq4Nl, kGgufMxfp4, kQ2K, kQ3K, kQ4K, kQ5K, kQ6K, kIq4Xs;

const Decoder* const kDecoders[] = {&kScaledE4M3, &kScaledE5M2, &kScaledI8,  &kMxfp4, &kMxfp4Transposed,
                                    &kNvfp4,      &kQ8_0,       &kQ4_0,      &kQ4_1,  &kQ5_0,
                                    &kQ5_1,       &kIq4Nl,      &kGgufMxfp4, &kQ2K,   &kQ3K,
                                    &kQ4K,        &kQ5K,        &kQ6K,       &kIq4Xs, nullptr};

}  // namespace FI_ISA
}  // namespace fi
