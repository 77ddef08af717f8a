// Sums of any dtypes: a unit at a time where they lie so, else at any addresses, an element at a time. And the samples
// of all sums.

#include "combine_jobs.h"
#include "stores.h"
#include "sums.h"
#include "values.h"

namespace fi {
namespace cuda {

namespace {

constexpr int kThreads = 256;

// A term, with its weight in both types: a device takes dozens of cycles to convert it.
struct AnyTerm {
  double weight;
  float weight_f32;
  int input;
};

struct AnyRow {
  void* out;
  int64_t* counts;  // kCounts, or null
  Sample* samples;
  uint64_t key;
  double total;
  float total_f32;
  int pivot;
  uint32_t first_term, n_terms;
};

// Followed by n addresses, n dtypes, n_rows rows and their terms.
struct AnyPiece {
  int64_t numel, first;
  Store store;
  uint32_t n, n_rows, dtypes_at, rows_at, terms_at;  // offsets in bytes
  // For `sample`: the first sampled chunk of the tensor, the distance to the next in chunks, and that between a row's
  // samples of them.
  int64_t first_chunk, every, stride;

  template <class What>
  FI_HD const What* part(uint32_t offset) const {
    return reinterpret_cast<const What*>(reinterpret_cast<const char*>(this) + offset);
  }
  FI_HD const void* x(int i) const { return part<const void*>(sizeof(AnyPiece))[i]; }
  FI_HD DType in(int i) const { return DType(part<uint8_t>(dtypes_at)[i]); }
  FI_HD const AnyRow& row(uint32_t k) const { return part<AnyRow>(rows_at)[k]; }
  FI_HD const AnyTerm& term(uint32_t t) const { return part<AnyTerm>(terms_at)[t]; }
};

FI_HD constexpr size_t aligned(size_t bytes) { return (bytes + 7) / 8 * 8; }

// Groups of 64 elements of a tensor in a tile: a thread has four elements of one, those of one Philox counter.
constexpr int kTileGroups = 64, kGroupThreads = kPhiloxLanes, kPassGroups = kThreads / kGroupThreads;

// The parts of one element's sum: the pivot, the sum of the terms, and the sum of both.
template <class T>
struct Parts {
  T p, acc, y;
};

template <class T>
FI_DEVICE T weight_of(const AnyTerm& term) {
  return sizeof(T) == 8 ? T(term.weight) : T(term.weight_f32);
}
template <class T>
FI_DEVICE T total_of(const AnyRow& row) {
  return sizeof(T) == 8 ? T(row.total) : T(row.total_f32);
}

template <class T>
FI_DEVICE Parts<T> parts_of(const AnyPiece& piece, const AnyRow& row, int64_t at) {
  Parts<T> s;
  s.p = widen_any<T>(piece.in(row.pivot), piece.x(row.pivot), at);
  s.acc = 0;
#pragma unroll 1
  for (uint32_t t = row.first_term; t < row.first_term + row.n_terms; ++t) {
    const AnyTerm& term = piece.term(t);
    s.acc = add_term(weight_of<T>(term), widen_any<T>(piece.in(term.input), piece.x(term.input), at), s.p, s.acc);
  }
  const bool copy = row.n_terms == 0 && row.total == 1.0;
  s.y = copy ? s.p : add_pivot(total_of<T>(row), s.p, s.acc);
  return s;
}

template <class T>
FI_RARE void any_count(const AnyPiece& piece, const AnyRow& row, int64_t at) {
  const auto count = [&](int i) {
    count_one(double(widen_any<T>(piece.in(i), piece.x(i), at)), row.counts + kNanIn, row.counts + kInfIn);
  };
  count(row.pivot);
  for (uint32_t t = row.first_term; t < row.first_term + row.n_terms; ++t) count(piece.term(t).input);
  count_one(widen_any<double>(piece.store.dtype, row.out, at), row.counts + kNanOut, row.counts + kInfOut);
}

template <class T>
FI_KERNEL(kThreads, 4)
any(FI_ARGUMENT Table table) {
  uint32_t tile;
  const AnyPiece& piece = entry_of_block<AnyPiece>(table, &tile);
  const uint32_t lane = thread_index() % kGroupThreads;
#pragma unroll 1
  for (int pass = 0; pass < kTileGroups / kPassGroups; ++pass) {
    const int64_t group =
        piece.first / kPhiloxGroup + int64_t(tile) * kTileGroups + pass * kPassGroups + thread_index() / kGroupThreads;
#pragma unroll 1
    for (uint32_t k = 0; k < piece.n_rows; ++k) {
      const AnyRow& row = piece.row(k);
      PhiloxWords<uint64_t> words{};
      if (piece.store.stochastic) words = words_of(group, lane, row.key);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t at = group * kPhiloxGroup + w * kPhiloxLanes + lane - piece.first;
        if (at < 0 || at >= piece.numel) continue;
        const Parts<T> s = parts_of<T>(piece, row, at);
        store_any(piece.store.dtype, row.out, at, code_of(piece.store, s.y, uint32_t(words.w[w])));
        // A sum that is finite may be stored as an infinity.
        if (row.counts && !is_finite(widen_any<double>(piece.store.dtype, row.out, at))) any_count<T>(piece, row, at);
      }
    }
  }
}

// ---- a unit at a time
// ------------------------------------------------------------------------------------------------

constexpr int kTogether = 4;  // terms whose units are loaded together
constexpr int kUnitPasses = 2;

// Counts the NaN and Inf of a unit, or sums those elements of one that the piece has.
FI_RARE void count_unit(const AnyPiece& piece, const AnyRow& row, int64_t from) {
#pragma unroll 1
  for (int j = 0; j < kUnit; ++j)
    if (!is_finite(widen_any<double>(piece.store.dtype, row.out, from + j))) any_count<float>(piece, row, from + j);
}

FI_RARE void some_of_unit(const AnyPiece& piece, const AnyRow& row, int64_t from, const uint32_t* words) {
#pragma unroll 1
  for (int j = 0; j < kUnit; ++j) {
    const int64_t at = from + j;
    if (at < 0 || at >= piece.numel) continue;
    const Parts<float> s = parts_of<float>(piece, row, at);
    store_any(piece.store.dtype, row.out, at, code_of(piece.store, s.y, piece.store.stochastic ? words[j] : 0u));
    if (row.counts && !is_finite(widen_any<double>(piece.store.dtype, row.out, at))) any_count<float>(piece, row, at);
  }
}

// In float32, of pieces that have units.
template <int kBytes>
FI_KERNEL(kThreads, 2)
any_units(FI_ARGUMENT TableOf<kBytes> table) {
  FI_SHARED uint32_t words[kSpan];
  uint32_t tile;
  const AnyPiece& piece = entry_of_block<AnyPiece>(table, &tile);
  const int me = int(thread_index());
#pragma unroll 1
  for (int pass = 0; pass < kUnitPasses; ++pass) {
    const int64_t span = piece.first / kPhiloxGroup * kPhiloxGroup + (int64_t(tile) * kUnitPasses + pass) * kSpan;
    const int64_t from = span + me * kUnit - piece.first;
    const bool whole = from >= 0 && from + kUnit <= piece.numel;
#pragma unroll 1
    for (uint32_t k = 0; k < piece.n_rows; ++k) {
      const AnyRow& row = piece.row(k);
      Raw<float, kAnyDType> pivot, x[kTogether];
      const auto load = [&](uint32_t first) {
#pragma unroll
        for (uint32_t t = 0; t < kTogether; ++t) {
          const bool there = first + t < row.n_terms;
          const int i = there ? piece.term(row.first_term + first + t).input : row.pivot;
          load_unit(piece.in(i), piece.x(i), from, whole && there, &x[t]);
        }
      };
      load_unit(piece.in(row.pivot), piece.x(row.pivot), from, whole, &pivot);
      load(0);
      if (piece.store.stochastic) draw_words(span, row.key, words);
      if (!whole) {
        if (from + kUnit > 0 && from < piece.numel) some_of_unit(piece, row, from, words + me * kUnit);
        continue;
      }
      float p[kUnit], acc[kUnit] = {}, v[kUnit];
      widen_unit(piece.in(row.pivot), pivot, p);
#pragma unroll 1
      for (uint32_t first = 0; first < row.n_terms; first += kTogether) {
#pragma unroll
        for (uint32_t t = 0; t < kTogether; ++t) {
          if (first + t >= row.n_terms) continue;
          const AnyTerm& term = piece.term(row.first_term + first + t);
          widen_unit(piece.in(term.input), x[t], v);
#pragma unroll
          for (int j = 0; j < kUnit; ++j) acc[j] = add_term(term.weight_f32, v[j], p[j], acc[j]);
        }
        load(first + kTogether);
      }
      const bool copy = row.n_terms == 0 && row.total == 1.0;
#pragma unroll
      for (int j = 0; j < kUnit; ++j) v[j] = copy ? p[j] : add_pivot(row.total_f32, p[j], acc[j]);
      const bool nonfinite = store_unit(piece.store, v, words + me * kUnit, row.out, from);
      if (row.counts && nonfinite) count_unit(piece, row, from);
    }
  }
}

// ---- samples
// ---------------------------------------------------------------------------------------------------------

// A block has one sampled chunk.
template <class T>
FI_KERNEL(kThreads, 3)
sample(FI_ARGUMENT Table table) {
  uint32_t tile;
  const AnyPiece& piece = entry_of_block<AnyPiece>(table, &tile);
  const int64_t chunk = piece.first_chunk + tile * piece.every, begin = chunk * kChunk - piece.first;
  const int64_t from = begin < 0 ? 0 : begin, end = begin + kChunk < piece.numel ? begin + kChunk : piece.numel;
  FI_SHARED double sums[4][kThreads];
  const uint32_t me = thread_index();
  const Store nearest = {piece.store.dtype, false, piece.store.fp8_saturate};
#pragma unroll 1
  for (uint32_t k = 0; k < piece.n_rows; ++k) {
    const AnyRow& row = piece.row(k);
    double changed = 0, pp = 0, dd = 0, od = 0;
#pragma unroll 1
    for (int64_t at = from + me; at < end; at += kThreads) {
      const Parts<T> s = parts_of<T>(piece, row, at);
      const T stored = T(widen_any<double>(piece.store.dtype, row.out, at));
      const T intended = row.total == 1.0 ? s.acc : T(s.y - s.p), moved = T(stored - s.p);
      changed += load_any(piece.store.dtype, row.out, at) != code_of(nearest, s.p, 0u);
      pp += double(s.p) * double(s.p);
      dd += double(intended) * double(intended);
      od += double(moved) * double(intended);
    }
    sums[0][me] = changed, sums[1][me] = pp, sums[2][me] = dd, sums[3][me] = od;
    for (uint32_t half = kThreads / 2; half > 0; half /= 2) {
      sync_threads();
      if (me < half)
        for (int j = 0; j < 4; ++j) sums[j][me] += sums[j][me + half];
    }
    if (me == 0)
      row.samples[tile * piece.stride] = {end - from, int64_t(sums[0][0]), sums[1][0], sums[2][0], sums[3][0]};
    sync_threads();
  }
}

// Whether all that the rows of a job read and write has units.
bool lies_in_units(const Job& job) {
  const Sum& sum = *job.sum;
  const auto fits = [&](int i) { return has_units(sum.x[size_t(i)], sum.in[size_t(i)], sum.first); };
  bool all = true;
  for (const size_t r : job.rows) {
    const SumRow& row = sum.rows[r];
    all = all && fits(row.pivot) && has_units(row.out, sum.out_dtype, sum.first);
    for (const Term& term : row.terms) all = all && fits(term.input);
  }
  return all;
}

int64_t unit_tiles(const Sum& sum) {
  const int64_t tile = kUnitPasses * kSpan;
  return (sum.first % kPhiloxGroup + sum.numel + tile - 1) / tile;
}

int64_t any_tiles(const Sum& sum) {
  const int64_t tile = kTileGroups * kPhiloxGroup;
  return (sum.first % kPhiloxGroup + sum.numel + tile - 1) / tile;
}

bool add_any(const Job& job, int64_t tiles, TableWriter* table) {
  const Sum& sum = *job.sum;
  const size_t n = sum.x.size(), dtypes_at = sizeof(AnyPiece) + n * sizeof(void*), rows_at = aligned(dtypes_at + n);
  const size_t terms_at = rows_at + job.rows.size() * sizeof(AnyRow);
  size_t n_terms = 0;
  for (const size_t r : job.rows) n_terms += sum.rows[r].terms.size();
  auto* const entry = static_cast<char*>(table->add(tiles, terms_at + n_terms * sizeof(AnyTerm)));
  if (!entry) return false;
  auto* const piece = reinterpret_cast<AnyPiece*>(entry);
  piece->numel = sum.numel;
  piece->first = sum.first;
  piece->store = {sum.out_dtype, sum.stochastic, sum.fp8_saturate};
  piece->n = uint32_t(n);
  piece->n_rows = uint32_t(job.rows.size());
  piece->dtypes_at = uint32_t(dtypes_at);
  piece->rows_at = uint32_t(rows_at);
  piece->terms_at = uint32_t(terms_at);
  piece->first_chunk = job.first_chunk;
  piece->every = sum.stats_every;
  piece->stride = int64_t(sum.rows.size());
  memcpy(entry + sizeof(AnyPiece), sum.x.data(), n * sizeof(void*));
  for (size_t i = 0; i < n; ++i) entry[dtypes_at + i] = char(sum.in[i]);
  auto* row = reinterpret_cast<AnyRow*>(entry + rows_at);
  auto* const terms = reinterpret_cast<AnyTerm*>(entry + terms_at);
  uint32_t term = 0;
  for (const size_t r : job.rows) {
    const SumRow& from = sum.rows[r];
    *row++ = {from.out,   job.counts(r), job.samples(r),
              from.key,   from.total,    float(from.total),
              from.pivot, term,          uint32_t(from.terms.size())};
    for (const Term& t : from.terms) terms[term++] = {t.weight, float(t.weight), t.input};
  }
  return true;
}

}  // namespace

void launch_any(Queue* queue, bool wide, std::vector<Job> jobs) {
  if (!wide) {
    const auto rest = std::partition(jobs.begin(), jobs.end(), [](const Job& job) { return !lies_in_units(job); });
    const auto add_units = [](const Job& job, TableWriter* table) { return add_any(job, unit_tiles(*job.sum), table); };
    launch_jobs(std::vector<Job>(rest, jobs.end()), add_units, [queue](const TableWriter& writer) {
      launch_table(writer, [&](const auto& table) {
        constexpr int kBytes = std::decay_t<decltype(table)>::kSize;
        FI_LAUNCH((any_units<kBytes>), writer.tiles(), kThreads, queue->stream(), table);
      });
      check_launch("combine", queue->device());
    });
    jobs.erase(rest, jobs.end());
  }
  const auto add = [](const Job& job, TableWriter* table) { return add_any(job, any_tiles(*job.sum), table); };
  launch_jobs(std::move(jobs), add, [queue, wide](const TableWriter& writer) {
    const Table& table = writer.table();
    if (wide)
      FI_LAUNCH(any<double>, writer.tiles(), kThreads, queue->stream(), table);
    else
      FI_LAUNCH(any<float>, writer.tiles(), kThreads, queue->stream(), table);
    check_launch("combine", queue->device());
  });
}

void launch_samples(Queue* queue, bool wide, std::vector<Job> jobs) {
  const auto add = [](const Job& job, TableWriter* table) { return add_any(job, job.chunks, table); };
  launch_jobs(std::move(jobs), add, [queue, wide](const TableWriter& writer) {
    const Table& table = writer.table();
    if (wide)
      FI_LAUNCH(sample<double>, writer.tiles(), kThreads, queue->stream(), table);
    else
      FI_LAUNCH(sample<float>, writer.tiles(), kThreads, queue->stream(), table);
    check_launch("the samples of combine", queue->device());
  });
}

}  // namespace cuda
}  // namespace fi
