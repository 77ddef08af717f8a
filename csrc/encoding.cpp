#include "encoding.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace fi {

namespace {

// A matrix that is one block is one long row with one block.
Blocks simplified(Blocks b) {
  if (b.rows < 1 || b.columns < 1 || b.block_rows < 1 || b.block_columns < 1)
    throw std::invalid_argument("blocks have 1 or more rows and columns");
  if (b.block_rows < b.rows || b.block_columns < b.columns)
    return {b.rows, b.columns, std::min(b.block_rows, b.rows), std::min(b.block_columns, b.columns)};
  const int64_t whole = b.rows * b.columns;
  return {1, whole, 1, whole};
}

}  // namespace

Encoding::Encoding(const Backend& backend, const Encoder& encoder, Format format, int64_t numel, Blocks blocks,
                   int64_t grain, std::vector<Place> places, std::vector<float> known)
    : backend_(backend),
      encoder_(encoder),
      format_(format),
      numel_(numel),
      grain_(std::max(grain, encoder.block_elements)),
      blocks_(simplified(blocks)),
      in_rows_(blocks_.block_rows == 1 && blocks_.columns % blocks_.block_columns == 0),
      places_(std::move(places)),
      known_(std::move(known)) {
  if (numel % (blocks_.rows * blocks_.columns) != 0) throw std::invalid_argument("a tensor has whole matrices");
  if (blocks_.block_columns % encoder.block_elements != 0 && encoder.block_elements > 1)
    throw std::invalid_argument("rows have whole blocks");
  if (!known_.empty() && blocks_.block_columns != blocks_.rows * blocks_.columns)
    throw std::invalid_argument("magnitudes are known of whole matrices only");
}

std::pair<int64_t, int64_t> Encoding::codes(int64_t first, int64_t count) const {
  return {first / encoder_.block_elements * encoder_.block_bytes,
          count / encoder_.block_elements * encoder_.block_bytes};
}

std::pair<int64_t, int64_t> Encoding::blocks(int64_t first, int64_t count) const {
  const auto index = [&](int64_t e) {  // of the first block that begins at element e or later
    if (in_rows_) return (e + blocks_.block_columns - 1) / blocks_.block_columns;
    const int64_t row = e / blocks_.columns;
    return (row / blocks_.rows * matrix_bands() + (row % blocks_.rows + blocks_.block_rows - 1) / blocks_.block_rows) *
           row_blocks();
  };
  const int64_t begin = index(first);
  return {begin, index(first + count) - begin};
}

int64_t Encoding::band_end(int64_t first) const {
  if (known()) return first + grain_;
  if (in_rows_ && blocks_.block_columns % grain_ == 0) return first + blocks_.block_columns;
  const int64_t row = first / blocks_.columns % blocks_.rows;
  return first + std::min(blocks_.block_rows, blocks_.rows - row) * blocks_.columns;
}

int64_t Encoding::end_of_bands(int64_t first, int64_t most) const {
  int64_t end = band_end(first);
  if (known() || in_rows_) return std::min(numel_, first + std::max(most / (end - first), int64_t(1)) * (end - first));
  while (end < numel_ && band_end(end) <= first + most) end = band_end(end);
  return std::min(end, numel_);
}

template <class Take>
void Encoding::for_rows(const float* x, int64_t first, int64_t count, int64_t from, Take take) const {
  for (int64_t done = 0; done < count;) {
    const int64_t row = (first + done) / blocks_.columns, column = (first + done) % blocks_.columns;
    EncodeArgs args{};
    args.x = x + done;
    args.numel = std::min(blocks_.columns - column, count - done);
    args.block = blocks_.block_columns;
    args.codes = encoder_.codes;
    const int64_t index =
        (row / blocks_.rows * matrix_bands() + row % blocks_.rows / blocks_.block_rows) * row_blocks();
    const int64_t skipped = std::max(from - index, int64_t(0));  // blocks of a row that are none of this run's
    args.column = column - skipped * blocks_.block_columns;
    take(args, index + skipped - from, done);
    done += args.numel;
  }
}

void Encoding::measure(const float* x, int64_t first, int64_t count, int64_t from, uint32_t* magnitudes) const {
  for_rows(x, first, count, from,
           [&](const EncodeArgs& args, int64_t at, int64_t) { backend_.magnitudes(args, magnitudes + at); });
}

ScaleRun Encoding::scales_of(int64_t from, const std::vector<uint32_t>& magnitudes) const {
  ScaleRun run{from, {}, {}};
  const size_t size = size_t(scale_bytes());
  run.values.reserve(magnitudes.size());
  run.stored.resize(magnitudes.size() * size);
  for (size_t i = 0; i < magnitudes.size(); ++i) {
    const Scale scale = scale_of(encoder_, format_.kind, format_.power_of_two, magnitudes[i]);
    run.values.push_back(scale.value);
    memcpy(&run.stored[i * size], &scale.bits, size);
  }
  return run;
}

ScaleRun Encoding::known_scales(size_t output, int64_t first, int64_t count) const {
  const int64_t size = blocks_.block_columns, from = first / size, end = (first + count + size - 1) / size;
  std::vector<uint32_t> magnitudes;
  for (int64_t b = from; b < end; ++b)
    magnitudes.push_back(bit_cast<uint32_t>(known_[output * size_t(numel_ / size) + size_t(b)]));
  return scales_of(from, magnitudes);
}

void Encoding::encode(const float* x, int64_t first, int64_t count, const ScaleRun& scales, void* to,
                      float* decoded) const {
  for_rows(x, first, count, scales.first, [&](EncodeArgs args, int64_t at, int64_t done) {
    args.scales = scales.values.data() + at;
    args.stored = scales.stored.data() + at * scale_bytes();
    args.out = static_cast<char*>(to) + codes(0, done).second;
    args.decoded = decoded ? decoded + done : nullptr;
    backend_.encode(args);
  });
}

void Encoding::add_stats(const void* pivot, DType dtype, const float* x, const float* decoded, int64_t count,
                         char* scratch, RowStats* stats) const {
  const void* const vectors[] = {pivot, x, decoded};
  const DType dtypes[] = {dtype, DType::F32, DType::F32};
  double sums[9] = {};  // the Gram matrix of the pivot p, D = x - p and decoded - p: pp pD po DD Do oo
  int64_t nonzero[3] = {};
  MeasureArgs args{vectors, dtypes, 3, true, dtype == DType::F64, count, scratch, sums, nonzero};
  backend_.measure(args);
  stats->sampled += count;
  stats->changed += nonzero[2];
  stats->sum_pp += sums[0];
  stats->sum_dd += sums[3];
  stats->sum_od += sums[4];
}

}  // namespace fi
