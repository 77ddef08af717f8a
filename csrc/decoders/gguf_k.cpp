// Blocks of 256 elements of GGUF files: scales of 16 or 32 elements each, which are multiplied by one or two F16 scales
// of the block.
//
// q2_k, q4_k, q5_k:   (d * scale) * code - (dmin * least)
// q3_k, q6_k, iq4_xs: (d * scale) * code; the codes of iq4_xs are numbers of a table
#include "gguf_blocks.h"

namespace fi {
namespace FI_ISA {
namespace {

constexpr int kBlock = 256;

// Two bits for each of 256 codes, in 64 bytes: value j of byte 32 * h + i belongs to code 128 * h + 32 * j + i.
FI_INLINE void unpack_pairs(const uint8_t* bytes, uint8_t* codes) {
  for (int h = 0; h < 2; ++h)
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 32; ++i) codes[128 * h + 32 * j + i] = bytes[32 * h + i] >> 2 * j & 3;
}

// 8 scales and 8 least values of six bits, in 12 bytes.
FI_INLINE void unpack_k4(const uint8_t* bytes, uint8_t* scales, uint8_t* least) {
  for (int i = 0; i < 4; ++i) {
    scales[i] = bytes[i] & 63;
    least[i] = bytes[4 + i] & 63;
    scales[4 + i] = uint8_t((bytes[8 + i] & 15) | (bytes[i] >> 2 & 0x30));
    least[4 + i] = uint8_t(bytes[8 + i] >> 4 | (bytes[4 + i] >> 2 & 0x30));
  }
}

// Eight groups of 32 codes. at: of the two F16 scales and of the 12 bytes behind them
FI_INLINE void from_groups(const uint8_t* codes, const uint8_t* at, float* to) {
  const float d = f16_at(at, 0), dmin = f16_at(at, 2);
  uint8_t scales[8], least[8];
  unpack_k4(at + 4, scales, least);
  for (int g = 0; g < 8; ++g)
    scaled_from(codes + 32 * g, 32, d * float(scales[g]), dmin * float(least[g]), to + 32 * g);
}

void decode_q2_k(const DecodeArgs& a) {
  for_each_block<kBlock, 84>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    unpack_pairs(block + 16, codes);
    const float d = f16_at(block, 80), dmin = f16_at(block, 82);
    for (int g = 0; g < 16; ++g)
      scaled_from(codes + 16 * g, 16, d * float(block[g] & 15), dmin * float(block[g] >> 4), to + 16 * g);
  });
}

void decode_q3_k(const DecodeArgs& a) {
  for_each_block<kBlock, 110>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    unpack_pairs(block + 32, codes);
    add_high_bits<1, 2>(block, codes);
    subtract(codes, kBlock, 4);
    const uint8_t* packed = block + 96;
    const float d = f16_at(block, 108);
    for (int g = 0; g < 16; ++g) {
      const int low = packed[g % 8] >> g / 8 * 4 & 15, high = packed[8 + g % 4] >> g / 4 * 2 & 3;
      scaled(codes + 16 * g, 16, d * float((low | high << 4) - 32), to + 16 * g);
    }
  });
}

void decode_q4_k(const DecodeArgs& a) {
  for_each_block<kBlock, 144>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    for (int g = 0; g < 4; ++g) unpack_nibbles(block + 16 + 32 * g, 32, codes + 64 * g);
    from_groups(codes, block, to);
  });
}

void decode_q5_k(const DecodeArgs& a) {
  for_each_block<kBlock, 176>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    for (int g = 0; g < 4; ++g) unpack_nibbles(block + 48 + 32 * g, 32, codes + 64 * g);
    add_high_bits<1, 4>(block + 16, codes);
    from_groups(codes, block, to);
  });
}

void decode_q6_k(const DecodeArgs& a) {
  for_each_block<kBlock, 210>(a, [](const uint8_t* block, float* to) {
    uint8_t codes[kBlock];
    for (int h = 0; h < 2; ++h) {
      unpack_nibbles(block + 64 * h, 64, codes + 128 * h);
      add_high_bits<2, 4>(block + 128 + 32 * h, codes + 128 * h);
    }
    subtract(codes, kBlock, 32);
    const float d = f16_at(block, 208);
    for (int g = 0; g < 16; ++g) scaled(codes + 16 * g, 16, d * float(int8_t(block[192 + g])), to + 16 * g);
  });
}

void decode_iq4_xs(const DecodeArgs& a) {
  for_each_block<kBlock, 136>(a, [](const uint8_t* block, float* to) {
    const float d = f16_at(block, 0);
    const unsigned high = load_at<uint16_t>(block + 2, 0);
    for (int g = 0; g < 8; ++g) {
      const int low = block[4 + g / 2] >> g % 2 * 4 & 15;
      const float scale = d * float((low | int(high >> 2 * g & 3) << 4) - 32);
      look_up_nibbles(kIq4, block + 8 + 16 * g, scale, to + 32 * g);
    }
  });
}

}  // namespace

extern const Decoder kQ2K, kQ3K, kQ4K, kQ5K, kQ6K, kIq4Xs;
const Decoder kQ2K = {"q2_k", kBlock, 84, decode_q2_k, wrong_blocks<kBlock>};
const Decoder kQ3K = {"q3_k", kBlock, 110, decode_q3_k, wrong_blocks<kBlock>};
const Decoder kQ4K = {"q4_k", kBlock, 144, decode_q4_k, wrong_blocks<kBlock>};
const Decoder kQ5K = {"q5_k", kBlock, 176, decode_q5_k, wrong_blocks<kBlock>};
const Decoder kQ6K = {"q6_k", kBlock, 210, decode_q6_k, wrong_blocks<kBlock>};
const Decoder kIq4Xs = {"iq4_xs", kBlock, 136, decode_iq4_xs, wrong_blocks<kBlock>};

}  // namespace FI_ISA
}  // namespace fi
