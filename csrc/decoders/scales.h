// Where the scales of blocks lie, for formats that do not have them row after row.
#pragma once

#include <cstdint>

#include "../decoder.h"
#include "../dtypes.h"

namespace fi {
namespace FI_ISA {

FI_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Tiles of 128 rows and 4 scales of a row, padded at both edges, one row of tiles after the other: the order in which
// the matrix units of NVIDIA's GPUs read scales of one byte.
constexpr int64_t kTileRows = 128, kTileColumns = 4, kTileBytes = kTileRows * kTileColumns;

FI_INLINE int64_t tiles_of(int64_t per_row) { return (per_row + kTileColumns - 1) / kTileColumns; }

// The index of a row's scale `column`. per_row: scales that a row has.
FI_INLINE int64_t tile_index(int64_t row, int64_t column, int64_t per_row) {
  const int64_t tile = row / kTileRows * tiles_of(per_row) + column / kTileColumns;
  return tile * kTileBytes + row % 32 * 16 + row % kTileRows / 32 * kTileColumns + column % kTileColumns;
}

// The tiles that elements [first, first + count) need, of a tensor with one scale for each `block` of a row.
FI_INLINE ByteRange tile_range(int64_t first, int64_t count, int64_t numel, int64_t columns, int64_t block) {
  const int64_t last = least(first + count, numel) - 1, per_row = (columns + block - 1) / block;
  if (last < first) return {0, 0};
  int64_t from = first / columns / kTileRows * tiles_of(per_row), end = last / columns / kTileRows * tiles_of(per_row);
  if (first / columns == last / columns) {
    from += first % columns / block / kTileColumns;
    end += last % columns / block / kTileColumns + 1;
  } else {
    end += tiles_of(per_row);
  }
  return {from * kTileBytes, (end - from) * kTileBytes};
}

}  // namespace FI_ISA
}  // namespace fi
