// Runs one table of cases on every usable CPU backend and prints `ISA GROUP HASH` for each group of cases. Inputs come
// from integer arithmetic alone, so that two processors can be compared by these lines: run.sh does.
// A hash covers the output buffers with the guard bytes around them, exact counts, and the bits of measured sums.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../../csrc/cpu/backend.h"
#include "../../../csrc/decoder.h"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace {

using namespace fi;

const DType kAll[] = {DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8_E4M3, DType::F8_E5M2};
const char* const kNames[] = {"f64", "f32", "f16", "bf16", "f8_e4m3", "f8_e5m2"};
const int kExponentBias[kDTypes] = {1023, 127, 15, 127, 7, 15}, kMantissa[kDTypes] = {52, 23, 10, 7, 3, 2};
static_assert(sizeof kAll / sizeof *kAll == kDTypes, "these tables have an entry per dtype");
const int kSizes[] = {0, 1, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025}, kLarge[] = {16383, 16384, 16385};
const int kOffsets[] = {0, 1, 2, 3, 5, 32};
const int kGuard = 128;  // bytes on either side of a buffer: two of the widest vectors
const double kWeights[] = {0.3, -0.25, 0.6, 1.5, 0.05, -1.0, 0.4, 0.7, 1.0 / 3};

// ---- hash and random bits ------------------------------------------------------------------------------------------

struct Hash {  // FNV-1a, 64 bits
  uint64_t value = 0xcbf29ce484222325ull;

  void bytes(const void* p, size_t n) {
    for (size_t i = 0; i < n; ++i) value = (value ^ static_cast<const unsigned char*>(p)[i]) * 0x100000001b3ull;
  }
  void integer(int64_t v) { bytes(&v, sizeof v); }
  void real(double v) {  // the contract fixes a NaN's bits where it is stored in a tensor, not in a sum
    v = canonical_nan(v);
    bytes(&v, sizeof v);
  }
};

void print(const Backend& backend, const char* group, const char* name, const Hash& h) {
  printf("%s %s%s %016llx\n", backend.name, group, name, static_cast<unsigned long long>(h.value));
  fflush(stdout);
}

