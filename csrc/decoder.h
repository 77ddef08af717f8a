// Decoders: how the stored bytes of an encoded tensor become float32. Plain data, so that one can be compiled by
// itself.
//
// A decoder is a function without state, and may be called from several threads at once. The same bytes give the same
// floats everywhere: it rounds in a fixed order, and fuses no product with a sum unless it says fma.
#pragma once

#include <cstdint>

namespace fi {

// The arguments of a decoder: some whole blocks of one tensor.
struct DecodeArgs {
  const void* bytes;     // of these blocks, one behind the other; of any alignment
  int64_t first, count;  // elements of the tensor, whole blocks: the last block may have more than the tensor
  int64_t numel, columns;
  const void* const* companions;   // scales and the like, whole, as they are stored; of any alignment
  const int64_t* companion_bytes;  // of each
  int companion_count;
  const double* parameters;
  int parameter_count;
  float* to;  // count elements
};

// One format: `block_elements` neighbours in the tensor are stored in `block_bytes` neighbouring bytes.
struct Decoder {
  const char* name;
  int64_t block_elements, block_bytes;
  void (*decode)(const DecodeArgs&);
};

// The decoder called `name`, or null. Valid until one of that name is registered again.
const Decoder* find_decoder(const char* name);

// Adds a decoder to those of the table, or replaces one that was added. False if its blocks are of no size that the
// pump reads: 1 to kChunk elements, of 1 to 16 bytes each.
bool register_decoder(const Decoder& decoder);

}  // namespace fi
