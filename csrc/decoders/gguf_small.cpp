// Blocks of 32 elements of GGUF files, of four and five bits.
//
// q4_0, q5_0:  F16 scale, codes less 8 (16): scale * code
// q4_1, q5_1:  F16 scale, F16 least, codes: scale * code + least
// iq4_nl:      F16 scale, indices of a table of 16 numbers: scale * number
// gguf_mxfp4:  E8M0 scale, E2M1 codes: scale / 2 * (2 * code). The first 16 elements are in low halves of bytes
#include "gguf_blocks.h"

namespace fi {
namespace FI_ISA {
namespace {

constexpr int kBlock = 32;
constexpr uint8_t kDoubledE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, 255, 254, 253, 252, 250, 248, 244};  // int8

FI_INLINE void unpack_q5(const uint8_t* high, const uint8_t* low, uint8_t* codes) {
  unpack_nibbles(low, 16, codes);
  for (int byte = 0; byte < 4; ++byte)
    for (int i = 0; i < 8; ++i) codes[8 * byte + i] = uint8_t(codes[8 * byte + i] | (high[byte] >> i & 1) << 4);
}

void decode_q4_0(const DecodeArgs& a) {
  for_each_block<kBlock, 18>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    unpack_nibbles(block + 2, 16, codes);
    subtract(codes, kBlock, 8);
    scaled(codes, kBlock, f16_at(block, 0), to);
  });
}

void decode_q4_1(const DecodeArgs& a) {
  for_each_block<kBlock, 20>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    unpack_nibbles(block + 4, 16, codes);
    scaled_from(codes, kBlock, f16_at(block, 0), -f16_at(block, 2), to);
  });
}

void decode_q5_0(const DecodeArgs& a) {
  for_each_block<kBlock, 22>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    unpack_q5(block + 2, block + 6, codes);
    subtract(codes, kBlock, 16);
    scaled(codes, kBlock, f16_at(block, 0), to);
  });
}

void decode_q5_1(const DecodeArgs& a) {
  for_each_block<kBlock, 24>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    unpack_q5(block + 4, block + 8, codes);
    scaled_from(codes, kBlock, f16_at(block, 0), -f16_at(block, 2), to);
  });
}

void decode_iq4_nl(const DecodeArgs& a) {
  for_each_block<kBlock, 18>(
      a, [](const uint8_t* block, float* to) { look_up_nibbles(kIq4, block + 2, f16_at(block, 0), to); });
}

// Half of an E8M0 scale: exact, and finite for every code.
FI_INLINE float half_e8m0(uint8_t code) {
  return bit_cast<float>(choose(code < 2, 0x00200000u << (code & 1), (uint32_t(code) - 1u) << 23));
}

void decode_gguf_mxfp4(const DecodeArgs& a) {
  for_each_block<kBlock, 17>(
      a, [](const uint8_t* block, float* to) { look_up_nibbles(kDoubledE2M1, block + 1, half_e8m0(block[0]), to); });
}

}  // namespace

extern const Decoder kQ4_0, kQ4_1, kQ5_0, kQ5_1, kIq4Nl, kGgufMxfp4;
const Decoder kQ4_0 = {"q4_0", kBlock, 18, decode_q4_0, wrong_blocks<kBlock>};
const Decoder kQ4_1 = {"q4_1", kBlock, 20, decode_q4_1, wrong_blocks<kBlock>};
const Decoder kQ5_0 = {"q5_0", kBlock, 22, decode_q5_0, wrong_blocks<kBlock>};
const Decoder kQ5_1 = {"q5_1", kBlock, 24, decode_q5_1, wrong_blocks<kBlock>};
const Decoder kIq4Nl = {"iq4_nl", kBlock, 18, decode_iq4_nl, wrong_blocks<kBlock>};
const Decoder kGgufMxfp4 = {"gguf_mxfp4", kBlock, 17, decode_gguf_mxfp4, wrong_blocks<kBlock>};

}  // namespace FI_ISA
}  // namespace fi
