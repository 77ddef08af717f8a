// The table of decoders of one instruction set, which its backend names.
#pragma once

#include "../decoder.h"

namespace fi {
namespace FI_ISA {

extern const Decoder* const kDecoders[];  // null ends them

}  // namespace FI_ISA
}  // namespace fi