uint64_t random_bits(uint64_t seed, uint64_t i) {  // splitmix64
  uint64_t z = (seed << 40) + (i + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// ---- inputs --------------------------------------------------------------------------------------------------------

enum Fill { kMiddle, kClose, kEverything, kFills };

// A code of dtype d from the middle of its range: eleven binades about 2^-3, both signs.
uint64_t middle(int d, uint64_t random) {
  const uint64_t mantissa = (random >> 8) & ((1ull << kMantissa[d]) - 1);
  const uint64_t exponent = uint64_t(kExponentBias[d]) - 6 + random % 8;
  const int bits = 8 * size_of(kAll[d]);
  return (random >> 63) << (bits - 1) | exponent << kMantissa[d] | mantissa;
}

uint64_t code(int d, Fill fill, int input, uint64_t e, uint64_t seed) {
  const uint64_t own = random_bits(seed * 64 + uint64_t(input), e);
  if (fill == kMiddle) return middle(d, own);
  if (fill == kClose) return middle(d, random_bits(seed * 64, e)) + own % 3;
  if (size_of(kAll[d]) <= 2) return e * uint64_t(1 + 154 * input) + uint64_t(12345 * input);  // each 16-bit code once
  const int bits = 8 * size_of(kAll[d]);
  const uint64_t sign = (own >> 63) << (bits - 1), infinity = (2ull * kExponentBias[d] + 1) << kMantissa[d];
  switch (own % 8) {
    case 0:
      return sign | (own >> 8) % 3;  // zeros, the smallest subnormals
    case 1:
      return sign | (infinity + (own >> 8) % 5 - 2);  // the largest values, infinities, signalling NaN
    case 2:
      return sign | infinity | (own >> 8) % (1ull << kMantissa[d]);
    case 3:
      return sign | (own >> 8) % (1ull << kMantissa[d]);
    case 4:
      return own >> (64 - bits);
    default: {  // the range where the small formats overflow, are subnormal and underflow
      const uint64_t exponent = uint64_t(kExponentBias[d]) - 30 + (own >> 40) % 48;
      const uint64_t mantissa = own % 3 ? (own >> 8) % (1ull << kMantissa[d]) : 3ull << (kMantissa[d] - 5);
      return sign | exponent << kMantissa[d] | mantissa;
    }
  }
}

struct Buffer {
  std::vector<unsigned char> all;
  unsigned char* data;

  Buffer(size_t bytes, int offset) : all(bytes + 2 * kGuard + 128, 0xa5) {
    data = all.data() + kGuard;
    data += (64 - reinterpret_cast<uintptr_t>(data) % 64) % 64 + size_t(offset);
  }
  void hash(Hash& h, size_t bytes) const { h.bytes(data - kGuard, bytes + 2 * kGuard); }
};

Buffer input(int d, Fill fill, int index, int64_t numel, int offset, uint64_t seed) {
  const int size = size_of(kAll[d]);
  Buffer b(size_t(numel * size), offset);
  for (int64_t e = 0; e < numel; ++e) {
    const uint64_t bits = code(d, fill, index, uint64_t(e), seed);
    memcpy(b.data + e * size, &bits, size_t(size));  // both processors are little-endian
  }
  return b;
}

// ---- combine -------------------------------------------------------------------------------------------------------

enum Rows { kAffine, kPair, kScaled, kPlain, kCopies, kRowKinds };

struct Case {
  std::vector<int> in;  // taken in turn by the n inputs
  int out, n, k;
  int64_t numel;
  int offset;
  Fill fill;
  Rows rows;
  bool stochastic, saturate;
  int64_t first;
};

void add_rows(const Case& c, std::vector<std::vector<Term>>& terms, std::vector<Row>& rows) {
  terms.resize(size_t(c.k));
  for (int j = 0; j < c.k; ++j) {
    std::vector<Term>& t = terms[size_t(j)];
    const int pivot = j % c.n, count = c.rows == kPair ? 1 : c.rows == kAffine || c.rows == kScaled ? c.n - 1 : 0;
    double total = c.rows == kScaled ? (j % 2 ? 0.0 : 1.75) : c.rows == kPlain ? 0.7 + j : 1.0;
    for (int i = 1; i <= count; ++i) t.push_back({(pivot + i) % c.n, kWeights[(i + 3 * j) % 9]});
    rows.push_back({pivot, int(t.size()), total, t.data()});
  }
}

void run_combine(const Backend& backend, const Case& c, uint64_t seed, Hash& h) {
  std::vector<Buffer> inputs, outputs;
  std::vector<const void*> x;
  std::vector<DType> in;
  std::vector<void*> out;
  std::vector<uint64_t> keys;
  for (int i = 0; i < c.n; ++i) {
    const int d = c.in[size_t(i) % c.in.size()];
    inputs.push_back(input(d, c.fill, i, c.numel, c.offset * (2 * i + 1) % 64, seed));
    in.push_back(kAll[d]);
  }
  const size_t bytes = size_t(c.numel * size_of(kAll[c.out]));
  for (int j = 0; j < c.k; ++j) {
    outputs.emplace_back(bytes, c.offset * (2 * (c.n + j) + 1) % 64);
    keys.push_back(random_bits(seed, uint64_t(j)));
  }
  for (const Buffer& b : inputs) x.push_back(b.data);
  for (Buffer& b : outputs) out.push_back(b.data);
  std::vector<std::vector<Term>> terms;
  std::vector<Row> rows;
  add_rows(c, terms, rows);
  std::vector<RowStats> stats(size_t(c.k), RowStats{});
  CombineArgs a{};
  a.x = x.data();
  a.in = in.data();
  a.rows = rows.data();
  a.out = out.data();
  a.keys = keys.data();
  a.n = c.n;
  a.k = c.k;
  a.out_dtype = kAll[c.out];
  a.stochastic = c.stochastic;
  a.fp8_saturate = c.saturate;
  a.stats_every = int(seed % 3);
  a.streamed = seed % 2 != 0;
  a.numel = c.numel;
  a.first = c.first;
  a.stats = stats.data();
  backend.combine(a);
  for (const Buffer& b : outputs) b.hash(h, bytes);
  for (const RowStats& s : stats)
    for (int64_t count : {s.nan_in, s.inf_in, s.nan_out, s.inf_out, s.sampled, s.changed}) h.integer(count);
}

// Every kind of rows, roundings and policies at one size; n, k, misalignment and the kind of inputs go round.
int run_kinds(const Backend& backend, const std::vector<int>& in, int out, int64_t numel, int turn, Hash& h) {
  for (int rows = 0; rows < kRowKinds; ++rows)
    for (int mode = 0; mode < (size_of(kAll[out]) == 1 ? 4 : 2); ++mode, ++turn) {
      const int least = rows == kPair ? 2 : int(in.size()), n = least + turn % (9 - least);
      const int64_t first = turn % 4 * 5 + turn % 2 * (kChunk - 100);
      run_combine(backend,
                  {in, out, n, 1 + turn % 4, numel, kOffsets[turn % 6], Fill(turn % kFills), Rows(rows), mode % 2 == 1,
                   mode < 2, first},
                  uint64_t(turn), h);
    }
  return turn;
}

// ---- measure -------------------------------------------------------------------------------------------------------

void run_measure(const Backend& backend, int in, int n, int64_t numel, Fill fill, bool deltas, bool wide, Hash& h) {
  std::vector<Buffer> inputs;
  std::vector<const void*> x;
  for (int i = 0; i < n; ++i) inputs.push_back(input(in, fill, i, numel, kOffsets[i % 6], uint64_t(numel + n)));
  for (const Buffer& b : inputs) x.push_back(b.data);
  const std::vector<DType> dtypes(size_t(n), kAll[in]);
  std::vector<double> scratch(size_t(n * kChunk)), sums(size_t(measure_sums(n)));
  std::vector<int64_t> nonzero(size_t(n), 0);
  backend.measure({x.data(), dtypes.data(), n, deltas, wide, numel, scratch.data(), sums.data(), nonzero.data()});
  for (double s : sums) h.real(s);
  for (int64_t count : nonzero) h.integer(count);
}

#include "decoders.inc"
#include "groups.inc"
#include "masked.inc"

// ---- the table -----------------------------------------------------------------------------------------------------

void run_dtypes(const Backend& backend) {
  for (int in = 0; in < kDTypes; ++in) {
    Hash h;
    int turn = in;
    for (int out = 0; out < kDTypes; ++out)
      for (int numel : kSizes) turn = run_kinds(backend, {in}, out, numel, turn, h);
    print(backend, "combine-from-", kNames[in], h);
  }
}

void run_mixtures(const Backend& backend) {
  Hash h;
  int turn = 0;
  for (const std::vector<int>& in : std::vector<std::vector<int>>{{3, 1}, {2, 3}, {1, 0}, {3, 4}, {5, 2, 0}})
    for (int out = 0; out < kDTypes; ++out)
      for (int numel : {17, 257, 1025}) turn = run_kinds(backend, in, out, numel, turn, h);
  print(backend, "combine-mixtures", "", h);
}

void run_large(const Backend& backend) {
  Hash h;
  int turn = 0;
  for (int d = 0; d < kDTypes; ++d)
    for (int numel : kLarge)
      for (int rows : {kAffine, kPair}) {
        run_combine(backend, {{d}, d, 2, 1, numel, 1, Fill(turn % kFills), Rows(rows), turn % 4 == 3, true, 5},
                    uint64_t(turn), h);
        ++turn;
      }
  print(backend, "combine-large", "", h);
}

// All 65,536 codes of a 16-bit dtype, to every dtype.
void run_patterns(const Backend& backend, int in) {
  Hash h;
  for (int out = 0; out < kDTypes; ++out)
    for (Rows rows : {kPair, kCopies, kPlain})
      for (bool stochastic : {false, true})
        run_combine(backend, {{in}, out, 2, 1, 65536, 3, kEverything, rows, stochastic, rows != kPair, 0},
                    stochastic ? 4 : 3, h);
  print(backend, "patterns-", kNames[in], h);
}

void run_measures(const Backend& backend, bool deltas) {
  Hash h;
  for (int in = 0; in < kDTypes; ++in) {
    int turn = in;
    for (int n = 1; n <= 8; ++n)
      for (int64_t numel : {0, 1, 17, 255, 256, 257, 1025}) {
        ++turn;
        run_measure(backend, in, n, numel, Fill(turn % kFills), deltas, in == 0 || turn % 5 == 0, h);
      }
    for (int64_t numel : {16383, 16384})
      for (int n : {2, 3}) run_measure(backend, in, n, numel, Fill(++turn % 2), deltas, in == 0, h);
  }
  print(backend, "measure-", deltas ? "deltas" : "inputs", h);
}

void run_masks(const Backend& backend) {
  int turn = 0;
  for (int in = 0; in < kDTypes; ++in) {
    Hash h;
    for (int out = 0; out < kDTypes; ++out)
      for (int64_t columns : {1, 3, 17, 100, 1025, 5000})
        run_masked(backend, in, out, columns > 2000 ? 3 : 7, columns, turn++, h);
    print(backend, "masked-from-", kNames[in], h);
  }
}

// A host program that flushes subnormals and rounds toward zero: FloatEnvironment undoes it, and puts it back.
uint64_t spoil_environment() {
#if defined(__x86_64__)
  _mm_setcsr(0x1f80 | 0x8040 | 0x6000);
  return _mm_getcsr();
#else
  uint64_t got;
  asm volatile("msr fpcr, %0" ::"r"(uint64_t(0x7c00000)));  // alternative half, default NaN, flush to zero, toward zero
  asm volatile("mrs %0, fpcr" : "=r"(got));
  return got;
#endif
}
bool environment_is(uint64_t expected) {
#if defined(__x86_64__)
  return (_mm_getcsr() & ~0x3fu) == (expected & ~uint64_t(0x3f));
#else
  uint64_t got;
  asm volatile("mrs %0, fpcr" : "=r"(got));
  return got == expected;
#endif
}

void run_spoiled(const Backend& backend) {
  Hash h;
  const uint64_t spoiled = spoil_environment();
  {
    const FloatEnvironment environment;
    for (int d = 0; d < kDTypes; ++d)
      run_combine(backend, {{d}, d, 3, 2, 4097, 1, kEverything, kAffine, false, true, 0}, 3, h);
  }
  const bool restored = environment_is(spoiled);
  const FloatEnvironment environment;
  if (!restored) {
    fprintf(stderr, "FloatEnvironment did not put the floating-point environment back\n");
    exit(1);
  }
  print(backend, "spoiled-environment", "", h);
}

}  // namespace

int main() {
  for (int i = 0; i < backend_count(); ++i) {
    const Backend& backend = backend_at(i);
    if (!backend.usable()) continue;
    {
      const FloatEnvironment environment;
      run_dtypes(backend);
      run_mixtures(backend);
      run_large(backend);
      run_patterns(backend, int(DType::BF16));
      run_patterns(backend, int(DType::F16));
      run_measures(backend, false);
      run_measures(backend, true);
      run_masks(backend);
      run_groups(backend);
      run_decoders(backend);
    }
    run_spoiled(backend);
  }
  return 0;
}
