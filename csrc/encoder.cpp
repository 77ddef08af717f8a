#include "encoder.h"

#include <algorithm>
#include <cstring>

namespace fi {

namespace {

// The encoders of this build, a row each; null ends them.
constexpr Encoder kEncoders[] = {
    {"scaled_f8_e4m3", Codes::kE4M3, 448.0f, 1, 1},
    {"scaled_f8_e5m2", Codes::kE5M2, 57344.0f, 1, 1},
    {"scaled_i8", Codes::kI8, 127.0f, 1, 1},
    {"q8_0", Codes::kQ8_0, 127.0f, 32, 34},
};

// The exponent, plus 127, of the least power of two that is not below x, from 0 on.
uint32_t ceil_exponent(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), exponent = bits >> 23, rest = bits & 0x7fffffu;
  if (exponent == 0) return rest > 0x400000u ? 1 : 0;
  return exponent + (rest ? 1 : 0);
}

float power_of_two_of(uint32_t exponent) { return bit_cast<float>(exponent ? exponent << 23 : 0x400000u); }

template <DType D>
Scale stored_as(float x, bool clamps) {
  uint32_t bits = narrow<D, Fp8Saturate, false>(x, 0);
  if (clamps) bits = std::min(std::max(bits, uint32_t(1)), Format<D>::kMax + 0u);
  return {widen_f32<D>(typename Format<D>::Bits(bits)), bits};
}

}  // namespace

const Encoder* find_encoder(const char* name) {
  for (const Encoder& encoder : kEncoders)
    if (strcmp(encoder.name, name) == 0) return &encoder;
  return nullptr;
}

Scale scale_of(const Encoder& encoder, ScaleKind kind, bool power_of_two, uint32_t magnitude) {
  const float largest = canonical_nan(bit_cast<float>(magnitude));
  if (encoder.codes == Codes::kQ8_0) {  // codes are multiplied by the reciprocal of what was not rounded to F16 yet
    const float scale = largest / encoder.largest;
    return {scale == 0 ? 0.0f : 1.0f / scale, narrow<DType::F16, Fp8Saturate, false>(scale, 0)};
  }
  if (!(largest < bit_cast<float>(0x7f800000u))) {  // of int8 codes alone
    const float nan = bit_cast<float>(0x7fc00000u);
    if (kind == ScaleKind::kE8M0) return {nan, 255};
    return kind == ScaleKind::kF32   ? stored_as<DType::F32>(nan, false)
           : kind == ScaleKind::kF16 ? stored_as<DType::F16>(nan, false)
                                     : stored_as<DType::BF16>(nan, false);
  }
  float scale = largest == 0 ? 1.0f : largest / encoder.largest;
  if (power_of_two || kind == ScaleKind::kE8M0) {
    const uint32_t exponent = ceil_exponent(scale);
    scale = power_of_two_of(exponent);
    if (kind == ScaleKind::kE8M0) return {scale, exponent};
  }
  return kind == ScaleKind::kF32   ? stored_as<DType::F32>(scale, true)
         : kind == ScaleKind::kF16 ? stored_as<DType::F16>(scale, true)
                                   : stored_as<DType::BF16>(scale, true);
}

int scale_bytes(ScaleKind kind) { return kind == ScaleKind::kF32 ? 4 : kind == ScaleKind::kE8M0 ? 1 : 2; }

}  // namespace fi
