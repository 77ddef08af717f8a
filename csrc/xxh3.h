// XXH3-64 of the library xxHash (third_party/xxhash.h), compiled once per instruction set. All give the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fi {

// A hash of bytes that come one after the other.
struct alignas(64) Xxh3State {
  unsigned char bytes[576];
};

struct Xxh3 {
  // Of `size` bytes of any alignment.
  uint64_t (*hash)(const void* bytes, size_t size, uint64_t seed);
  // The same in parts.
  void (*begin)(Xxh3State* state, uint64_t seed);
  void (*add)(Xxh3State* state, const void* bytes, size_t size);
  uint64_t (*end)(const Xxh3State* state);
};

#if defined(FI_ISA)
namespace FI_ISA {
extern const Xxh3 kXxh3;
}
#endif

}  // namespace fi
