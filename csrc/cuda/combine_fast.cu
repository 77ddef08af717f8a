// Sums of one dtype, rounded to nearest, of aligned operands: 16 bytes at a time.

#include "combine_jobs.h"
#include "sums.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kThreads = 256;

// The pivot is x[0]. N weights, and which of the terms there are: a weight that is 0 in float32 is a term all the same.
template <int N>
struct FastRow {
  void* out;
  int64_t* counts;  // kCounts, or null
  float total;
  uint32_t terms;  // bit i: that of x[i]
  float w[N];
};

template <int N>
struct FastPiece {
  int64_t numel;
  uint32_t n_rows;
  const void* x[N];
  FastRow<N> rows[1];  // n_rows of them
};

template <int N>
constexpr size_t fast_bytes(size_t rows) {
  return sizeof(FastPiece<N>) + (rows - 1) * sizeof(FastRow<N>);
}

// Vectors of each input that a thread loads before it needs the first, and blocks in a multiprocessor: with both, 48
// KiB and more are under way in it.
template <int N>
constexpr int kUnroll = N == 1   ? 4
                        : N == 2 ? 2
                                 : 1;
template <int N>
constexpr int kResident = N == 2 || N == 3 ? 4
                          : N <= 5         ? 3
                                           : 2;
constexpr int kPasses = 4;  // of a tile
template <int N>
constexpr int kTileVectors = kThreads * kUnroll<N> * kPasses;

template <DType D>
constexpr int kElements = 16 / int(sizeof(typename Format<D>::Bits));  // of a vector

template <DType D>
FI_DEVICE typename Format<D>::Bits element_of(const Vector16& v, int e) {
  if constexpr (sizeof(typename Format<D>::Bits) == 4)
    return v.w[e];
  else
    return uint16_t(v.w[e / 2] >> (16 * (e % 2)));
}

// One row of one vector. `nonfinite` becomes true where a NaN or an infinity is stored.
template <DType D, int N>
FI_DEVICE Vector16 fast_sum(const FastRow<N>& row, const Vector16 (&x)[N], bool* nonfinite) {
  constexpr int kE = kElements<D>;
  float p[kE], acc[kE];
#pragma unroll
  for (int e = 0; e < kE; ++e) {
    p[e] = widen_fast<float, D>(element_of<D>(x[0], e));
    acc[e] = 0;
  }
#pragma unroll
  for (int i = 1; i < N; ++i)
    if (row.terms >> i & 1)
#pragma unroll
      for (int e = 0; e < kE; ++e)
        acc[e] = add_term(row.w[i], widen_fast<float, D>(element_of<D>(x[i], e)), p[e], acc[e]);
  Vector16 y{};
#pragma unroll
  for (int e = 0; e < kE; ++e) {
    const uint32_t code = narrow_fast<D>(add_pivot(row.total, p[e], acc[e]));
    *nonfinite = *nonfinite || (code & Format<D>::kInf) == Format<D>::kInf;
    if constexpr (kE == 4)
      y.w[e] = code;
    else
      y.w[e / 2] |= code << (16 * (e % 2));
  }
  return y;
}

// Counts the NaN and Inf of some elements: rare, so it reads them again.
template <DType D, int N>
FI_RARE void fast_count(const FastPiece<N>& piece, const FastRow<N>& row, int64_t at, int n) {
#pragma unroll 1
  for (int64_t i = at; i < at + n; ++i) {
    count_one(widen_at<float, D>(row.out, i), row.counts + kNanOut, row.counts + kInfOut);
#pragma unroll 1
    for (int j = 0; j < N; ++j)
      if (j == 0 || row.terms >> j & 1)
        count_one(widen_at<float, D>(piece.x[j], i), row.counts + kNanIn, row.counts + kInfIn);
  }
}

// One element of those behind the last whole vector, as a vector of which only the first element counts.
template <DType D, int N>
FI_RARE void fast_tail(const FastPiece<N>& piece, int64_t at) {
  using Bits = typename Format<D>::Bits;
  Vector16 x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = {{load_bits<Bits>(static_cast<const Bits*>(piece.x[i]) + at), 0, 0, 0}};
#pragma unroll 1
  for (uint32_t k = 0; k < piece.n_rows; ++k) {
    const FastRow<N>& row = piece.rows[k];
    bool nonfinite = false;
    store_bits(static_cast<Bits*>(row.out) + at, Bits(fast_sum<D, N>(row, x, &nonfinite).w[0]));
    if (nonfinite && row.counts) fast_count<D, N>(piece, row, at, 1);
  }
}

