// Codes of one byte, and a scale for each block of rows and columns: code * scale.
//
// companions  scales [matrices, ceil(rows / block_rows), ceil(columns / block_columns)]
// parameters  dtype of the scales (ScaleKind), block_rows, block_columns, rows of a matrix; and perhaps
//             1 if scales of one byte lie in tiles (tile_index of scales.h), of blocks of one row in one matrix
#include "../decoder.h"
#include "scales.h"
#include "vectors.h"

namespace fi {
namespace FI_ISA {
namespace {

enum ScaleKind { kF32, kF16, kBF16, kE8M0 };
constexpr int64_t kScaleBytes[] = {4, 2, 2, 1};

// Where the blocks of a tensor lie.
struct Blocks {
  ScaleKind kind;
  int64_t block_rows, block_columns, rows, columns;
  int64_t per_row, per_matrix;  // scales of a row, of a matrix
  bool tiled;

  explicit Blocks(const DecodeArgs& a)
      : kind(ScaleKind(int(a.parameters[0]))),
        block_rows(int64_t(a.parameters[1])),
        block_columns(int64_t(a.parameters[2])),
        rows(int64_t(a.parameters[3])),
        columns(a.columns),
        per_row((columns + block_columns - 1) / block_columns),
        per_matrix((rows + block_rows - 1) / block_rows * per_row),
        tiled(a.parameter_count == 5 && a.parameters[4] == 1) {}

  // The first scale of a row of the tensor, if they are in no tiles.
  int64_t scales_of(int64_t row) const { return row / rows * per_matrix + row % rows / block_rows * per_row; }
  int64_t scale_of(int64_t row, int64_t block) const {
    return tiled ? tile_index(row, block, per_row) : scales_of(row) + block;
  }

  float scale(const void* scales, int64_t index) const {
    switch (kind) {
      case kF16:
        return widen_f16(load_at<uint16_t>(scales, index));
      case kBF16:
        return widen_f32<DType::BF16>(load_at<uint16_t>(scales, index));
      case kE8M0:
        return e8m0(load_at<uint8_t>(scales, index));
      default:
        return load_at<float>(scales, index);
    }
  }
};

const char* wrong(const DecodeArgs& a) {
  if (a.companion_count != 1) return "it takes 1 companion, the scales";
  if (a.parameter_count != 4 && a.parameter_count != 5) return "it takes 4 or 5 parameters";
  if (a.parameters[0] < kF32 || a.parameters[0] > kE8M0) return "its first parameter is 0, 1, 2 or 3";
  for (int i = 1; i < 4; ++i)
    if (!(a.parameters[i] >= 1)) return "a block and a matrix have 1 row and column or more";
  if (a.parameter_count == 5 && a.parameters[4] == 1 &&
      (a.parameters[0] != kE8M0 || a.parameters[1] != 1 || a.parameters[3] * double(a.columns) != double(a.numel)))
    return "tiles of scales are E8M0, of blocks of one row in one matrix";
  return nullptr;
}

ByteRange scales_range(const DecodeArgs& a, int) {
  const Blocks blocks(a);
  if (blocks.tiled) return tile_range(a.first, a.count, a.numel, a.columns, blocks.block_columns);
  const int64_t last = least(a.first + a.count, a.numel) - 1;
  if (last < a.first) return {0, 0};
  int64_t from = blocks.scales_of(a.first / a.columns), end = blocks.scales_of(last / a.columns);
  if (blocks.block_rows == 1 || a.first / a.columns == last / a.columns) {
    from += a.first % a.columns / blocks.block_columns;
    end += last % a.columns / blocks.block_columns + 1;
  } else {  // rows of one block begin anew in its scales
    end += blocks.per_row;
  }
  const int64_t size = kScaleBytes[blocks.kind];
  return {from * size, (end - from) * size};
}

// Kinds of codes.
struct E4M3 {
  FI_INLINE Floats widen(Bytes codes) { return widen_e4m3(codes); }
};
struct E5M2 {
  FI_INLINE Floats widen(Bytes codes) { return widen_e5m2(codes); }
};
struct I8 {
  FI_INLINE Floats widen(Bytes codes) { return widen_i8(codes); }
};

template <class Code>
void scaled_run(const char* codes, float scale, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + kVector <= count; i += kVector) put(to + i, times(Code::widen(load_bytes(codes + i)), scale));
  if (i == count) return;
  char last[kVector] = {};
  float numbers[kVector];
  memcpy(last, codes + i, size_t(count - i));
  put(numbers, times(Code::widen(load_bytes(last)), scale));
  memcpy(to + i, numbers, size_t(count - i) * sizeof *to);
}

// `count` elements of a row, from `column` on: a run for each block.
template <class Code>
void decode_row(const DecodeArgs& a, const Blocks& blocks, int64_t row, int64_t column, int64_t count,
                const char* codes, float* to) {
  const int64_t first = blocks.scales_of(row);
  int64_t block = column / blocks.block_columns, left = blocks.block_columns - column % blocks.block_columns;
  for (int64_t done = 0; done < count; ++block) {
    const int64_t run = least(left, count - done);
    const int64_t index = blocks.tiled ? tile_index(row, block, blocks.per_row) : first + block;
    scaled_run<Code>(codes + done, blocks.scale(a.companions[0], index), to + done, run);
    done += run;
    left = blocks.block_columns;
  }
}

template <class Code>
void decode(const DecodeArgs& a) {
  const Blocks blocks(a);
  const char* const codes = static_cast<const char*>(a.bytes);
  const int64_t end = a.first + a.count;
  for (int64_t at = a.first; at < end;) {
    const int64_t row = at / a.columns, column = at % a.columns;
    int64_t count = a.columns - column;
    if (blocks.per_row == 1) {  // one run with the rows of the block that follow, up to the end of the matrix
      const int64_t in_matrix = row % blocks.rows;
      count += (least(blocks.block_rows - in_matrix % blocks.block_rows, blocks.rows - in_matrix) - 1) * a.columns;
      count = least(count, end - at);
      const float scale = blocks.scale(a.companions[0], blocks.scale_of(row, 0));
      scaled_run<Code>(codes + (at - a.first), scale, a.to + (at - a.first), count);
    } else {
      count = least(count, end - at);
      decode_row<Code>(a, blocks, row, column, count, codes + (at - a.first), a.to + (at - a.first));
    }
    at += count;
  }
}

}  // namespace

extern const Decoder kScaledE4M3, kScaledE5M2, kScaledI8;
const Decoder kScaledE4M3 = {"scaled_f8_e4m3", 1, 1, decode<E4M3>, wrong, scales_range};
const Decoder kScaledE5M2 = {"scaled_f8_e5m2", 1, 1, decode<E5M2>, wrong, scales_range};
const Decoder kScaledI8 = {"scaled_i8", 1, 1, decode<I8>, wrong, scales_range};

}  // namespace FI_ISA
}  // namespace fi
