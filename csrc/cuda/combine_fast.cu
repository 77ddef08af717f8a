// The kernels of combine_fast.h for pieces in the launch's arguments, of any number of rows. They count NaN and Inf.

#include "combine_fast.h"
#include "combine_jobs.h"

namespace fi {
namespace cuda {

namespace {

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

constexpr int kPasses = 4;  // of a tile
template <int N>
constexpr int kTileVectors = kFastThreads * kUnroll<N> * kPasses;

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
FI_KERNEL(kFastThreads, kResident<N>)
fast(FI_ARGUMENT TableOf<kBytes> table) {
  constexpr int kU = kUnroll<N>, kE = kElements<D>;
  uint32_t tile;
  const FastPiece<N>& piece = entry_of_block<FastPiece<N>>(table, &tile);
  const int64_t vectors = piece.numel / kE;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int64_t at = (int64_t(tile) * kPasses + pass) * (kFastThreads * kU) + thread_index();
    Vector16 x[kU][N];
#pragma unroll
    for (int u = 0; u < kU; ++u)
      if (at + u * kFastThreads < vectors)
#pragma unroll
        for (int i = 0; i < N; ++i)
          x[u][i] = load_once(static_cast<const char*>(piece.x[i]) + 16 * (at + u * kFastThreads));
#pragma unroll 1
    for (uint32_t k = 0; k < piece.n_rows; ++k) {
      const FastRow<N>& row = piece.rows[k];
#pragma unroll
      for (int u = 0; u < kU; ++u) {
        const int64_t v = at + u * kFastThreads;
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
      FI_LAUNCH((fast<D, N, kBytes>), writer.tiles(), kFastThreads, queue->stream(), table);
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
