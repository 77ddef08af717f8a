// The kernels of combine_fast.h for pieces in the device's memory, and nothing counted.

#include <algorithm>
#include <utility>

#include "combine_fast.h"
#include "combine_prepared.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kMostInputs = 8;
constexpr int kTileVectors = 2048;  // whatever the row reads
// A piece in words of 8 bytes: its first tile, its number of elements, and the addresses of its output and its inputs.
enum Word { kFirstTile, kNumel, kOut, kInputs };

// total * the pivot, which is input[0], + the terms.
template <int N>
struct PreparedRow {
  static constexpr uint32_t terms = ~0u;
  float total;
  float w[N];
  int input[N];
};

struct Pieces {
  const uint64_t* at;
  uint32_t count, words;
};

FI_DEVICE const uint64_t* piece_of_block(const Pieces& pieces) {
  uint32_t low = 0, high = pieces.count;  // the piece is in low..high-1
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    (pieces.at[size_t(middle) * pieces.words + kFirstTile] <= block_index() ? low : high) = middle;
  }
  return pieces.at + size_t(low) * pieces.words;
}

template <DType D, int N>
FI_KERNEL(kFastThreads, kResident<N>)
prepared(FI_ARGUMENT PreparedRow<N> row, FI_ARGUMENT Pieces pieces) {
  using Bits = typename Format<D>::Bits;
  constexpr int kU = kUnroll<N>, kE = kElements<D>;
  const uint64_t* const piece = piece_of_block(pieces);
  const int64_t first = (int64_t(block_index()) - int64_t(piece[kFirstTile])) * kTileVectors;
  const int64_t numel = int64_t(piece[kNumel]), vectors = numel / kE;
  char* const out = reinterpret_cast<char*>(piece[kOut]);
  const char* from[N];
#pragma unroll
  for (int i = 0; i < N; ++i) from[i] = reinterpret_cast<const char*>(piece[kInputs + row.input[i]]);
  bool nonfinite = false;  // is not asked for
#pragma unroll 1
  for (int pass = 0; pass < kTileVectors; pass += kFastThreads * kU) {
    const int64_t at = first + pass + thread_index();
    Vector16 x[kU][N];
#pragma unroll
    for (int u = 0; u < kU; ++u)
      if (at + u * kFastThreads < vectors)
#pragma unroll
        for (int i = 0; i < N; ++i) x[u][i] = load_once(from[i] + 16 * (at + u * kFastThreads));
#pragma unroll
    for (int u = 0; u < kU; ++u) {
      const int64_t v = at + u * kFastThreads;
      if (v < vectors) store_once(out + 16 * v, fast_sum<D, N>(row, x[u], &nonfinite));
    }
  }
  const int64_t rest = vectors * kE + thread_index();  // behind the last whole vector
  if (first + kTileVectors < vectors || rest >= numel) return;
  Vector16 x[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = {{reinterpret_cast<const Bits*>(from[i])[rest], 0, 0, 0}};
  reinterpret_cast<Bits*>(out)[rest] = Bits(fast_sum<D, N>(row, x, &nonfinite).w[0]);
}

template <DType D, int N>
void launch(const SumRow& from, const Pieces& pieces, uint32_t tiles, cudaStream_t stream) {
  PreparedRow<N> row{float(from.total), {}, {from.pivot}};
  for (int i = 1; i < N; ++i) {
    row.w[i] = float(from.terms[size_t(i) - 1].weight);
    row.input[i] = from.terms[size_t(i) - 1].input;
  }
  FI_LAUNCH((prepared<D, N>), tiles, kFastThreads, stream, row, pieces);
}

template <DType D>
void launch_of(const SumRow& row, const Pieces& pieces, uint32_t tiles, cudaStream_t stream) {
  using Launch = void (*)(const SumRow&, const Pieces&, uint32_t, cudaStream_t);
  constexpr Launch kLaunches[kMostInputs] = {launch<D, 1>, launch<D, 2>, launch<D, 3>, launch<D, 4>,
                                             launch<D, 5>, launch<D, 6>, launch<D, 7>, launch<D, 8>};
  kLaunches[row.terms.size()](row, pieces, tiles, stream);
}

bool is_aligned(const void* x) { return uintptr_t(x) % 16 == 0; }

}  // namespace

bool PreparedTable::takes(const Sum& sum) {
  const DType dtype = sum.out_dtype;
  if (sum.stochastic || sum.stats_every > 0 || sum.rows.size() != 1 || sum.numel == 0) return false;
  if (dtype != DType::F32 && dtype != DType::F16 && dtype != DType::BF16) return false;
  bool all = is_aligned(sum.rows[0].out);
  for (size_t i = 0; i < sum.x.size(); ++i) all = all && sum.in[i] == dtype && is_aligned(sum.x[i]);
  return all;
}

bool PreparedTable::takes(const SumRow& row) {
  std::vector<int> inputs = {row.pivot};
  for (const Term& term : row.terms) inputs.push_back(term.input);
  std::sort(inputs.begin(), inputs.end());
  const bool once = std::adjacent_find(inputs.begin(), inputs.end()) == inputs.end();
  const bool copy = row.terms.empty() && row.total == 1.0;  // NaN and all
  return once && !copy && inputs.size() <= kMostInputs;
}

PreparedTable::PreparedTable(int device, std::shared_ptr<HostPool> pool, const std::vector<Sum>& sums)
    : dtype_(sums[0].out_dtype),
      pieces_(uint32_t(sums.size())),
      words_(uint32_t(kInputs + sums[0].x.size())),
      memory_(device, int64_t(sizeof(uint64_t)) * pieces_ * words_, false) {
  std::vector<uint64_t> words;
  for (const Sum& sum : sums) {
    const int64_t vectors = sum.numel * int64_t(size_of(dtype_)) / 16;
    words.insert(words.end(), {tiles_, uint64_t(sum.numel), uintptr_t(sum.rows[0].out)});
    for (const void* x : sum.x) words.push_back(uintptr_t(x));
    tiles_ += uint32_t(std::max<int64_t>(1, (vectors + kTileVectors - 1) / kTileVectors));
  }
  Queue queue(device, std::move(pool));
  queue.send(reinterpret_cast<void*>(memory_.address()), words.data(), memory_.bytes());
  queue.record()->wait();
}

void PreparedTable::run(Queue* queue, const SumRow& row) const {
  const Pieces pieces{reinterpret_cast<const uint64_t*>(memory_.address()), pieces_, words_};
  const cudaStream_t stream = queue->stream();
  if (dtype_ == DType::F32)
    launch_of<DType::F32>(row, pieces, tiles_, stream);
  else if (dtype_ == DType::F16)
    launch_of<DType::F16>(row, pieces, tiles_, stream);
  else
    launch_of<DType::BF16>(row, pieces, tiles_, stream);
  check_launch("combine", queue->device());
}

}  // namespace cuda
}  // namespace fi
