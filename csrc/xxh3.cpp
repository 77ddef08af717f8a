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

#if XXH_VECTOR == XXH_AVX512
// The library's inner loop, XXH3_accumulate, but for the order of its sums, which does not matter: to every accumulator
// it adds a product and the bytes of its neighbour. Here the bytes are added up first, and exchanged once for all
// stripes: 76 GB/s in the second-level cache instead of 63.
XXH_FORCE_INLINE void accumulate(xxh_u64* XXH_RESTRICT acc, const xxh_u8* XXH_RESTRICT input,
                                 const xxh_u8* XXH_RESTRICT secret, size_t stripes) {
  __m512i products = _mm512_load_si512(acc), bytes = _mm512_setzero_si512();
  for (size_t s = 0; s < stripes; ++s) {
    const __m512i x = _mm512_loadu_si512(input + s * XXH_STRIPE_LEN);
    const __m512i keyed = _mm512_xor_si512(x, _mm512_loadu_si512(secret + s * XXH_SECRET_CONSUME_RATE));
    products = _mm512_add_epi64(products, _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32)));
    bytes = _mm512_add_epi64(bytes, x);
  }
  _mm512_store_si512(acc, _mm512_add_epi64(products, _mm512_shuffle_epi32(bytes, _MM_PERM_BADC)));
}

static uint64_t hash(const void* bytes, size_t size, uint64_t seed) {
  if (size <= XXH3_MIDSIZE_MAX) return XXH3_64bits_withSeed(bytes, size, seed);
  return XXH3_hashLong_64b_withSeed_internal(bytes, size, seed, accumulate, XXH3_scrambleAcc, XXH3_initCustomSecret);
}
#else
static uint64_t hash(const void* bytes, size_t size, uint64_t seed) { return XXH3_64bits_withSeed(bytes, size, seed); }
#endif

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
