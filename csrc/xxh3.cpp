// Compiled once per instruction set, as cpu/loops.inc is: the library chooses its vectors by the compiler's flags.
#include "xxh3.h"

#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of its own intrinsics of AVX-512.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// All functions static, so that none is shared between instruction sets. No hints to load ahead: the bytes are in the
// caches, where these take 5 % of the time.
#define XXH_INLINE_ALL
#define XXH_NO_STDLIB
#define XXH_NO_PREFETCH
#include "third_party/xxhash.h"

namespace fi {
namespace FI_ISA {

static_assert(sizeof(XXH3_state_t) <= sizeof(Xxh3State::bytes), "the state of a hash has room");

static XXH3_state_t* of(Xxh3State* state) { return reinterpret_cast<XXH3_state_t*>(state->bytes); }

static uint64_t hash(const void* bytes, size_t size, uint64_t seed) { return XXH3_64bits_withSeed(bytes, size, seed); }

static void begin(Xxh3State* state, uint64_t seed) {
  memset(state->bytes, 0, sizeof state->bytes);
  XXH3_64bits_reset_withSeed(of(state), seed);
}

static void add(Xxh3State* state, const void* bytes, size_t size) { XXH3_64bits_update(of(state), bytes, size); }

static uint64_t end(const Xxh3State* state) {
  return XXH3_64bits_digest(reinterpret_cast<const XXH3_state_t*>(state->bytes));
}

const Xxh3 kXxh3 = {hash, begin, add, end};

}  // namespace FI_ISA
}  // namespace fi
