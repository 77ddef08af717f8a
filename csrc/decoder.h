// Decoders: how the stored bytes of an encoded tensor become float32. Plain data, so that one can be compiled by
// itself, and once for each instruction set.
//
// A decoder is a function without state, and may be called from several threads at once. The same bytes give the same
// floats everywhere: it rounds in a fixed order, fuses no product with a sum unless it says fma, and every NaN that it
// makes is 7FC00000.
#pragma once

#include <cstdint>

namespace fi {

// The arguments of a decoder: some whole blocks of one tensor.
struct DecodeArgs {
  const void* bytes;     // of these blocks, one behind the other; of any alignment
  int64_t first, count;  // elements of the tensor, whole blocks: the last block may have more than the tensor
  int64_t numel, columns;
  // Scales and the like, as they are stored; of any alignment. Each points to where the companion begins, or would
  // begin: of a large one, only the bytes that `companion_range` names are there.
  const void* const* companions;
  const int64_t* companion_bytes;  // of each, all of it
  int companion_count;
  const double* parameters;
  int parameter_count;
  float* to;  // count elements
};

struct ByteRange {
  int64_t from, bytes;
};

// Neighbouring columns of one matrix that is stored by columns, to be brought into the order of its rows.
struct TransposeArgs {
  const void* bytes;              // of these columns, one behind the other
  const void* const* companions;  // what belongs to them of each companion, which is stored by columns, too
  int64_t first, count;           // of the matrix's columns
  int64_t rows, columns;          // of the matrix
  char* to;                       // where the matrix begins: of as many bytes as its columns have, with companions
};

// One format: `block_elements` neighbours in the tensor are stored in `block_bytes` neighbouring bytes.
struct Decoder {
  const char* name;
  int64_t block_elements, block_bytes;
  void (*decode)(const DecodeArgs&);

  // Null, or: what is wrong with the parameters and the number of companions of a tensor; null if nothing is.
  const char* (*wrong)(const DecodeArgs&) = nullptr;
  // The bytes of a companion that elements [first, first + count) need; of all elements, those that it must have. Null:
  // all of them, always.
  ByteRange (*companion_range)(const DecodeArgs&, int companion) = nullptr;
  // Of a format whose matrices are stored by columns, in which blocks follow each other; the first parameter is the
  // number of rows. A matrix is transposed as a whole, in an order that is up to the format, before it is decoded:
  // `bytes` are those of the transposed matrix, and all else in DecodeArgs is about that matrix, any of its elements.
  void (*transpose)(const TransposeArgs&) = nullptr;
};

// The decoder called `name`: one of `own`, the table of an instruction set, which null ends; or a registered one. Null,
// if there is none. Valid until one of that name is registered again.
const Decoder* find_decoder(const Decoder* const* own, const char* name);

// Adds a decoder for every instruction set, or replaces one that was added. False if its blocks are of no size that the
// pump reads: 1 to kChunk elements, of 1 to 16 bytes each.
bool register_decoder(const Decoder& decoder);

}  // namespace fi
