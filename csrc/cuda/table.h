// The pieces of one launch, as a kernel argument: no memory to allocate or to fill, so a launch can be part of a CUDA
// graph. Each piece has an entry, whose form is the kernel's, and some tiles; a block works on one tile.
#pragma once

#include "../dtypes.h"
#include "grid.h"

namespace fi {
namespace cuda {

// Entries lie at the front of `bytes`, the index at its end, backwards.
struct Table {
  uint32_t pieces;
  alignas(16) unsigned char bytes[kArgumentBytes];
};

struct TableIndex {
  uint32_t first_tile, offset;
};

FI_INLINE const TableIndex& index_of(const Table& table, uint32_t piece) {
  return reinterpret_cast<const TableIndex*>(table.bytes + kArgumentBytes)[-1 - int(piece)];
}

// The entry of this block's piece, and which of the piece's tiles is the block's.
template <class Entry>
FI_DEVICE const Entry& entry_of_block(const Table& table, uint32_t* tile) {
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
  uint32_t tiles() const { return tiles_; }
  bool empty() const { return table_.pieces == 0; }
  void clear() { table_.pieces = tiles_ = used_ = 0; }

  // Adds a piece. Returns its entry, to be filled, or null if it does not fit any more.
  void* add(uint32_t tiles, size_t entry_bytes) {
    const size_t bytes = (entry_bytes + 15) / 16 * 16;
    if (used_ + bytes + (table_.pieces + 1) * sizeof(TableIndex) > kArgumentBytes) return nullptr;
    if (tiles_ + uint64_t(tiles) > kMostTiles) return nullptr;
    const TableIndex index = {tiles_, used_};
    memcpy(table_.bytes + kArgumentBytes - (table_.pieces + 1) * sizeof index, &index, sizeof index);
    unsigned char* const entry = table_.bytes + used_;
    memset(entry, 0, bytes);
    ++table_.pieces;
    tiles_ += tiles;
    used_ += uint32_t(bytes);
    return entry;
  }

 private:
  static constexpr uint64_t kMostTiles = 0x7fffffff;  // blocks of a grid
  Table table_;
  uint32_t tiles_ = 0, used_ = 0;
};

}  // namespace cuda
}  // namespace fi
