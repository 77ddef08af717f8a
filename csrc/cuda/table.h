// The pieces of one launch, as a kernel argument: no memory to allocate or to fill, so a launch can be part of a CUDA
// graph. Each piece has an entry, whose form is the kernel's, and some tiles; a block works on one tile.
#pragma once

#include "../dtypes.h"
#include "grid.h"

namespace fi {
namespace cuda {

// Entries lie at the front of `bytes`, the index at its end, backwards.
template <int kBytes>
struct TableOf {
  static constexpr int kSize = kBytes;
  uint32_t pieces;
  alignas(16) unsigned char bytes[kBytes];
};
using Table = TableOf<kArgumentBytes>;
// A launch takes all bytes of its arguments along, used or not: one tensor needs a hundred, a model 20 KiB.
using SmallTable = TableOf<(4 << 10) - 16>;

struct TableIndex {
  uint32_t first_tile, offset;
};

template <int kBytes>
FI_INLINE const TableIndex& index_of(const TableOf<kBytes>& table, uint32_t piece) {
  return reinterpret_cast<const TableIndex*>(table.bytes + kBytes)[-1 - int(piece)];
}

// The entry of this block's piece, and which of the piece's tiles is the block's.
template <class Entry, int kBytes>
FI_DEVICE const Entry& entry_of_block(const TableOf<kBytes>& table, uint32_t* tile) {
  const uint32_t block = block_index();
  uint32_t low = 0, high = table.pieces;  // the piece is in low..high-1
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (index_of(table, middle).first_tile <= block ? low : high) = middle;
  }
  const TableIndex& index = index_of(table, low);
  *tile = block - index.first_tile;
  return *reinterpret_cast<const Entry*>(table.bytes + index.offset);
}

// Fills a table, on the host.
class TableWriter {
 public:
  TableWriter() { clear(); }

  const Table& table() const { return table_; }
  // The same as a small table, if it fits.
  bool fits_small() const { return used_ + index_bytes() <= SmallTable::kSize; }
  SmallTable small() const {
    SmallTable small;
    small.pieces = table_.pieces;
    memcpy(small.bytes, table_.bytes, used_);
    memcpy(small.bytes + SmallTable::kSize - index_bytes(), table_.bytes + kArgumentBytes - index_bytes(),
           index_bytes());
    return small;
  }
  uint32_t tiles() const { return tiles_; }
  bool empty() const { return table_.pieces == 0; }
  void clear() { table_.pieces = tiles_ = used_ = 0; }

  // Adds a piece. Returns its entry, to be filled, or null if it does not fit any more.
  void* add(uint32_t tiles, size_t entry_bytes) {
    const size_t bytes = (entry_bytes + 15) / 16 * 16;
    if (used_ + bytes + index_bytes() + sizeof(TableIndex) > kArgumentBytes) return nullptr;
    if (tiles_ + uint64_t(tiles) > kMostTiles) return nullptr;
    const TableIndex index = {tiles_, used_};
    memcpy(table_.bytes + kArgumentBytes - index_bytes() - sizeof index, &index, sizeof index);
    unsigned char* const entry = table_.bytes + used_;
    memset(entry, 0, bytes);
    ++table_.pieces;
    tiles_ += tiles;
    used_ += uint32_t(bytes);
    return entry;
  }

 private:
  static constexpr uint64_t kMostTiles = 0x7fffffff;  // blocks of a grid
  size_t index_bytes() const { return table_.pieces * sizeof(TableIndex); }

  Table table_;
  uint32_t tiles_ = 0, used_ = 0;
};

}  // namespace cuda
}  // namespace fi
