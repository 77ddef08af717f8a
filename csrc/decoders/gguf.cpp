// Blocks of GGUF files.
//
// q8_0: 32 elements of a block, an F16 scale and 32 int8 codes behind it: code * scale.
#include "../decoder.h"
#include "vectors.h"

namespace fi {
namespace FI_ISA {
namespace {

constexpr int64_t kBlock = 32;

const char* wrong(const DecodeArgs& a) {
  if (a.companion_count != 0 || a.parameter_count != 0) return "it takes neither companions nor parameters";
  return a.numel % kBlock == 0 ? nullptr : "blocks have 32 elements";
}

constexpr int64_t kQ8Bytes = 2 + kBlock;

void decode_q8_0(const DecodeArgs& a) {
  const char* block = static_cast<const char*>(a.bytes);
  float* to = a.to;
  for (int64_t i = 0; i < a.count / kBlock; ++i, block += kQ8Bytes, to += kBlock) {
    const float scale = widen_f16(load_at<uint16_t>(block, 0));
    put(to, times(widen_i8(load_bytes(block + 2)), scale));
    put(to + kVector, times(widen_i8(load_bytes(block + 2 + kVector)), scale));
  }
}

}  // namespace

extern const Decoder kQ8_0;
const Decoder kQ8_0 = {"q8_0", kBlock, kQ8Bytes, decode_q8_0, wrong};

}  // namespace FI_ISA
}  // namespace fi
