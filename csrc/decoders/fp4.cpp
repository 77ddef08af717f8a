// Two E2M1 codes in a byte, and a scale for each block of a row.
//
// mxfp4: 32 elements of a block, the low half of a byte first, and a power of two as scale: code * scale.
//   companions  scales E8M0
// mxfp4_transposed: the same, but what is stored is the transpose of each matrix, so that a block belongs to a column.
//   companions  scales E8M0
//   parameters  rows of a matrix
// nvfp4: 16 elements of a block, an E4M3 scale, and a scale of the whole matrix: code * (scale * scale of the matrix)
//   companions  scales F8_E4M3, scales of the matrices F32
//   parameters  1 if the scale of a block is divided by that of the matrix instead, number of matrices; and perhaps
//               1 if the high half of a byte comes first, 1 if scales of blocks lie in tiles (tile_index of scales.h)
#include "../decoder.h"
#include "scales.h"
#include "vectors.h"

namespace fi {
namespace FI_ISA {
namespace {

// ---- mxfp4 ---------------------------------------------------------------------------------------------------------

constexpr int64_t kMxBlock = 32;

const char* wrong_mxfp4(const DecodeArgs& a) {
  if (a.companion_count != 1) return "it takes 1 companion, the scales";
  if (a.parameter_count != 0) return "it takes no parameters";
  return a.numel % kMxBlock == 0 ? nullptr : "blocks have 32 elements";
}

ByteRange range_mxfp4(const DecodeArgs& a, int) { return {a.first / kMxBlock, a.count / kMxBlock}; }

void decode_mxfp4(const DecodeArgs& a) {
  const char* codes = static_cast<const char*>(a.bytes);
  float* to = a.to;
  for (int64_t block = 0; block < a.count / kMxBlock; ++block, codes += kMxBlock / 2, to += kMxBlock) {
    const float scale = e8m0(load_at<uint8_t>(a.companions[0], a.first / kMxBlock + block));
    const Bytes packed = load_bytes(codes), low = low_nibbles(packed), high = high_nibbles(packed);
    put(to, times(widen_e2m1(interleave_low(low, high)), scale));
    put(to + kVector, times(widen_e2m1(interleave_high(low, high)), scale));
  }
}

// ---- mxfp4_transposed ----------------------------------------------------------------------------------------------

// Transposed, a byte holds two rows of one column: a row of bytes for each pair of rows, then a row of scales for each
// block of rows.

const char* wrong_transposed(const DecodeArgs& a) {
  if (a.companion_count != 1) return "it takes 1 companion, the scales";
  if (a.parameter_count != 1 || !(a.parameters[0] >= 1)) return "it takes 1 parameter, the rows of a matrix";
  const int64_t rows = int64_t(a.parameters[0]);
  return rows % kMxBlock == 0 && a.numel % (rows * a.columns) == 0 ? nullptr : "matrices have rows in blocks of 32";
}

// 16 rows of 16 bytes.
FI_INLINE void transpose_tile(const char* from, int64_t from_stride, char* to, int64_t to_stride) {
  Bytes x[kVector], y[kVector];
  for (int i = 0; i < kVector; ++i) x[i] = load_bytes(from + i * from_stride);
  for (int round = 0; round < 4; ++round) {
    for (int i = 0; i < kVector / 2; ++i) {
      y[2 * i] = interleave_low(x[i], x[i + kVector / 2]);
      y[2 * i + 1] = interleave_high(x[i], x[i + kVector / 2]);
    }
    memcpy(x, y, sizeof x);
  }
  for (int i = 0; i < kVector; ++i) put_bytes(to + i * to_stride, x[i]);
}

// `count` columns of `length` bytes, one behind the other; each becomes a column of bytes `stride` apart.
void transpose_bytes(const void* columns, int64_t count, int64_t length, char* to, int64_t stride) {
  const char* const from = static_cast<const char*>(columns);
  const int64_t whole_columns = count / kVector * kVector, whole_length = length / kVector * kVector;
  for (int64_t at = 0; at < whole_length; at += kVector)
    for (int64_t c = 0; c < whole_columns; c += kVector)
      transpose_tile(from + c * length + at, length, to + at * stride + c, stride);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t at = c < whole_columns ? whole_length : 0; at < length; ++at)
      to[at * stride + c] = from[c * length + at];
}

void transpose_mxfp4(const TransposeArgs& a) {
  const int64_t pairs = a.rows / 2;
  transpose_bytes(a.bytes, a.count, pairs, a.to + a.first, a.columns);
  transpose_bytes(a.companions[0], a.count, a.rows / kMxBlock, a.to + pairs * a.columns + a.first, a.columns);
}

FI_INLINE Floats scaled_e2m1(Bytes packed, bool high, Bytes scales) {
  return times(widen_e2m1(high ? high_nibbles(packed) : low_nibbles(packed)), widen_e8m0(scales));
}

// `count` neighbours in a row.
template <bool kHigh>
void decode_row(const char* packed, const char* scales, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector)
    put(to + i, scaled_e2m1(load_bytes(packed + i), kHigh, load_bytes(scales + i)));
  if (i == count) return;
  char last_packed[kVector] = {}, last_scales[kVector] = {};
  float numbers[kVector];
  memcpy(last_packed, packed + i, size_t(count - i));
  memcpy(last_scales, scales + i, size_t(count - i));
  put(numbers, scaled_e2m1(load_bytes(last_packed), kHigh, load_bytes(last_scales)));
  memcpy(to + i, numbers, size_t(count - i) * sizeof *to);
}

void decode_transposed(const DecodeArgs& a) {
  const char* const codes = static_cast<const char*>(a.bytes);
  const char* const scales = codes + a.numel / 2;
  const int64_t end = a.first + a.count;
  for (int64_t at = a.first; at < end;) {
    const int64_t row = at / a.columns, column = at % a.columns, count = least(a.columns - column, end - at);
    const auto decode = row % 2 == 0 ? decode_row<false> : decode_row<true>;
    decode(codes + row / 2 * a.columns + column, scales + row / kMxBlock * a.columns + column, a.to + (at - a.first),
           count);
    at += count;
  }
}

// ---- nvfp4 ---------------------------------------------------------------------------------------------------------

constexpr int64_t kNvBlock = 16;
enum NvParameter { kDivides, kMatrices, kHighFirst, kTiled, kNvParameters };

bool is_set(const DecodeArgs& a, NvParameter flag) { return flag < a.parameter_count && a.parameters[flag] == 1; }

const char* wrong_nvfp4(const DecodeArgs& a) {
  if (a.companion_count != 2) return "it takes 2 companions, the scales of blocks and of matrices";
  if (a.parameter_count != kHighFirst && a.parameter_count != kNvParameters) return "it takes 2 or 4 parameters";
  for (int i = 0; i < a.parameter_count; ++i)
    if (i != kMatrices && a.parameters[i] != 0 && a.parameters[i] != 1)
      return "its parameters but the second are flags";
  const int64_t matrices = a.parameters[kMatrices] >= 1 ? int64_t(a.parameters[kMatrices]) : 1;
  if (a.parameters[kMatrices] != double(matrices)) return "its second parameter is the number of matrices";
  if (a.columns % kNvBlock != 0 || a.numel % (matrices * kNvBlock) != 0) return "blocks have 16 elements of a row";
  return nullptr;
}

ByteRange range_nvfp4(const DecodeArgs& a, int companion) {
  if (companion == 1) return {0, int64_t(a.parameters[kMatrices]) * int64_t(sizeof(float))};
  if (is_set(a, kTiled)) return tile_range(a.first, a.count, a.numel, a.columns, kNvBlock);
  return {a.first / kNvBlock, a.count / kNvBlock};
}

// The scales of `count` blocks, at most kVector of them, from block `first` of the tensor on.
void block_scales(const DecodeArgs& a, int64_t first, int64_t count, float* to) {
  uint8_t codes[kVector] = {};
  if (is_set(a, kTiled)) {
    const int64_t per_row = a.columns / kNvBlock;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = first + i;
      codes[i] = load_at<uint8_t>(a.companions[0], tile_index(block / per_row, block % per_row, per_row));
    }
  } else {
    memcpy(codes, static_cast<const char*>(a.companions[0]) + first, size_t(count));
  }
  put(to, widen_e4m3(load_bytes(codes)));
  const int64_t per_matrix = a.numel / int64_t(a.parameters[kMatrices]) / kNvBlock;
  const float matrix = load_at<float>(a.companions[1], first / per_matrix);
  if (is_set(a, kDivides))
    for (int i = 0; i < kVector; ++i) to[i] /= matrix;
  else
    for (int i = 0; i < kVector; ++i) to[i] *= matrix;
}

