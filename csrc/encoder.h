// Encoders: how float32 numbers become the stored bytes of an encoded tensor, codes and the scales of their blocks.
// Plain data: encoding.h applies it to a tensor.
#pragma once

#include "ops.h"

namespace fi {

// How scales are stored: as the first parameter of the decoders of these formats has it.
enum class ScaleKind { kF32 = 0, kF16 = 1, kBF16 = 2, kE8M0 = 3 };

// One format. The numbers of a block are divided by its scale and rounded to codes.
struct Encoder {
  const char* name;  // that of the decoder that reads it
  Codes codes;
  float largest;                        // the code's magnitude of the largest number of a block
  int64_t block_elements, block_bytes;  // as stored: neighbours in the tensor are in neighbouring bytes
};

// The encoder called `name`, or null.
const Encoder* find_encoder(const char* name);

// The scale of a block, rounded to `kind`: as it is stored, and as codes are divided by it. docs/NUMERICS.md, rule 17.
struct Scale {
  float value;
  uint32_t bits;  // as many as `kind` has
};

// magnitude    the largest of the block, as float32 bits
// power_of_two the least power of two that is not less; scales of kind E8M0 are that in any case
Scale scale_of(const Encoder& encoder, ScaleKind kind, bool power_of_two, uint32_t magnitude);

int scale_bytes(ScaleKind kind);

}  // namespace fi
