// What decoders of GGUF's blocks share: codes of a block, unpacked to a byte each, become numbers.
#pragma once

#include "../decoder.h"
#include "vectors.h"

namespace fi {
namespace FI_ISA {

// code * scale, of whole vectors.
FI_INLINE void scaled(const uint8_t* codes, int count, float scale, float* to) {
  for (int i = 0; i < count; i += kVector) put(to + i, times(widen_i8(load_bytes(codes + i)), scale));
}

// code * scale - least, of codes from 0 up: two roundings.
FI_INLINE void scaled_from(const uint8_t* codes, int count, float scale, float least, float* to) {
  for (int i = 0; i < count; ++i) {
    const float product = float(codes[i]) * scale;
    to[i] = canonical_nan(product - least);
  }
}

// Four bits for each of 2 * count codes: the low halves of the bytes, then the high ones.
FI_INLINE void unpack_nibbles(const uint8_t* bytes, int count, uint8_t* codes) {
  for (int i = 0; i < count; ++i) {
    codes[i] = bytes[i] & 15;
    codes[count + i] = uint8_t(bytes[i] >> 4);
  }
}

// For each of the values of bits in 32 bytes: value j of byte i belongs to code 32 * j + i. Adds it, shifted left.
template <int kBits, int kShift>
FI_INLINE void add_high_bits(const uint8_t* bytes, uint8_t* codes) {
  constexpr int kMask = (1 << kBits) - 1;
  for (int j = 0; j < 8 / kBits; ++j)
    for (int i = 0; i < 32; ++i)
      codes[32 * j + i] = uint8_t(codes[32 * j + i] | ((bytes[i] >> kBits * j & kMask) << kShift));
}

FI_INLINE void subtract(uint8_t* codes, int count, int by) {
  for (int i = 0; i < count; ++i) codes[i] = uint8_t(codes[i] - by);
}

constexpr uint8_t kIq4[16] = {129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113};  // int8

// The numbers that nibbles of 16 bytes are in a table, times a scale: those of the low halves first.
FI_INLINE void look_up_nibbles(const uint8_t* table, const uint8_t* bytes, float scale, float* to) {
  const Bytes packed = load_bytes(bytes), numbers = load_bytes(table);
  put(to, times(widen_i8(look_up(numbers, low_nibbles(packed))), scale));
  put(to + kVector, times(widen_i8(look_up(numbers, high_nibbles(packed))), scale));
}

template <int64_t kElements>
FI_INLINE const char* wrong_blocks(const DecodeArgs& a) {
  if (a.companion_count != 0 || a.parameter_count != 0) return "it takes neither companions nor parameters";
  if (a.numel % kElements == 0) return nullptr;
  return kElements == 32 ? "blocks have 32 elements" : "blocks have 256 elements";
}

// Calls decode(block, to) for each block.
template <int64_t kElements, int64_t kBytes, class Decode>
FI_INLINE void for_each_block(const DecodeArgs& a, Decode decode) {
  const uint8_t* block = static_cast<const uint8_t*>(a.bytes);
  float* to = a.to;
  for (int64_t i = 0; i < a.count / kElements; ++i, block += kBytes, to += kElements) decode(block, to);
}

FI_INLINE float f16_at(const uint8_t* block, int offset) { return widen_f16(load_at<uint16_t>(block + offset, 0)); }

}  // namespace FI_ISA
}  // namespace fi