template <bool kHigh>
void decode_blocks(const char* codes, const float* scales, int64_t blocks, float* to) {
  int64_t i = 0;
  for (; i + 2 <= blocks; i += 2, codes += kNvBlock, to += 2 * kNvBlock) {
    const Bytes packed = load_bytes(codes), low = low_nibbles(packed), high = high_nibbles(packed);
    const Bytes even = kHigh ? high : low, odd = kHigh ? low : high;
    put(to, times(widen_e2m1(interleave_low(even, odd)), scales[i]));
    put(to + kNvBlock, times(widen_e2m1(interleave_high(even, odd)), scales[i + 1]));
  }
  if (i == blocks) return;
  char last[kVector] = {};
  memcpy(last, codes, kNvBlock / 2);
  const Bytes packed = load_bytes(last), low = low_nibbles(packed), high = high_nibbles(packed);
  put(to, times(widen_e2m1(kHigh ? interleave_low(high, low) : interleave_low(low, high)), scales[i]));
}

void decode_nvfp4(const DecodeArgs& a) {
  const int64_t first = a.first / kNvBlock, end = first + a.count / kNvBlock;
  const int64_t per_matrix = a.numel / int64_t(a.parameters[kMatrices]) / kNvBlock;
  for (int64_t block = first; block < end;) {
    const int64_t count = least(least(kVector, end - block), per_matrix - block % per_matrix);
    float scales[kVector];
    block_scales(a, block, count, scales);
    const char* const codes = static_cast<const char*>(a.bytes) + (block - first) * (kNvBlock / 2);
    float* const to = a.to + (block - first) * kNvBlock;
    if (is_set(a, kHighFirst))
      decode_blocks<true>(codes, scales, count, to);
    else
      decode_blocks<false>(codes, scales, count, to);
    block += count;
  }
}

}  // namespace

extern const Decoder kMxfp4, kMxfp4Transposed, kNvfp4;
const Decoder kMxfp4 = {"mxfp4", kMxBlock, kMxBlock / 2, decode_mxfp4, wrong_mxfp4, range_mxfp4};
const Decoder kMxfp4Transposed = {"mxfp4_transposed", kMxBlock,    kMxBlock / 2,   decode_transposed,
                                  wrong_transposed,   range_mxfp4, transpose_mxfp4};
const Decoder kNvfp4 = {"nvfp4", kNvBlock, kNvBlock / 2, decode_nvfp4, wrong_nvfp4, range_nvfp4};

}  // namespace FI_ISA
}  // namespace fi