template <DType D, int N, int kBytes>
FI_KERNEL(kThreads, kResident<N>)
fast(FI_ARGUMENT TableOf<kBytes> table) {
  constexpr int kU = kUnroll<N>, kE = kElements<D>;
  uint32_t tile;
  const FastPiece<N>& piece = entry_of_block<FastPiece<N>>(table, &tile);
  const int64_t vectors = piece.numel / kE;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t at = (int64_t(tile) * kPasses + pass) * (kThreads * kU) + thread_index();
    Vector16 x[kU][N];
#pragma unroll
    for (int u = 0; u < kU; ++u)
      if (at + u * kThreads < vectors)
#pragma unroll
        for (int i = 0; i < N; ++i)
          x[u][i] = load_once(static_cast<const char*>(piece.x[i]) + 16 * (at + u * kThreads));
#pragma unroll 1
    for (uint32_t k = 0; k < piece.n_rows; ++k) {
      const FastRow<N>& row = piece.rows[k];
#pragma unroll
      for (int u = 0; u < kU; ++u) {
        const int64_t v = at + u * kThreads;
        if (v >= vectors) break;
#pragma unroll
        for (int i = 0; i < N; ++i) compute_again(&x[u][i]);
        bool nonfinite = false;
        const Vector16 y = fast_sum<D, N>(row, x[u], &nonfinite);
        store_once(static_cast<char*>(row.out) + 16 * v, y);
        if (nonfinite && row.counts) fast_count<D, N>(piece, row, v * kE, kE);
      }
    }
  }
  const bool last = (int64_t(tile) + 1) * kTileVectors<N> >= vectors;
  if (last && thread_index() < piece.numel % kE) fast_tail<D, N>(piece, vectors * kE + thread_index());
}

template <DType D, int N>
bool add_fast(const Job& job, TableWriter* table) {
  const Sum& sum = *job.sum;
  const int64_t vectors = sum.numel / kElements<D>;
  const int64_t tiles = std::max<int64_t>(1, (vectors + kTileVectors<N> - 1) / kTileVectors<N>);
  auto* const piece = static_cast<FastPiece<N>*>(table->add(tiles, fast_bytes<N>(job.rows.size())));
  if (!piece) return false;
  piece->numel = sum.numel;
  piece->n_rows = uint32_t(job.rows.size());
  for (int i = 0; i < N; ++i) piece->x[i] = sum.x[size_t(job.inputs[size_t(i)])];
  for (size_t k = 0; k < job.rows.size(); ++k) {
    const SumRow& from = sum.rows[job.rows[k]];
    FastRow<N>& to = piece->rows[k];
    to.out = from.out;
    to.counts = job.counts(job.rows[k]);
    to.total = float(from.total);
    for (const Term& term : from.terms) {
      const int i = job.index_of(term.input);
      to.terms |= 1u << i;
      to.w[i] = float(term.weight);
    }
  }
  return true;
}

template <DType D, int N>
void launch(Queue* queue, std::vector<Job> jobs) {
  launch_jobs(std::move(jobs), add_fast<D, N>, [queue](const TableWriter& writer) {
    launch_table(writer, [&](const auto& table) {
      constexpr int kBytes = std::decay_t<decltype(table)>::kSize;
      FI_LAUNCH((fast<D, N, kBytes>), writer.tiles(), kThreads, queue->stream(), table);
    });
    check_launch("combine", queue->device());
  });
}

template <DType D>
void launch_of(Queue* queue, size_t inputs, std::vector<Job> jobs) {
  using Launch = void (*)(Queue*, std::vector<Job>);
  constexpr Launch kLaunches[kFastInputs] = {launch<D, 1>, launch<D, 2>, launch<D, 3>, launch<D, 4>,
                                             launch<D, 5>, launch<D, 6>, launch<D, 7>, launch<D, 8>};
  kLaunches[inputs - 1](queue, std::move(jobs));
}

}  // namespace

void launch_fast(Queue* queue, DType dtype, size_t inputs, std::vector<Job> jobs) {
  if (dtype == DType::F32)
    launch_of<DType::F32>(queue, inputs, std::move(jobs));
  else if (dtype == DType::F16)
    launch_of<DType::F16>(queue, inputs, std::move(jobs));
  else
    launch_of<DType::BF16>(queue, inputs, std::move(jobs));
}

}  // namespace cuda
}  // namespace fi
